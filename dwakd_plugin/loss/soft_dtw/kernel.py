"""The Triton kernel of soft-DTW: one program a matrix, one lane a row of its strip.

The recurrence, its mantissas and exponents are those of `cpu`, where they are explained; the skewed
layout is `layout`'s. A lane's state stays in registers and reaches the next lane by `tl.gather`. At
each step the cost of the next one is asked for before this one is computed.

Legend: j column, t step; n rows and m columns of the sample; W lanes of a strip that have a row of
the matrix, h ≤ W those that have one of the sample.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton reads the annotations of a kernel, so that only its own may stand there.)

from __future__ import annotations

import triton
import triton.language as tl

# The exponent of zero, and what a barred cell adds to one; no exponent falls below it. Those of
# paths have to stay above half of it: (n + m) · (|cost| · log2(e)/γ + 2) is less than its size / 2.
NOTHING_32 = tl.constexpr(-(2**29))
NOTHING_64 = tl.constexpr(-(2**40))


@triton.jit
def _power_of_whole(x, like):
    """2^x in the dtype of `like`, for a whole x ≤ 0."""
    if like.dtype == tl.float64:
        return ((tl.maximum(x, -1023).to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((tl.maximum(x, -127).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    """Mantissa in [1, 2) and exponent of x > 0."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
        exponent = (((bits >> 52) & 0x7FF) - 1023).to(tl.int32)
    else:
        bits = x.to(tl.int32, bitcast=True)
        mantissa = ((bits & 0x7FFFFF) | (127 << 23)).to(tl.float32, bitcast=True)
        exponent = ((bits >> 23) & 0xFF) - 127
    return mantissa, exponent


@triton.jit
def _of_lane_above(z, e, lane):
    """z and e of the lane before; the first has its own. One exchange where both fit a word."""
    above = tl.maximum(lane - 1, 0)
    if z.dtype == tl.float32 and e.dtype == tl.int32:
        bits = z.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        both = tl.gather((e.to(tl.int64) << 32) | bits, above, 0)
        return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32)
    else:
        return tl.gather(z, above, 0), tl.gather(e, above, 0)


