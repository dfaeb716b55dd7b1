"""Soft-DTW on CUDA, in Triton: one program per sample, one launch for the batch.

The recurrence, its mantissas and exponents, the strips and the lanes are those of `cpu`, where they
are explained. Here a strip has as many rows as a warp has threads, and a lane's state stays in
registers and reaches the next lane by `tl.gather`; neither S nor T is limited. Exponents are int64:
to ask whether float32 would do is to wait for the device.

Legend: b sample, i row, j column, t step; h ≤ LANES rows in the strip, n rows and m columns.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton reads the annotations of a kernel, so that only its own may stand there.)

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 32

# The exponent of zero, and what a barred cell adds to one. Exponents of paths have to stay above
# half of it (n + m steps of cost/γ up to 4e11 in all), and the sums of (n + m) of them in int64.
NOTHING = tl.constexpr(-(2**40))


def value(cost: Tensor, n: Tensor, m: Tensor, gamma: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values (B,); state: the last rows of the strips, (B, strips, T) mantissas and exponents."""
    samples, s, t = cost.shape
    values = cost.new_empty(samples)
    shape = (samples, triton.cdiv(s, LANES), t)
    edges = cost.new_empty(shape), cost.new_empty(shape, dtype=torch.int64)
    with torch.cuda.device_of(cost):
        _value_kernel[(samples,)](
            cost.contiguous(), n, m, *edges, values, s, t, *_factor(gamma), LANES=LANES, num_warps=1
        )
    return values, edges


def gradient(
    cost: Tensor, n: Tensor, m: Tensor, gamma: float, state: Sequence[Tensor], seed: Tensor
) -> Tensor:
    """seed · E (B, S, T)."""
    samples, s, t = cost.shape
    grad = torch.zeros_like(cost, memory_format=torch.contiguous_format)
    weights = cost.new_empty(samples, t + LANES - 1, 2, LANES)
    edge = cost.new_zeros(samples, t)
    with torch.cuda.device_of(cost):
        _gradient_kernel[(samples,)](
            cost.contiguous(),
            n,
            m,
            *state,
            seed.contiguous(),
            weights,
            edge,
            grad,
            s,
            t,
            *_factor(gamma),
            LANES=LANES,
            num_warps=1,
        )
    return grad


def _factor(gamma: float) -> tuple[float, float, float]:
    """−log2(e)/γ as a sum of three float32, which is how Triton passes a number to a kernel."""
    rest = -math.log2(math.e) / gamma
    parts = []
    for _ in range(3):
        parts.append(float(np.float32(rest)))
        rest -= parts[-1]
    return parts[0], parts[1], parts[2]


