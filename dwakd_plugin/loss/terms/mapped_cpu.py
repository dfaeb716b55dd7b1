"""The kernels of `mapped` on the CPU, compiled by numba: a pass over each matrix of logits.

The references are `mapped.mapped_log_probs` and autograd.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dwakd_plugin.loss.states import ContinuationTable
from dwakd_plugin.loss.terms.rows_cpu import BLOCK, Array, array, by_rows, exponentials, jit

CE, MAPPED_CE, DIVERGENCE, ENTROPY, GATE, BEST = range(6)


def mapped_probabilities(
    teacher_logits: Tensor,
    token_map: Tensor,
    read: Tensor,
    continuations: ContinuationTable | None,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """p_map over `rows` tokens of the student (C, Vs), and the mass that it is a share of (C,).

    Shapes as `mapped.mapped_statistics` has them; in the dtype of teacher_logits, float32 or
    float64. Sums over a student's token go in the order of the teacher's tokens.
    """
    largest = teacher_logits.amax(-1)
    found = teacher_logits.new_empty(len(teacher_logits), rows)
    mass = torch.empty_like(largest)
    none = np.zeros(2, np.int64)
    behind = (none, none, none)
    if continuations is not None:
        tables = (continuations.starts, continuations.teacher_tokens, continuations.student_tokens)
        behind = tuple(map(array, tables))
    # Unsigned and half as wide: no place is counted from the end, and the map is read faster.
    places = torch.where(token_map < 0, rows, token_map).to(torch.int32)
    arrays = [array(teacher_logits), array(largest), array(places).view(np.uint32), array(read)]
    by_rows(lambda a, b: _map(a, b, *arrays, *behind, found.numpy(), mass.numpy()), found)
    return found, mass


def statistics_and_gradient(
    student_logits: Tensor,
    target: Tensor,
    labels: Tensor,
    ce_grad: Tensor,
    divergence_grad: Tensor,
    *,
    reverse: bool = False,
    sampled: bool = False,
) -> tuple[Tensor, ...]:
    """ce, −log p_map(y), KL(p_map ‖ p_s), H(p_s), max p_map and whether that is at y, each (C,).

    With `reverse` the third is KL(p_s ‖ p_map), with `sampled` the last is whether both have their
    largest at one token. `target` becomes the gradient in student_logits, by those of the first
    and the third.

    Shapes: student_logits and target = p_map (C, Vs), labels and gradients (C,).
    """
    columns = student_logits.new_empty(6, len(student_logits))
    inputs = student_logits, student_logits.amax(-1), labels, ce_grad, divergence_grad
    arrays = [array(each) for each in inputs]
    outputs = target.numpy(), columns.numpy(), reverse, sampled
    by_rows(lambda a, b: _statistics_and_gradient(a, b, *arrays, *outputs), target)
    return (*columns[:BEST].unbind(), columns[BEST] > 0)


@jit
def _map(
    first: int,
    last: int,
    logits: Array,
    largest: Array,
    token_map: Array,
    read: Array,
    starts: Array,
    teacher_tokens: Array,
    student_tokens: Array,
    found: Array,
    mass: Array,
) -> None:
    """Rows `first` to `last` of `mapped_probabilities`."""
    real = logits.dtype.type
    log2e, zero = real(math.log2(math.e)), real(0)
    vocabulary, rows = logits.shape[1], found.shape[1]
    block = np.empty(BLOCK, logits.dtype)
    sums = np.empty(rows + 1, logits.dtype)  # the last one of what the student has no token for
    for i in range(first, last):
        row, top, total = logits[i], largest[i], zero
        sums[:] = zero
        for start in range(0, vocabulary, BLOCK):
            some, places = row[start : start + BLOCK], token_map[start : start + BLOCK]
            exponentials(some, top, log2e, block)
            part = zero
            for k in range(len(some)):
                part += block[k]
            total += part
            if read[i] == 0:
                for k in range(len(some)):
                    sums[places[k]] += block[k]
        if read[i] > 0:
            for entry in range(starts[read[i]], starts[read[i] + 1]):
                token = teacher_tokens[entry]
                exponentials(row[token : token + 1], top, log2e, block)
                sums[student_tokens[entry]] += block[0]
        kept = zero
        for s in range(rows):
            kept += sums[s]
        mass[i] = kept / total
        share = real(1) / kept if kept != zero else zero
        for s in range(rows):
            found[i, s] = sums[s] * share


@jit
def _statistics_and_gradient(
    first: int,
    last: int,
    logits: Array,
    largest: Array,
    labels: Array,
    ce_grad: Array,
    divergence_grad: Array,
    target: Array,
    columns: Array,
    reverse: bool,
    sampled: bool,
) -> None:
    """Rows `first` to `last` of `statistics_and_gradient`."""
    real = logits.dtype.type
    log2e, zero, tiny = real(math.log2(math.e)), real(0), real(np.finfo(logits.dtype).tiny)
    rows = logits.shape[1]
    p = np.empty(rows, logits.dtype)
    for i in range(first, last):
        row, goal, y = logits[i], target[i], labels[i]
        exponentials(row, largest[i], log2e, p)
        total, mean = zero, zero
        for s in range(rows):
            total += p[s]
            mean += p[s] * (row[s] - largest[i])
        log_sum = np.log(total)
        columns[CE, i] = log_sum + largest[i] - row[y]
        columns[MAPPED_CE, i] = -np.log(max(goal[y], tiny))
        columns[ENTROPY, i] = log_sum - mean / total
        best, place = goal[0], 0
        for s in range(rows):
            if goal[s] > best:
                best, place = goal[s], s
        columns[GATE, i] = best
        hit = row[place] == largest[i] if sampled else place == y
        columns[BEST, i] = real(1) if hit else zero
        push, pull = ce_grad[i] / total, divergence_grad[i]
        if reverse:
            value = zero
            for s in range(rows):
                gap = row[s] - largest[i] - log_sum - np.log(max(goal[s], tiny))
                value += p[s] * gap
                goal[s] = gap
            value /= total
            pull /= total
            for s in range(rows):
                goal[s] = p[s] * (push + pull * (goal[s] - value))
        else:
            kept, cross, value = zero, zero, zero
            for s in range(rows):
                kept += goal[s]
                cross -= goal[s] * (row[s] - largest[i])
            for s in range(rows):
                if goal[s] > zero:
                    value += goal[s] * np.log(goal[s])
            value += cross + kept * log_sum
            push += pull * kept / total
            for s in range(rows):
                goal[s] = push * p[s] - pull * goal[s]
        columns[DIVERGENCE, i] = value
        goal[y] -= ce_grad[i]
