"""What soft-DTW takes, tensor by tensor as `loss.terms.warp` and its kernels make them.

    B samples   S, T response tokens   d, D widths   four bytes a number

Both pairs are at work at once, and of each: the teacher's side in the student's space (T, d); unit
vectors and their gradients (S + T, d); of the band the cells inside, a byte each, and the penalty
(S, T). For backward, the gradients stay, and what the two projectors have read (T, D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dwakd_plugin.loss.soft_dtw import in_one_launch
from dwakd_plugin.loss.soft_dtw.layout import (
    ELEMENTS_AT_ONCE,
    MOST_LANES,
    Skewed,
    lanes_for,
    serial_steps,
)

PAIRS, FLOAT = 2, 4
CPU_LANES = 32  # of loss/soft_dtw/cpu.py, whose import brings numba

Shape = tuple[int, int, int]  # (samples, rows, columns) of a batch of costs


def shapes(B: int, S: int, T: int) -> list[Shape]:
    """The costs of both pairs: between x and y, and of each with itself."""
    return PAIRS * [(B, S, T), (B, S, S), (B, T, T)]


def soft_dtw_bytes(
    kind: str, B: int, S: int, T: int, d: int, D: int, *, band: bool
) -> tuple[float, float, float]:
    """At work; left for backward; and at work in backward, where the gradients come twice."""
    gradients = PAIRS * B * (S + T) * d
    projected, read = PAIRS * B * T * d, PAIRS * B * T * D
    penalty = B * S * T * (1 + 1 / FLOAT) if band else 0.0
    at_work = projected + 2 * gradients + penalty + matrices(shapes(B, S, T), kind)
    return FLOAT * at_work, FLOAT * (gradients + read), FLOAT * (2 * gradients + read)


def matrices(costs: Sequence[Shape], kind: str) -> float:
    """Costs, alignments and the kernel's scratch at most: the alignments of one launch live until
    those of the next are there."""
    highest, before = 0.0, 0
    for numbers in in_one_launch(costs, torch.device(kind)):
        some = [costs[number] for number in numbers]
        highest = max(highest, before + (_on_cuda(some) if kind == "cuda" else _on_cpu(some)))
        before = sum(map(_cells, some))
    return highest


def _cells(shape: Shape) -> int:
    samples, rows, columns = shape
    return samples * rows * columns


def _on_cpu(some: Sequence[Shape]) -> int:
    """The costs; for each its alignment, and two numbers for each column of a strip's edge."""
    edges = (2 * b * (-(-rows // CPU_LANES) + 1) * (columns + 1) for b, rows, columns in some)
    return sum(2 * _cells(shape) + edge for shape, edge in zip(some, edges, strict=True))


def _on_cuda(some: Sequence[Shape]) -> float:
    """Costs, and the same skewed, of which the alignments are made in place; and at most of
    - the skewing of a matrix: it padded, and then cut,
    - the kernel: two weights for each skewed number, or where these are many a strip each; edges,
    - the way back: the alignments, one of them skewed back and padded, and which cells are inside.
    """
    lanes = lanes_for(max(rows for _, rows, _ in some))
    places = [Skewed(*shape, min(lanes, MOST_LANES)) for shape in some]
    cells, skewed = sum(map(_cells, some)), sum(place.elements for place in places)
    largest = max(place.elements for place in places)
    kept = skewed <= ELEMENTS_AT_ONCE
    room = skewed if kept else sum(place.samples * place.strip_elements for place in places)
    edges = sum(place.samples * place.strips * place.columns for place in places)
    back = cells + max(2 * largest, max(map(_cells, some)) / FLOAT)
    return cells + skewed + max(2 * largest, 2 * (room + edges), back)


def serial_seconds(B: int, S: int, T: int, step: float) -> float:
    """Of all launches on a GPU, by the steps of each one's longest matrix, of so many seconds."""
    costs = shapes(B, S, T)
    return step * sum(
        max(serial_steps(rows, columns, b) for b, rows, columns in map(costs.__getitem__, numbers))
        for numbers in in_one_launch(costs, torch.device("cuda"))
    )