@triton.jit
def _power_of_whole(x, like):
    """2^x in the dtype of `like`, for a whole x ≤ 0."""
    if like.dtype == tl.float64:
        return ((tl.maximum(x, -1023) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((tl.maximum(x, -127).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    """Mantissa in [1, 2) and exponent of x > 0."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
        exponent = ((bits >> 52) & 0x7FF) - 1023
    else:
        bits = x.to(tl.int32, bitcast=True)
        mantissa = ((bits & 0x7FFFFF) | (127 << 23)).to(tl.float32, bitcast=True)
        exponent = ((bits >> 23) & 0xFF) - 127
    return mantissa, exponent.to(tl.int64)


@triton.jit
def _descend(
    cost,
    edges,
    edges_e,
    weights,
    strip,
    n,
    m,
    T,
    high,
    middle,
    low,
    LANES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Z along a strip; its last row to the edges, the softmin weights to `weights` if KEEP.

    Gives mantissa, exponent and "a NaN was read" of each lane's last cell (LANES,).
    """
    real = cost.dtype.element_ty
    lane = tl.arange(0, LANES)
    h = tl.minimum(LANES, n - strip * LANES)
    z = tl.full([LANES], 1.0, real)
    e = tl.full([LANES], NOTHING, tl.int64)
    diagonal_z = z
    diagonal_e = tl.where((lane == 0) & (strip == 0), 0, e)  # Z_00 = 1
    nan = lane < 0
    row = cost + (strip * LANES + lane).to(tl.int64) * T
    above = (strip - 1) * T
    for t in range(m + h - 1):
        j = t - lane
        inside = (j >= 0) & (j < m) & (lane < h)
        c = tl.load(row + j, mask=inside, other=0.0)
        nan = nan | (c != c) | (c == float("-inf"))
        # 2^x for x = −cost · log2(e)/γ; the fraction of x is known beyond x's own precision.
        x = c * high
        barred = (x < NOTHING) | (j < 0)
        x = tl.where(barred, 0.0, x)
        whole = tl.floor(x + 0.5)
        fraction = tl.fma(c, tl.zeros_like(c) + high, -whole) + c * middle + c * low
        power = tl.exp2(tl.where(barred, 0.0, fraction))
        whole_e = tl.where(barred, NOTHING, whole.to(tl.int64))
        # The lane above; for the first, the strip above.
        first_z = tl.load(edges + above + t, mask=(strip > 0) & (t < m), other=1.0)
        first_e = tl.load(edges_e + above + t, mask=(strip > 0) & (t < m), other=NOTHING)
        up_z = tl.where(lane == 0, first_z, tl.gather(z, tl.maximum(lane - 1, 0), 0))
        up_e = tl.where(lane == 0, first_e, tl.gather(e, tl.maximum(lane - 1, 0), 0))
        top = tl.maximum(tl.maximum(e, up_e), diagonal_e)
        left = z * _power_of_whole(e - top, z)
        up = up_z * _power_of_whole(up_e - top, z)
        total = left + up + diagonal_z * _power_of_whole(diagonal_e - top, z)
        if KEEP:
            tl.store(weights + t * 2 * LANES + lane, left / total)
            tl.store(weights + (t * 2 + 1) * LANES + lane, up / total)
        diagonal_z = up_z
        diagonal_e = up_e
        z, exponent = _split(power * total)
        e = top + whole_e + exponent
        if not KEEP:
            last = inside & (lane == LANES - 1)
            tl.store(edges + strip * T + j, z, mask=last)
            tl.store(edges_e + strip * T + j, e, mask=last)
    return z, e, nan


@triton.jit
def _ascend(weights, seed, edge, grad, strip, n, m, T, LANES: tl.constexpr):
    """The expected alignment along a strip into grad; edge (T,) is what a strip sends up."""
    lane = tl.arange(0, LANES)
    h = tl.minimum(LANES, n - strip * LANES)
    zero = tl.zeros([LANES], weights.dtype.element_ty)
    up = zero
    diagonal = zero
    left = zero + tl.where(lane == h - 1, seed, 0.0)
    row = grad + (strip * LANES + lane).to(tl.int64) * T
    for back in range(m + h - 1):
        t = m + h - 2 - back
        j = t - lane
        below = tl.load(edge + j, mask=(lane == LANES - 1) & (j >= 0) & (j < m), other=0.0)
        sent = tl.where(lane == LANES - 1, below, tl.gather(up, tl.minimum(lane + 1, LANES - 1), 0))
        here = left + sent
        tl.store(row + j, here, mask=(j >= 0) & (j < m) & (lane < h))
        left = tl.load(weights + t * 2 * LANES + lane) * here
        goes_up = tl.load(weights + (t * 2 + 1) * LANES + lane) * here
        up = goes_up + diagonal
        diagonal = here - left - goes_up
        tl.store(edge + j, up, mask=(lane == 0) & (j < m))


@triton.jit
def _value_kernel(cost, n, m, edges, edges_e, values, S, T, high, middle, low, LANES: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n_b = tl.load(n + b).to(tl.int32)
    m_b = tl.load(m + b).to(tl.int32)
    edges += b * tl.cdiv(S, LANES) * T
    edges_e += b * tl.cdiv(S, LANES) * T
    lane = tl.arange(0, LANES)
    z = tl.full([LANES], 1.0, cost.dtype.element_ty)
    e = tl.full([LANES], 0, tl.int64)
    any_nan = lane < 0
    for strip in range(tl.cdiv(n_b, LANES)):
        z, e, nan = _descend(
            cost + b * S * T,
            edges,
            edges_e,
            edges,
            strip,
            n_b,
            m_b,
            T,
            high,
            middle,
            low,
            LANES,
            False,
        )
        any_nan = any_nan | nan
        tl.debug_barrier()  # the next strip reads the edge that another thread wrote
    end = lane == tl.maximum(n_b - 1, 0) % LANES
    log2 = tl.sum(tl.where(end, e, 0)).to(tl.float64) + tl.log2(tl.sum(tl.where(end, z, 0.0))).to(
        tl.float64
    )
    # log2 Z = R · factor
    factor = tl.zeros([], tl.float64) + high + middle + low
    result = tl.where(log2 < NOTHING // 2, float("inf"), log2 / factor)
    result = tl.where(tl.max(any_nan.to(tl.int32)) > 0, float("nan"), result)
    tl.store(values + b, tl.where((n_b > 0) & (m_b > 0), result, 0.0))


@triton.jit
def _gradient_kernel(
    cost,
    n,
    m,
    edges,
    edges_e,
    seed,
    weights,
    edge,
    grad,
    S,
    T,
    high,
    middle,
    low,
    LANES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n_b = tl.load(n + b).to(tl.int32)
    m_b = tl.load(m + b).to(tl.int32)
    edges += b * tl.cdiv(S, LANES) * T
    edges_e += b * tl.cdiv(S, LANES) * T
    weights += b * (T + LANES - 1) * 2 * LANES
    strips = tl.cdiv(n_b, LANES)
    for back in range(strips):
        strip = strips - 1 - back
        _descend(
            cost + b * S * T,
            edges,
            edges_e,
            weights,
            strip,
            n_b,
            m_b,
            T,
            high,
            middle,
            low,
            LANES,
            True,
        )
        here = tl.where(back == 0, tl.load(seed + b), 0.0)
        _ascend(weights, here, edge + b * T, grad + b * S * T, strip, n_b, m_b, T, LANES)
        tl.debug_barrier()  # the next strip reads the edge that another thread wrote
