"""Soft-DTW on the CPU, compiled by numba; float32 and float64, one thread per sample.

The recurrence runs on Z = exp(−R/γ), where softmin is a plain sum,

    Z_ij = exp(−cost_ij/γ) · (Z_{i−1,j−1} + Z_{i−1,j} + Z_{i,j−1}),   Z_00 = 1, other borders 0,

with Z held as mantissa · 2^exponent (both floats, the exponent a whole number), so that a cell
needs no log, and nothing under- or overflows at a small γ. The shares of the three terms in the sum
are the softmin weights, by which `gradient` sends the expected alignment back from (n, m) to
(1, 1).

A matrix is cut into strips of LANES rows. In a strip, lane l works on column t − l at step t: the
cells of one step lie on an anti-diagonal, are independent and fill the SIMD lanes. Arrays in this
layout are called skewed, (steps, LANES). `value` keeps the last row of every strip, the edges, and
`gradient` recomputes each strip from the edge above it. So the scratch is one strip per thread
and edges of 2/LANES of the cost's size.

Legend: b sample, i row, j column, t step, l lane; h ≤ LANES rows in the strip, m columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

from dwakd_plugin.loss.soft_dtw.llvm import (
    SIDE,
    exponent_of,
    fma,
    mantissa_of,
    of_order,
    order_of_size,
    power_of_fraction,
    power_of_whole,
    transpose,
)
from dwakd_plugin.loss.threads import in_threads

LANES = 32  # a multiple of SIDE
CELLS_PER_THREAD = 50_000  # about what is worth starting a thread for, 0.1 ms

# The exponent of zero: so low that adding any cell's exponent leaves it as it is. With any mantissa
# it counts as zero, so the kernel needs no branch and meets no 0/0.
NOTHING = -1e30

Array = Any  # numba reads no annotations; numpy's would not say the shape either
F = TypeVar("F", bound=Callable[..., Any])


def value(cost: Tensor, n: Tensor, m: Tensor, gamma: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values (B,); state: the edges (B, 2, strips + 1, T + 1), and the samples done in float64."""
    samples, s, t = cost.shape
    scaling = _scaling(cost.dtype, gamma)
    edges = cost.new_empty(samples, 2, -(-s // LANES) + 1, t + 1)
    costs, edges_, n_, m_ = _array(cost), edges.numpy(), n.tolist(), m.tolist()

    def one(b: int) -> tuple[float, float]:
        if not (n_[b] and m_[b]):
            return 0.0, 0.0
        z, e, largest = _value(costs[b], n_[b], m_[b], *scaling, edges_[b])
        if math.isnan(largest) or e == math.inf:  # a NaN, or a cost of −∞
            return math.nan, 0.0
        log2 = -math.inf if e < NOTHING / 2 else math.log2(z) + e
        return -gamma * math.log(2) * log2, largest

    values, largest = cost.new_tensor(
        in_threads(one, samples, cost.numel() / CELLS_PER_THREAD), dtype=torch.float64
    ).T
    # Where the exponents may outgrow the whole numbers of float32, float64 has them.
    bound = (n + m) * (largest / (gamma * math.log(2)) + 2)
    wide = ((bound > 2**23) & (cost.dtype == torch.float32)).nonzero()[:, 0]
    if len(wide):
        values[wide] = value(cost[wide].double(), n[wide], m[wide], gamma)[0]
    return values.to(cost.dtype), (edges, wide)


def gradient(
    cost: Tensor, n: Tensor, m: Tensor, gamma: float, state: Sequence[Tensor], seed: Tensor
) -> Tensor:
    """seed · E (B, S, T)."""
    edges, wide = state
    grad, samples = torch.empty_like(cost, memory_format=torch.contiguous_format), len(cost)
    scaling = _scaling(cost.dtype, gamma)
    costs, seeds, edges_, grads = _array(cost), _array(seed), edges.numpy(), grad.numpy()
    n_, m_ = n.tolist(), m.tolist()

    def one(b: int) -> None:
        tiny = abs(seeds[b]) * seeds.dtype.type(1e-20)
        _gradient(costs[b], n_[b], m_[b], *scaling, edges_[b], seeds[b], tiny, grads[b])

    in_threads(one, samples, cost.numel() / CELLS_PER_THREAD)
    if len(wide):
        again = cost[wide].double(), n[wide], m[wide], gamma
        grad[wide] = gradient(*again, value(*again)[1], seed[wide].double()).to(cost.dtype)
    return grad


def _array(tensor: Tensor) -> Array:
    return tensor.detach().contiguous().numpy()


def _scaling(dtype: torch.dtype, gamma: float) -> tuple[Any, Any, Any]:
    """The kernel's constants: the factor of x = −cost · log2(e)/γ in two parts, and a barred cost.

    The factor is split in two, so that x is known beyond the dtype's own precision: at γ = 0.01 a
    cost of 2 has x = −289, and float32 would leave only 15 bits to its fraction.
    """
    real = np.float32 if dtype == torch.float32 else np.float64
    factor = -math.log2(math.e) / gamma
    high = real(factor)
    return high, real(factor - float(high)), real(min(-NOTHING * gamma, 1e38))


# ---- The kernel. A loop over lanes writes one scratch array and few others, and reads the lane
# ---- before it through a local variable: only so does the compiler turn it into SIMD.

_jit: Callable[[F], F] = numba.njit(
    cache=True, nogil=True, fastmath={"contract"}, error_model="numpy"
)

# Rows of the scratch arrays (·, LANES).
Z, E, DIAGONAL_Z, DIAGONAL_E = range(4)
LEFT, UP, DIAGONAL = range(3)


@_jit
def _largest_size(cost: Array, i0: int, h: int, m: int) -> int:
    """The largest `order_of_size` in rows i0 .. i0 + h of cost (S, T)."""
    largest: int = order_of_size(cost[i0, 0])
    for l in range(h):
        row = cost[i0 + l]
        for j in range(m):
            largest = max(largest, order_of_size(row[j]))
    return largest


@_jit
def _whole_blocks(l0: int, h: int, m: int) -> int:
    """Blocks of SIDE steps that lanes l0 .. l0 + SIDE fill, from step l0 + SIDE − 1 on."""
    return (m - SIDE + 1) // SIDE if l0 + SIDE <= h and m >= SIDE else 0


@_jit
def _skew(cost: Array, i0: int, h: int, m: int, barred: float, skewed: Array) -> None:
    """Rows i0 .. i0 + h of cost (S, T) into `skewed`."""
    # Left of the matrix there is nothing. To its right and below, any finite cost will do, as no
    # cell within the lengths comes after those.
    skewed[m:] = 0
    for t in range(h - 1):
        skewed[t, t + 1 :] = barred
    if h < LANES:  # 631 empty slices take a third of the time of a strip of 600 columns
        skewed[:, h:] = 0
    T = cost.shape[1]
    for l0 in range(0, h, SIDE):
        blocks = _whole_blocks(l0, h, m)
        for t in range(l0 + SIDE - 1, l0 + SIDE - 1 + blocks * SIDE, SIDE):
            at = (i0 + l0) * T + t - l0
            transpose(cost, at, T - 1, skewed, t * LANES + l0, LANES, barred)
        for l in range(l0, min(l0 + SIDE, h)):  # what the blocks leave on both sides
            row, lane = cost[i0 + l], skewed[l:, l]
            begin = l0 + SIDE - 1 - l if blocks else m
            for start, stop in ((0, begin), (begin + blocks * SIDE, m)):
                for j in range(start, stop):
                    lane[j] = barred if row[j] >= barred else row[j]


@_jit
def _unskew(mirrored: Array, i0: int, h: int, m: int, matrix: Array) -> None:
    """Skewed and mirrored (lane l at [LANES − 1 − l]) into rows i0 .. i0 + h of matrix (S, T)."""
    T, step = matrix.shape[1], mirrored.shape[1]
    endless = matrix.dtype.type(np.inf)
    for l0 in range(0, h, SIDE):
        blocks, last = _whole_blocks(l0, h, m), l0 + SIDE - 1
        for t in range(last, last + blocks * SIDE, SIDE):
            at = t * step + LANES - 1 - last
            transpose(mirrored, at, step, matrix, (i0 + last) * T + t - last, 1 - T, endless)
        for l in range(l0, min(l0 + SIDE, h)):
            row, lane = matrix[i0 + l], mirrored[l:, LANES - 1 - l]
            begin = last - l if blocks else m
            for start, stop in ((0, begin), (begin + blocks * SIDE, m)):
                for j in range(start, stop):
                    row[j] = lane[j]


@_jit
def _descend(
    skewed: Array,
    h: int,
    m: int,
    high: float,
    low: float,
    above: Array,
    above_e: Array,
    below: Array,
    below_e: Array,
    weights: Array,
) -> tuple[float, float]:
    """Z along a strip, from the edge above it to its last row, the edge below.

    Edges (T + 1,), mantissa and exponent: [j + 1] is column j, [0] is what lies left of column 0.
    The softmin weights go to `weights` (steps, 2 · LANES) unless that is None: those of the left
    neighbour and then those of the upper one, skewed, and mirrored, so lane l at [LANES − 1 − l].

    Gives mantissa and exponent of the strip's last cell, (h − 1, m − 1).
    """
    lanes = np.empty((4, LANES), skewed.dtype)
    for l in range(LANES):
        lanes[Z, l], lanes[E, l] = 1, NOTHING
        lanes[DIAGONAL_Z, l], lanes[DIAGONAL_E, l] = 1, NOTHING
    lanes[DIAGONAL_Z, 0], lanes[DIAGONAL_E, 0] = above[0], above_e[0]
    below[0], below_e[0] = 1, NOTHING
    for t in range(m + h - 1):
        up_z, up_e = above[min(t, m - 1) + 1], above_e[min(t, m - 1) + 1]
        for l in range(LANES):
            c = skewed[t, l]
            whole = np.rint(c * high)
            fraction = fma(c, high, -whole) + c * low
            left_z, left_e = lanes[Z, l], lanes[E, l]
            diagonal_z, diagonal_e = lanes[DIAGONAL_Z, l], lanes[DIAGONAL_E, l]
            top = max(max(left_e, up_e), diagonal_e)
            left = left_z * power_of_whole(left_e - top)
            up = up_z * power_of_whole(up_e - top)
            total = left + up + diagonal_z * power_of_whole(diagonal_e - top)
            here = power_of_fraction(fraction) * total
            lanes[DIAGONAL_Z, l], lanes[DIAGONAL_E, l] = up_z, up_e
            lanes[Z, l], lanes[E, l] = mantissa_of(here), top + exponent_of(here) + whole
            up_z, up_e = left_z, left_e
            if weights is not None:
                weights[t, LANES - 1 - l] = left / total
                weights[t, 2 * LANES - 1 - l] = up / total
        if t >= LANES - 1:
            below[t - LANES + 2] = lanes[Z, LANES - 1]
            below_e[t - LANES + 2] = lanes[E, LANES - 1]
    return lanes[Z, h - 1], lanes[E, h - 1]


@_jit
def _ascend(
    weights: Array, h: int, m: int, seed: float, tiny: float, edge: Array, steps: Array
) -> None:
    """The expected alignment along a strip, in place of the left half of `weights`.

    edge (T,) is what the row below the strip sends up, by the column that gets it; it becomes
    what the strip's first row sends up. `seed` is added to the strip's last cell, (h − 1, m − 1).
    Masses below `tiny` are dropped, again for the sake of speed. steps is m + h − 2, …, 1, 0.
    """
    lanes = np.empty((3, LANES), weights.dtype)
    for l in range(LANES):
        lanes[LEFT, l], lanes[UP, l], lanes[DIAGONAL, l] = 0, 0, 0
    zero = lanes[LEFT, 0]  # of its type: a literal would make float32 code float64
    lanes[LEFT, LANES - h] = seed
    for t in steps:
        sent = edge[t - LANES + 1] if t >= LANES - 1 else zero
        for l in range(LANES):
            sends = lanes[UP, l]  # at the last step
            here = lanes[LEFT, l] + sent
            here = zero if abs(here) < tiny else here  # this way round, a NaN stays
            left = weights[t, l] * here
            up = weights[t, LANES + l] * here
            weights[t, l] = here
            lanes[LEFT, l] = left
            lanes[UP, l] = up + lanes[DIAGONAL, l]
            lanes[DIAGONAL, l] = here - left - up
            sent = sends
        if t < m:
            edge[t] = lanes[UP, LANES - 1]


@_jit
def _value(
    cost: Array, n: int, m: int, high: float, low: float, barred: float, edges: Array
) -> tuple[float, float, float]:
    """Mantissa and exponent of Z_nm, and the largest finite |cost|, NaN where there is one."""
    skewed = np.empty((m + LANES - 1, LANES), cost.dtype)
    edges[0, 0], edges[1, 0] = 1, NOTHING
    edges[1, 0, 0] = 0  # Z_00 = 1
    z, e, largest = barred, barred, order_of_size(barred - barred)
    for strip in range((n + LANES - 1) // LANES):
        h = min(LANES, n - strip * LANES)
        largest = max(largest, _largest_size(cost, strip * LANES, h, m))
        _skew(cost, strip * LANES, h, m, barred, skewed)
        above, above_e = edges[0, strip], edges[1, strip]
        below, below_e = edges[0, strip + 1], edges[1, strip + 1]
        z, e = _descend(skewed, h, m, high, low, above, above_e, below, below_e, None)
    return z, e, of_order(largest, barred)


@_jit
def _gradient(
    cost: Array,
    n: int,
    m: int,
    high: float,
    low: float,
    barred: float,
    edges: Array,
    seed: float,
    tiny: float,
    grad: Array,
) -> None:
    """seed · E into grad (S, T), zero outside the lengths."""
    if n == 0 or m == 0:
        n, m = 0, 0
    grad[:n, m:] = 0
    grad[n:] = 0
    skewed = np.empty((m + LANES - 1, LANES), cost.dtype)
    weights = np.empty((m + LANES - 1, 2 * LANES), cost.dtype)
    edge = np.zeros(m, cost.dtype)
    # The steps backwards as an array, for what the compiler makes of `_ascend`: it would test once,
    # for all steps of a loop, that no two arrays overlap, a test that only forward loops can pass.
    steps = np.arange(m + LANES - 2, -1, -1)
    for strip in range((n + LANES - 1) // LANES - 1, -1, -1):
        h = min(LANES, n - strip * LANES)
        _skew(cost, strip * LANES, h, m, barred, skewed)
        above, above_e = edges[0, strip], edges[1, strip]
        below, below_e = edges[0, strip + 1], edges[1, strip + 1]
        _descend(skewed, h, m, high, low, above, above_e, below, below_e, weights)
        _ascend(weights, h, m, seed, tiny, edge, steps[LANES - h :])
        seed = barred - barred  # the seed enters at the last strip only
        _unskew(weights, strip * LANES, h, m, grad)
