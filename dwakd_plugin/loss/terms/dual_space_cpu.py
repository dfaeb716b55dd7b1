"""The kernels of both spaces' distillation on the CPU, with forward KL, compiled by numba.

A token's two rows of logits are read once, or twice where a gradient takes their place. The
references are `student_space.student_statistics` with its gradients, and `teacher_statistics_`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from dwakd_plugin.loss.terms.rows_cpu import BLOCK, Array, array, by_rows, exponentials, jit

CE, T2S_CE, DIVERGENCE, ENTROPY, GATE, CORRECT = range(6)


def student_statistics(
    student_logits: Tensor, t2s_logits: Tensor, labels: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """The columns of `StudentStatistics` (C,), of logits (C, Vs), labels and targets (C,)."""
    columns = student_logits.new_empty(6, len(student_logits))
    inputs = _with_largest(student_logits, t2s_logits)
    rest = array(labels), array(targets), temperature, columns.numpy()
    by_rows(lambda a, b: _student_statistics(a, b, *inputs, *rest), student_logits)
    return (*columns[:CORRECT].unbind(), columns[CORRECT] > 0)


def student_gradients_(
    student_logits: Tensor,
    t2s_logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    ce_grad: Tensor,
    t2s_ce_grad: Tensor,
    divergence_grad: Tensor,
    temperature: float,
) -> None:
    """Both logits (C, Vs), contiguous, become their gradients, by those (C,) of the columns."""
    inputs = _with_largest(student_logits, t2s_logits)
    rest = [array(each) for each in (labels, targets, ce_grad, t2s_ce_grad, divergence_grad)]
    by_rows(lambda a, b: _student_gradients(a, b, *inputs, *rest, temperature), student_logits)


def teacher_statistics_(
    teacher_logits: Tensor, s2t_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """Divergence, entropy and cross-entropy (C,); s2t_logits become the divergence's gradient.

    Shapes: both logits (C, Vt), contiguous, whose content is lost, and labels (C,).
    """
    columns = teacher_logits.new_empty(3, len(teacher_logits))
    inputs = _with_largest(teacher_logits, s2t_logits)
    rest = array(labels), temperature, columns.numpy()
    by_rows(lambda a, b: _teacher_statistics(a, b, *inputs, *rest), teacher_logits)
    return columns.unbind()


def _with_largest(*logits: Tensor) -> list[Array]:
    return [array(each) for own in logits for each in (own, own.amax(-1))]


@jit
def _first_place(row: Array, value: Any, place: int) -> bool:
    """Whether `value` stands at this place of a row, and nowhere before it."""
    if row[place] != value:
        return False
    for k in range(place):  # noqa: SIM110
        if row[k] == value:
            return False
    return True


@jit
def _student_statistics(
    first: int,
    last: int,
    student_logits: Array,
    student_largest: Array,
    t2s_logits: Array,
    t2s_largest: Array,
    labels: Array,
    targets: Array,
    temperature: float,
    columns: Array,
) -> None:
    real = student_logits.dtype.type
    log2e, cool = real(math.log2(math.e)), real(1 / temperature)
    soft, one, zero = log2e * cool, real(1), real(0)
    p, q = np.empty(BLOCK, student_logits.dtype), np.empty(BLOCK, student_logits.dtype)
    p_soft, q_soft = np.empty_like(p), np.empty_like(q)
    for i in range(first, last):
        x, z, top, high = student_logits[i], t2s_logits[i], student_largest[i], t2s_largest[i]
        p_sum = q_sum = p_soft_sum = q_soft_sum = mean = cross = zero
        for start in range(0, len(x), BLOCK):
            a, b = x[start : start + BLOCK], z[start : start + BLOCK]
            exponentials(a, top, log2e, p)
            exponentials(b, high, log2e, q)
            exponentials(a, top, soft, p_soft)
            exponentials(b, high, soft, q_soft)
            p_part = q_part = p_soft_part = q_soft_part = mean_part = cross_part = zero
            for k in range(len(a)):
                p_part += p[k]
                q_part += q[k]
                p_soft_part += p_soft[k]
                q_soft_part += q_soft[k]
                mean_part += p[k] * (a[k] - top)
                cross_part += q_soft[k] * ((b[k] - high) - (a[k] - top))
            p_sum += p_part
            q_sum += q_part
            p_soft_sum += p_soft_part
            q_soft_sum += q_soft_part
            mean += mean_part
            cross += cross_part
        columns[CE, i] = np.log(p_sum) + (top - x[labels[i]])
        columns[T2S_CE, i] = np.log(q_sum) + (high - z[targets[i]])
        logs = np.log(p_soft_sum) - np.log(q_soft_sum)
        columns[DIVERGENCE, i] = cross * cool / q_soft_sum + logs
        columns[ENTROPY, i] = np.log(p_sum) - mean / p_sum
        columns[GATE, i] = one / q_sum
        columns[CORRECT, i] = one if _first_place(z, high, targets[i]) else zero


@jit
def _student_gradients(
    first: int,
    last: int,
    student_logits: Array,
    student_largest: Array,
    t2s_logits: Array,
    t2s_largest: Array,
    labels: Array,
    targets: Array,
    ce_grad: Array,
    t2s_ce_grad: Array,
    divergence_grad: Array,
    temperature: float,
) -> None:
    real = student_logits.dtype.type
    log2e, cool, zero = real(math.log2(math.e)), real(1 / temperature), real(0)
    soft = log2e * cool
    p, q = np.empty_like(student_logits[0]), np.empty_like(student_logits[0])
    p_soft, q_soft = np.empty_like(p), np.empty_like(q)
    for i in range(first, last):
        x, z, top, high = student_logits[i], t2s_logits[i], student_largest[i], t2s_largest[i]
        exponentials(x, top, log2e, p)
        exponentials(z, high, log2e, q)
        exponentials(x, top, soft, p_soft)
        exponentials(z, high, soft, q_soft)
        p_sum = q_sum = p_soft_sum = q_soft_sum = zero
        for k in range(len(x)):
            p_sum += p[k]
            q_sum += q[k]
            p_soft_sum += p_soft[k]
            q_soft_sum += q_soft[k]
        pull = divergence_grad[i] * cool
        own, own_soft, goal_soft = ce_grad[i] / p_sum, pull / p_soft_sum, pull / q_soft_sum
        theirs = t2s_ce_grad[i] / q_sum
        for k in range(len(x)):
            x[k] = own * p[k] + (own_soft * p_soft[k] - goal_soft * q_soft[k])
            z[k] = theirs * q[k]
        x[labels[i]] -= ce_grad[i]
        z[targets[i]] -= t2s_ce_grad[i]


@jit
def _teacher_statistics(
    first: int,
    last: int,
    teacher_logits: Array,
    teacher_largest: Array,
    s2t_logits: Array,
    s2t_largest: Array,
    labels: Array,
    temperature: float,
    columns: Array,
) -> None:
    real = teacher_logits.dtype.type
    log2e, cool, zero = real(math.log2(math.e)), real(1 / temperature), real(0)
    soft = log2e * cool
    p = np.empty(BLOCK, teacher_logits.dtype)
    p_soft, q_soft = np.empty_like(p), np.empty_like(p)
    for i in range(first, last):
        x, z, top, high = teacher_logits[i], s2t_logits[i], teacher_largest[i], s2t_largest[i]
        p_sum = p_soft_sum = q_soft_sum = mean = cross = zero
        behind_top = top - x[labels[i]]
        for start in range(0, len(x), BLOCK):
            a, b = x[start : start + BLOCK], z[start : start + BLOCK]
            exponentials(a, top, log2e, p)
            exponentials(a, top, soft, p_soft)
            exponentials(b, high, soft, q_soft)
            p_part = p_soft_part = q_soft_part = mean_part = cross_part = zero
            for k in range(len(a)):
                p_part += p[k]
                p_soft_part += p_soft[k]
                q_soft_part += q_soft[k]
                mean_part += p[k] * (a[k] - top)
                cross_part += p_soft[k] * ((a[k] - top) - (b[k] - high))
            for k in range(len(a)):
                a[k], b[k] = p_soft[k], q_soft[k]
            p_sum += p_part
            p_soft_sum += p_soft_part
            q_soft_sum += q_soft_part
            mean += mean_part
            cross += cross_part
        logs = np.log(q_soft_sum) - np.log(p_soft_sum)
        columns[0, i] = cross * cool / p_soft_sum + logs
        columns[1, i] = np.log(p_sum) - mean / p_sum
        columns[2, i] = np.log(p_sum) + behind_top
        goal, own = cool / p_soft_sum, cool / q_soft_sum
        for k in range(len(x)):
            z[k] = own * z[k] - goal * x[k]
