"""Soft-DTW on the CPU, compiled by numba; float32 and float64, one thread per sample.

The recurrence runs on Z = exp(−R/γ), where softmin is a plain sum,

    Z_ij = exp(−cost_ij/γ) · (Z_{i−1,j−1} + Z_{i−1,j} + Z_{i,j−1}),   Z_00 = 1, other borders 0,

with Z held as a float · 2^exponent, so that a cell needs no log, and nothing under- or overflows at
a small γ. The shares of the three terms in the sum are the softmin weights, by which `gradient`
sends the expected alignment back from (n, m) to (1, 1).

A matrix is cut into strips of LANES rows. In a strip, lane l works on column t − l at step t: the
cells of one step lie on an anti-diagonal, are independent and fill the SIMD registers, in which
stays all that one step hands to the next. Arrays in this layout are called skewed, (steps, LANES).
`value` keeps the last row of every strip, the edges, and `gradient` recomputes each strip from the
edge above it. So the scratch is one strip per thread and edges of 2/LANES of the cost's size.

Legend: b sample, i row, j column, t step, l lane; h ≤ LANES rows in the strip, m columns; z, e the
two parts of Z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

from dwakd_plugin.loss.soft_dtw.lanes import (
    LANES,
    bits,
    exponents,
    from_lane_after,
    from_lane_before,
    lane,
    larger,
    load,
    mantissas,
    powers,
    spread,
    store,
    with_lane,
    without_tiny,
)
from dwakd_plugin.loss.soft_dtw.llvm import (
    SIDE,
    fma,
    of_order,
    order_of_size,
    power_of_fraction,
    transpose,
)
from dwakd_plugin.loss.threads import in_threads

CELLS_PER_THREAD = 50_000  # about what is worth starting a thread for, 0.1 ms

# Steps until z is brought back to [1, 2). In one it grows by a factor of 3·√2 at most, and shrinks
# by √2 at most, as one of the three terms counts in full. An edge has what so many steps have made
# of it, and on that come those of the strip below: still far from a float's end.
STEPS = 8  # fewer than LANES: nothing goes through a whole strip meanwhile

Array = Any  # numba reads no annotations; numpy's would not say the shape either
F = TypeVar("F", bound=Callable[..., Any])


def value(cost: Tensor, n: Tensor, m: Tensor, gamma: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values (B,); state: the edges z, e (B, strips + 1, T + 1), the samples done in float64."""
    samples, s, t = cost.shape
    scaling, most, narrow = _scaling(cost.dtype, gamma), *_exponents(cost.dtype)
    edges = samples, -(-s // LANES) + 1, t + 1
    edges_z = cost.new_empty(edges)
    edges_e = cost.new_empty(edges, dtype=narrow)
    costs, z_, e_, n_, m_ = _array(cost), edges_z.numpy(), edges_e.numpy(), n.tolist(), m.tolist()

    def one(b: int) -> tuple[float, bool]:
        """Its value, and whether it needs more room for its exponents than there is."""
        if not (n_[b] and m_[b]):
            return 0.0, False
        z, e, largest = _value(costs[b], n_[b], m_[b], *scaling, z_[b], e_[b])
        if not math.isfinite(largest):  # a NaN, or a cost of −∞
            return math.nan, False
        reach = (n_[b] + m_[b]) * (largest / (gamma * math.log(2)) + 2)
        if abs(e) > most:
            value = math.inf if e < 0 else math.nan
        else:
            value = -gamma * math.log(2) * (math.log2(z) + e)
        return value, reach > 0.75 * most

    found = in_threads(one, samples, cost.numel() / CELLS_PER_THREAD)
    values = torch.tensor([its for its, _ in found], dtype=torch.float64)
    far = [b for b, (_, is_far) in enumerate(found) if is_far and cost.dtype == torch.float32]
    wide = torch.tensor(far, dtype=torch.int64)
    if len(wide):
        values[wide] = value(cost[wide].double(), n[wide], m[wide], gamma)[0]
    return values.to(cost.dtype), (edges_z, edges_e, wide)


def gradient(
    cost: Tensor, n: Tensor, m: Tensor, gamma: float, state: Sequence[Tensor], seed: Tensor
) -> Tensor:
    """seed · E (B, S, T)."""
    edges_z, edges_e, wide = state
    costs, seeds, z_, e_ = _array(cost), _array(seed), edges_z.numpy(), edges_e.numpy()
    # numpy asks for huge pages: in pages of 4 KiB, the system can take as long to hand out the
    # memory as the kernel to fill it.
    grads = np.empty(cost.shape, costs.dtype)
    scaling = _scaling(cost.dtype, gamma)
    n_, m_ = n.tolist(), m.tolist()

    def one(b: int) -> None:
        tiny = abs(seeds[b]) * seeds.dtype.type(1e-20)
        _gradient(costs[b], n_[b], m_[b], *scaling, z_[b], e_[b], seeds[b], tiny, grads[b])

    in_threads(one, len(cost), cost.numel() / CELLS_PER_THREAD)
    grad = torch.from_numpy(grads)
    if len(wide):
        again = cost[wide].double(), n[wide], m[wide], gamma
        grad[wide] = gradient(*again, value(*again)[1], seed[wide].double()).to(cost.dtype)
    return grad


def _array(tensor: Tensor) -> Array:
    return tensor.detach().contiguous().numpy()


def _exponents(dtype: torch.dtype) -> tuple[float, torch.dtype]:
    """The largest exponent, half of what bars a cell, and the type of exponents.

    A path below −that is barred, one above it has met −∞. float32 has no room for every path that
    is open; where one may go far, `value` takes float64.
    """
    return (2.0**21, torch.int32) if dtype == torch.float32 else (2.0**50, torch.int64)


def _scaling(dtype: torch.dtype, gamma: float) -> tuple[Any, Any, Any]:
    """The kernel's constants: the factor of x = −cost · log2(e)/γ in two parts, and a barred cost.

    The factor is split in two, so that x is known beyond the dtype's own precision: at γ = 0.01 a
    cost of 2 has x = −289, and float32 would leave only 15 bits to its fraction.
    """
    real = np.float32 if dtype == torch.float32 else np.float64
    factor = -math.log2(math.e) / gamma
    high = real(factor)
    barred = 2 * _exponents(dtype)[0] / -factor
    return high, real(factor - float(high)), real(min(barred, 1e38))


# ---- The kernel

_jit: Callable[[F], F] = numba.njit(
    cache=True, nogil=True, fastmath={"contract"}, error_model="numpy"
)


@_jit
def _nothing(exponents: Array) -> int:
    """The exponent of zero: so low that adding those of many cells leaves it low.

    With any float it counts as zero, so the kernel needs no branch and meets no 0/0.
    """
    return exponents.dtype.type(-(1 << (8 * exponents.itemsize - 2)))  # type: ignore[no-any-return]


@_jit
def _within(x: float, limit: float) -> float:
    """x, within ±limit; a NaN stays."""
    x = limit if x > limit else x
    return -limit if x < -limit else x


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
    if h < LANES:  # hundreds of empty slices would take a third of the time
        skewed[:, h:] = 0
    T = cost.shape[1]
    for l0 in range(0, h, SIDE):
        blocks = _whole_blocks(l0, h, m)
        for t in range(l0 + SIDE - 1, l0 + SIDE - 1 + blocks * SIDE, SIDE):
            at = (i0 + l0) * T + t - l0
            transpose(cost, at, T - 1, skewed, t * LANES + l0, LANES, barred)
        for l in range(l0, min(l0 + SIDE, h)):  # what the blocks leave on both sides
            row, column = cost[i0 + l], skewed[l:, l]
            begin = l0 + SIDE - 1 - l if blocks else m
            for start, stop in ((0, begin), (begin + blocks * SIDE, m)):
                for j in range(start, stop):
                    column[j] = _within(row[j], barred)


@_jit
def _unskew(skewed: Array, i0: int, h: int, m: int, matrix: Array) -> None:
    """The first LANES columns of `skewed` into rows i0 .. i0 + h of matrix (S, T)."""
    T, step = matrix.shape[1], skewed.shape[1]
    endless = matrix.dtype.type(np.inf)
    for l0 in range(0, h, SIDE):
        blocks = _whole_blocks(l0, h, m)
        for t in range(l0 + SIDE - 1, l0 + SIDE - 1 + blocks * SIDE, SIDE):
            to = (i0 + l0) * T + t - l0
            transpose(skewed, t * step + l0, step, matrix, to, T - 1, endless)
        for l in range(l0, min(l0 + SIDE, h)):
            row, column = matrix[i0 + l], skewed[l:, l]
            begin = l0 + SIDE - 1 - l if blocks else m
            for start, stop in ((0, begin), (begin + blocks * SIDE, m)):
                for j in range(start, stop):
                    row[j] = column[j]


@_jit
def _descend(
    skewed: Array,
    h: int,
    m: int,
    high: float,
    low: float,
    above_z: Array,
    above_e: Array,
    below_z: Array,
    below_e: Array,
    weights: Array,
) -> tuple[float, int]:
    """Z along a strip, from the edge above it to its last row, the edge below.

    Edges (T + 1,): [j + 1] is column j, [0] is what lies left of column 0. The softmin weights, of
    the left and of the upper neighbour, go to the halves of `weights` (steps, 2 · LANES), skewed,
    unless that is None.

    Gives both parts of the strip's last cell, (h − 1, m − 1).
    """
    one, nothing = skewed.dtype.type(1), _nothing(above_e)
    below_z[0], below_e[0] = one, nothing
    z, e = spread(one), spread(nothing)
    diagonal_z, diagonal_e = with_lane(z, 0, above_z[0]), with_lane(e, 0, above_e[0])
    lowest, highs, lows = e, spread(high), spread(low)
    # Adding this rounds to whole numbers, and moves them to the low bits.
    magic = spread(skewed.dtype.type(1.5 / np.finfo(skewed.dtype).eps))
    for t in range(m + h - 1):
        cost = load(skewed, t * LANES)
        shifted = fma(cost, highs, magic)
        fraction = fma(cost, lows, fma(cost, highs, magic - shifted))
        j = min(t, m - 1) + 1
        up_z, up_e = from_lane_before(z, above_z[j]), from_lane_before(e, above_e[j])
        top = larger(larger(up_e, diagonal_e), e)
        left = z * powers(e - top, z)
        up = up_z * powers(up_e - top, z)
        total = fma(diagonal_z, powers(diagonal_e - top, z), left + up)
        if weights is not None:
            store(weights, t * 2 * LANES, left / total)
            store(weights, t * 2 * LANES + LANES, up / total)
        diagonal_z, diagonal_e = up_z, up_e
        z = power_of_fraction(fraction) * total
        e = top + (bits(shifted) - bits(magic))
        if t % STEPS == 0:
            z, e = mantissas(z), larger(e + exponents(z), lowest)
        if t >= LANES - 1:
            below_z[t - LANES + 2], below_e[t - LANES + 2] = lane(z, LANES - 1), lane(e, LANES - 1)
    return lane(z, h - 1), lane(e, h - 1)


@_jit
def _ascend(weights: Array, h: int, m: int, seed: float, tiny: float, edge: Array) -> None:
    """The expected alignment along a strip, in place of the left half of `weights`.

    edge (T,) is what the row below the strip sends up, by the column that gets it; it becomes
    what the strip's first row sends up. `seed` is added to the strip's last cell, (h − 1, m − 1).
    Masses below `tiny` are dropped, again for the sake of speed.
    """
    nothing = weights.dtype.type(0)
    up = diagonal = spread(nothing)
    left, tinies = with_lane(up, h - 1, seed), spread(tiny)
    for t in range(m + h - 2, -1, -1):
        sent = edge[t - LANES + 1] if t >= LANES - 1 else nothing
        here = without_tiny(left + from_lane_after(up, sent), tinies)
        left = here * load(weights, t * 2 * LANES)
        to_above = here * load(weights, t * 2 * LANES + LANES)
        store(weights, t * 2 * LANES, here)
        up = to_above + diagonal  # what the lane above gets at its next step
        diagonal = here - left - to_above
        if t < m:
            edge[t] = lane(up, 0)


@_jit
def _value(
    cost: Array,
    n: int,
    m: int,
    high: float,
    low: float,
    barred: float,
    edges_z: Array,
    edges_e: Array,
) -> tuple[float, int, float]:
    """Both parts of Z_nm, and the largest finite |cost|: NaN or ∞ where there is a NaN or −∞."""
    skewed = np.empty((m + LANES - 1, LANES), cost.dtype)
    edges_z[0], edges_e[0] = 1, _nothing(edges_e)
    edges_e[0, 0] = 0  # Z_00 = 1
    z, e, largest = edges_z[0, 0], edges_e[0, 0], order_of_size(barred - barred)
    for strip in range((n + LANES - 1) // LANES):
        h = min(LANES, n - strip * LANES)
        largest = max(largest, _largest_size(cost, strip * LANES, h, m))
        _skew(cost, strip * LANES, h, m, barred, skewed)
        above, below = (edges_z[strip], edges_e[strip]), (edges_z[strip + 1], edges_e[strip + 1])
        z, e = _descend(skewed, h, m, high, low, *above, *below, None)
    return z, e, of_order(largest, barred)


@_jit
def _gradient(
    cost: Array,
    n: int,
    m: int,
    high: float,
    low: float,
    barred: float,
    edges_z: Array,
    edges_e: Array,
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
    for strip in range((n + LANES - 1) // LANES - 1, -1, -1):
        h = min(LANES, n - strip * LANES)
        _skew(cost, strip * LANES, h, m, barred, skewed)
        above, below = (edges_z[strip], edges_e[strip]), (edges_z[strip + 1], edges_e[strip + 1])
        _descend(skewed, h, m, high, low, *above, *below, weights)
        _ascend(weights, h, m, seed, tiny, edge)
        seed = barred - barred  # the seed enters at the last strip only
        _unskew(weights, strip * LANES, h, m, grad)
