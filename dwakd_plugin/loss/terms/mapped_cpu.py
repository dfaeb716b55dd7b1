"""The kernels of `mapped` on the CPU, compiled by numba: a pass over each matrix of logits.

The references are `mapped.mapped_log_probs` and autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwakd_plugin.loss.states import ContinuationTable
from dwakd_plugin.loss.terms.rows_cpu import BLOCK, Array, array, by_rows, exponentials, jit

# Of the teacher, no fewer where there are more: in float32 32 MiB. Smaller ones stay on malloc's
# heap when they are let go, which then grows.
LOGITS_AT_ONCE = 2**23
CE, MAPPED_CE, DIVERGENCE, ENTROPY, GATE, BEST = range(6)


def mapped_probabilities(
    teacher_logits: Callable[[int, int], Tensor],
    token_map: Tensor,
    read: Tensor,
    continuations: ContinuationTable | None,
    found: Tensor,
) -> tuple[Tensor, Tensor]:
    """p_map (C, Vs) in the place of `found`, and the mass that it is a share of (C,).

    `teacher_logits` makes those of the tokens from one to another, in found's dtype, float32 or
    float64: of a part of the vocabulary at a time. What was summed before is scaled down where a
    larger one is met. The other shapes as `mapped.mapped_statistics` has them. Sums over a
    student's token go in the order of the teacher's tokens.
    """
    vocabulary = len(token_map)
    found.zero_()
    largest = found.new_full((len(found),), -math.inf)
    total = torch.zeros_like(largest)
    none = np.zeros(2, np.int64)
    behind = (none, none, none)
    if continuations is not None:
        tables = (continuations.starts, continuations.teacher_tokens, continuations.student_tokens)
        behind = tuple(map(array, tables))
    # Unsigned and half as wide: no place is counted from the end, and the map is read faster.
    places = array(token_map.clamp_min(0).to(torch.int32)).view(np.uint32)
    known = array((token_map >= 0).to(found.dtype))
    sums: list[Any] = [each.numpy() for each in (largest, total, found)]
    parts = min(max(1, len(found) * vocabulary // LOGITS_AT_ONCE), vocabulary)
    ends = [vocabulary * part // parts for part in range(parts + 1)]
    for start, end in pairwise(ends):
        logits = teacher_logits(start, end)
        tokens = array(logits.amax(-1)), places[start:end], known[start:end], array(read), *behind
        by_rows(partial(_map, *sums, array(logits), *tokens, start), logits)
        del logits  # before more of their size are made
    mass = torch.empty_like(total)
    by_rows(partial(_share, total.numpy(), found.numpy(), mass.numpy()), found)
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
    largest: Array,
    total: Array,
    found: Array,
    logits: Array,
    largest_now: Array,
    token_map: Array,
    known: Array,
    read: Array,
    starts: Array,
    teacher_tokens: Array,
    student_tokens: Array,
    begin: int,
    first: int,
    last: int,
) -> None:
    """Adds the teacher's tokens from `begin` on to rows `first` to `last` of the sums.

    A row's sums are of exp(logit − largest), over all tokens in `total`, by the student's in
    `found`.
    """
    real = logits.dtype.type
    log2e, zero = real(math.log2(math.e)), real(0)
    vocabulary, rows = logits.shape[1], found.shape[1]
    block = np.empty(BLOCK, logits.dtype)
    for i in range(first, last):
        if largest_now[i] == -np.inf:  # nothing of the row is in this part
            continue
        row, sums = logits[i], found[i]
        if not largest_now[i] <= largest[i]:
            if begin > 0:
                share = np.exp(largest[i] - largest_now[i])
                total[i] *= share
                for s in range(rows):
                    sums[s] *= share
            largest[i] = largest_now[i]
        top, added = largest[i], zero
        for start in range(0, vocabulary, BLOCK):
            some, places = row[start : start + BLOCK], token_map[start : start + BLOCK]
            kept = known[start : start + BLOCK]
            exponentials(some, top, log2e, block)
            part = zero
            for k in range(len(some)):
                part += block[k]
            added += part
            if read[i] == 0:
                for k in range(len(some)):
                    block[k] *= kept[k]
                for k in range(len(some)):
                    sums[places[k]] += block[k]
        total[i] += added
        if read[i] > 0:
            for entry in range(starts[read[i]], starts[read[i] + 1]):
                token = teacher_tokens[entry] - begin
                if 0 <= token < vocabulary:
                    exponentials(row[token : token + 1], top, log2e, block)
                    sums[student_tokens[entry]] += block[0]


@jit
def _share(total: Array, found: Array, mass: Array, first: int, last: int) -> None:
    """Rows `first` to `last` of the sums as shares of what they add up to."""
    zero = found.dtype.type(0)
    for i in range(first, last):
        kept = zero
        for s in range(found.shape[1]):
            kept += found[i, s]
        mass[i] = kept / total[i]
        share = found.dtype.type(1) / kept if kept != zero else zero
        for s in range(found.shape[1]):
            found[i, s] *= share


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