@triton.jit
def _descend(
    cost,
    edges,
    edges_e,
    left_weights,
    up_weights,
    strip,
    W,
    n,
    m,
    T,
    high,
    middle,
    low,
    LANES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Z along a strip; its last row to the edges, the softmin weights to memory if KEEP.

    Gives mantissa, exponent and "a NaN was read" of each lane's last cell (LANES,).
    """
    real = cost.dtype.element_ty
    whole_type = edges_e.dtype.element_ty
    NOTHING: tl.constexpr = NOTHING_32 if whole_type == tl.int32 else NOTHING_64
    lane = tl.arange(0, LANES)
    h = tl.minimum(W, n - strip * W)
    z = tl.full([LANES], 1.0, real)
    e = tl.full([LANES], NOTHING, whole_type)
    diagonal_z = z
    diagonal_e = tl.where((lane == 0) & (strip == 0), 0, e)  # Z_00 = 1
    nan = lane < 0
    above = (strip - 1) * T
    next_c = tl.load(cost + lane, mask=(lane == 0) & (m > 0) & (h > 0), other=0.0)
    next_z = tl.load(edges + above, mask=strip > 0, other=1.0)
    next_e = tl.load(edges_e + above, mask=strip > 0, other=NOTHING)
    for t in range(m + h - 1):
        c, first_z, first_e = next_c, next_z, next_e
        j = t - lane
        inside = (j + 1 >= 0) & (j + 1 < m) & (lane < h)
        next_c = tl.load(cost + (t + 1) * W + lane, mask=inside, other=0.0)
        next_z = tl.load(edges + above + t + 1, mask=(strip > 0) & (t + 1 < m), other=1.0)
        next_e = tl.load(edges_e + above + t + 1, mask=(strip > 0) & (t + 1 < m), other=NOTHING)
        nan = nan | (c != c) | (c == float("-inf"))
        # 2^x for x = −cost · log2(e)/γ; the fraction of x is known beyond x's own precision.
        x = c * high
        barred = (x < NOTHING) | (j < 0)
        x = tl.where(barred, 0.0, x)
        whole = tl.floor(x + 0.5)
        fraction = tl.fma(c, tl.zeros_like(c) + high, -whole) + c * middle + c * low
        power = tl.exp2(tl.where(barred, 0.0, fraction))
        whole_e = tl.where(barred, NOTHING, whole.to(whole_type))
        # The lane above; for the first, the strip above.
        up_z, up_e = _of_lane_above(z, e, lane)
        up_z = tl.where(lane == 0, first_z, up_z)
        up_e = tl.where(lane == 0, first_e, up_e)
        top = tl.maximum(tl.maximum(e, up_e), diagonal_e)
        left = z * _power_of_whole(e - top, z)
        up = up_z * _power_of_whole(up_e - top, z)
        total = left + up + diagonal_z * _power_of_whole(diagonal_e - top, z)
        if KEEP:
            tl.store(left_weights + t * W + lane, left / total, mask=lane < W)
            tl.store(up_weights + t * W + lane, up / total, mask=lane < W)
        diagonal_z = up_z
        diagonal_e = up_e
        z, exponent = _split(power * total)
        e = tl.maximum(top + whole_e + exponent, NOTHING)
        last = (j >= 0) & (j < m) & (lane == LANES - 1) & (h == LANES)
        tl.store(edges + strip * T + j, z, mask=last)
        tl.store(edges_e + strip * T + j, e, mask=last)
    return z, e, nan


@triton.jit
def _ascend(path, left_weights, up_weights, seed, edge, strip, W, n, m, LANES: tl.constexpr):
    """The expected alignment along a strip into path; edge (T,) is what a strip sends up."""
    lane = tl.arange(0, LANES)
    h = tl.minimum(W, n - strip * W)
    last = m + h - 2
    zero = tl.zeros([LANES], path.dtype.element_ty)
    up = zero
    diagonal = zero
    left = zero + tl.where(lane == h - 1, seed, 0.0)
    real = lane < W
    lowest = lane == LANES - 1
    next_left = tl.load(left_weights + last * W + lane, mask=real, other=0.0)
    next_up = tl.load(up_weights + last * W + lane, mask=real, other=0.0)
    column = last - lane
    next_below = tl.load(edge + column, mask=lowest & (column >= 0) & (column < m), other=0.0)
    for back in range(m + h - 1):
        t = last - back
        j = t - lane
        left_weight, up_weight, below = next_left, next_up, next_below
        before = (t - 1) * W + lane
        next_left = tl.load(left_weights + before, mask=real & (t > 0), other=0.0)
        next_up = tl.load(up_weights + before, mask=real & (t > 0), other=0.0)
        next_below = tl.load(edge + j - 1, mask=lowest & (j >= 1) & (j - 1 < m), other=0.0)
        sent = tl.where(lowest, below, tl.gather(up, tl.minimum(lane + 1, LANES - 1), 0))
        here = left + sent
        tl.store(path + t * W + lane, here, mask=(j >= 0) & (j < m) & (lane < h))
        left = left_weight * here
        goes_up = up_weight * here
        up = goes_up + diagonal
        diagonal = here - left - goes_up
        tl.store(edge + j, up, mask=(lane == 0) & (j < m))


@triton.jit
def soft_dtw_kernel(
    cost,
    table,
    n,
    m,
    seed,
    values,
    edges,
    edges_e,
    below,
    left_weights,
    up_weights,
    high,
    middle,
    low,
    LANES: tl.constexpr,
    PATH: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Value, and where PATH seed · expected alignment in the place of the cost, of each matrix.

    table (matrices, 6) long: where a matrix begins in cost, in the weights and in edges, and in
    `below`; its rows and columns. KEPT: the weights have room for all strips; else for one.
    `below` holds zeros.
    """
    p = tl.program_id(0).to(tl.int64)
    cost += tl.load(table + p * 6)
    left_weights += tl.load(table + p * 6 + 1)
    up_weights += tl.load(table + p * 6 + 1)
    edges += tl.load(table + p * 6 + 2)
    edges_e += tl.load(table + p * 6 + 2)
    below += tl.load(table + p * 6 + 3)
    W = tl.minimum(tl.load(table + p * 6 + 4), LANES).to(tl.int32)
    T = tl.load(table + p * 6 + 5).to(tl.int32)
    n_p = tl.load(n + p).to(tl.int32)
    m_p = tl.load(m + p).to(tl.int32)
    strips = tl.where(m_p > 0, tl.cdiv(n_p, W), 0)
    size = ((T + W - 1) * W).to(tl.int64)  # of a strip
    lane = tl.arange(0, LANES)
    whole_type = edges_e.dtype.element_ty
    NOTHING: tl.constexpr = NOTHING_32 if whole_type == tl.int32 else NOTHING_64
    z = tl.full([LANES], 1.0, cost.dtype.element_ty)
    e = tl.full([LANES], 0, whole_type)
    any_nan = lane < 0
    for strip in range(strips):
        place = strip * size
        z, e, nan = _descend(
            cost + place,
            edges,
            edges_e,
            left_weights + place,
            up_weights + place,
            strip,
            W,
            n_p,
            m_p,
            T,
            high,
            middle,
            low,
            LANES,
            PATH and KEPT,
        )
        any_nan = any_nan | nan
        tl.debug_barrier()  # the next strip reads the edge that another thread wrote
    end = lane == tl.maximum(n_p - 1, 0) % W
    log2 = tl.sum(tl.where(end, e, 0)).to(tl.float64) + tl.log2(tl.sum(tl.where(end, z, 0.0))).to(
        tl.float64
    )
    # log2 Z = R · factor
    factor = tl.zeros([], tl.float64) + high + middle + low
    result = tl.where(log2 < NOTHING // 2, float("inf"), log2 / factor)
    result = tl.where(tl.max(any_nan.to(tl.int32)) > 0, float("nan"), result)
    result = tl.where(strips > 0, result, 0.0)
    tl.store(values + p, result)
    if PATH:
        here = tl.load(seed + p)
        here = tl.where(result == float("inf"), 0.0, here)
        here = tl.where(result != result, float("nan"), here)
        for back in range(strips):
            strip = strips - 1 - back
            place = strip * size
            if KEPT:
                _ascend(
                    cost + place,
                    left_weights + place,
                    up_weights + place,
                    here,
                    below,
                    strip,
                    W,
                    n_p,
                    m_p,
                    LANES,
                )
            else:
                _descend(
                    cost + place,
                    edges,
                    edges_e,
                    left_weights,
                    up_weights,
                    strip,
                    W,
                    n_p,
                    m_p,
                    T,
                    high,
                    middle,
                    low,
                    LANES,
                    True,
                )
                _ascend(
                    cost + place, left_weights, up_weights, here, below, strip, W, n_p, m_p, LANES
                )
            here = here * 0.0  # the seed enters at the last strip only; a NaN stays
            tl.debug_barrier()
