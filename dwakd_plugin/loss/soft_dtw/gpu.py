"""Soft-DTW on CUDA: what one launch of the Triton kernel is given, and what comes back.

Several batches of matrices go through one launch, a program each, and value and gradient are found
in the same one. Exponents are 32 bits wide where the caller knows how large a cost can be, and
else 64: to ask the device would be to wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dwakd_plugin.loss.soft_dtw.kernel import NOTHING_32, soft_dtw_kernel
from dwakd_plugin.loss.soft_dtw.layout import ELEMENTS_AT_ONCE, MOST_LANES, WARP, Skewed, lanes_for

Job = tuple[Tensor, Tensor, Tensor]  # cost (B, S, T), and the lengths n and m (B,) long


def value(cost: Tensor, n: Tensor, m: Tensor, gamma: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values (B,); no state: `gradient` computes them again on its way."""
    return _launch([(cost, n, m)], gamma, None, None)[0][0], ()


def gradient(
    cost: Tensor, n: Tensor, m: Tensor, gamma: float, state: Sequence[Tensor], seed: Tensor
) -> Tensor:
    """seed · E (B, S, T)."""
    return _launch([(cost, n, m)], gamma, None, seed)[1][0]


def paths(jobs: Sequence[Job], gamma: float, largest: float | None) -> list[tuple[Tensor, Tensor]]:
    """Values (B,) and expected alignments (B, S, T) of each job, from one launch.

    All jobs are of one dtype. largest: no finite |cost| exceeds it; None where nobody knows.
    """
    seed = jobs[0][0].new_ones(sum(len(cost) for cost, _, _ in jobs))
    return list(zip(*_launch(jobs, gamma, largest, seed), strict=True))


def exponent_dtype(steps: int, largest: float | None, gamma: float) -> torch.dtype:
    """Of the exponents of paths of up to `steps` cells, none of which costs more than `largest`."""
    if largest is None:
        return torch.int64
    bits = steps * (largest * math.log2(math.e) / gamma + 2)
    return torch.int32 if bits < -NOTHING_32.value / 2 else torch.int64


def _launch(
    jobs: Sequence[Job], gamma: float, largest: float | None, seed: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Values, and with a seed for each matrix seed · E, of each job."""
    first = jobs[0][0]
    lanes = lanes_for(max(cost.shape[1] for cost, _, _ in jobs))
    if first.dtype == torch.float64:
        lanes = min(lanes, MOST_LANES // 2)  # more would have too few registers each
    places = [Skewed(len(cost), cost.shape[1], cost.shape[2], lanes) for cost, _, _ in jobs]
    sizes = [place.elements for place in places]
    flat = first.new_empty(sum(sizes))
    for place, (cost, _, _), part in zip(places, jobs, torch.split(flat, sizes), strict=True):
        place.skew(cost, part)
    n, m = (torch.cat(each) for each in list(zip(*jobs, strict=True))[1:])
    kept = flat.numel() <= ELEMENTS_AT_ONCE
    table, (room, edges, columns) = _table(places, kept)
    if seed is None:
        room, columns = 0, 0
    steps = max(sum(cost.shape[1:]) for cost, _, _ in jobs)
    wide = largest if first.dtype == torch.float32 else None
    values = first.new_empty(len(n))
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        soft_dtw_kernel[(len(n),)](
            flat,
            _to(first.device, table),
            n,
            m,
            values if seed is None else seed.contiguous(),
            values,
            first.new_empty(edges),
            first.new_empty(edges, dtype=exponent_dtype(steps, wide, gamma)),
            first.new_zeros(columns),
            *first.new_empty(2, room),
            *_factor(gamma),
            LANES=lanes,
            PATH=seed is not None,
            KEPT=kept,
            num_warps=lanes // WARP,
        )
    each_value = torch.split(values, [place.samples for place in places])
    if seed is None:
        return list(each_value), []
    found = []
    for place, (_, n, m), part in zip(places, jobs, torch.split(flat, sizes), strict=True):
        rows = torch.arange(place.rows, device=flat.device) < n[:, None]
        inside = torch.arange(place.columns, device=flat.device) < m[:, None]
        mask = rows[:, :, None] & inside[:, None, :]
        found.append(place.unskew(part).masked_fill_(~mask, 0.0))
    return list(each_value), found


def _table(places: Sequence[Skewed], kept: bool) -> tuple[list[list[int]], tuple[int, int, int]]:
    """The kernel's table, and how long weights, edges and `below` are."""
    rows: list[list[int]] = []
    cost, room, edges, columns = 0, 0, 0, 0
    for place in places:
        for _ in range(place.samples):
            rows.append([cost, room, edges, columns, place.rows, place.columns])
            cost += place.strips * place.strip_elements
            room += (place.strips if kept else 1) * place.strip_elements
            edges += place.strips * place.columns
            columns += place.columns
    return rows, (room, edges, columns)


def _to(device: torch.device, table: list[list[int]]) -> Tensor:
    """From pinned memory: otherwise the device is waited for."""
    pinned = device.type == "cuda"
    return torch.tensor(table, pin_memory=pinned).to(device, non_blocking=True)


def _factor(gamma: float) -> tuple[float, float, float]:
    """−log2(e)/γ as a sum of three float32, which is how Triton passes a number to a kernel."""
    rest = -math.log2(math.e) / gamma
    parts = []
    for _ in range(3):
        parts.append(float(np.float32(rest)))
        rest -= parts[-1]
    return parts[0], parts[1], parts[2]
