"""Soft-DTW in plain torch: one anti-diagonal at a time, in float64, on any device.

The fallback where neither numba nor triton runs, and an oracle for the two. It works with R itself
and a softmin in log space, unlike the kernels. A matrix is skewed, so that the cell (i, j) lies at
[i, i + j] and an anti-diagonal d is a column: shapes (B, S, S + T − 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def value(cost: Tensor, n: Tensor, m: Tensor, gamma: float) -> tuple[Tensor, tuple[Tensor]]:
    """Values (B,), and R skewed (B, S, S + T − 1) in float64 as the state of `gradient`."""
    skewed = _skew(torch.where(_inside(cost, n, m), cost, math.inf).double())
    skewed[skewed == -math.inf] = math.nan
    r = torch.empty_like(skewed)
    for d in range(skewed.shape[2]):
        r[:, :, d] = skewed[:, :, d] - gamma * _logsumexp(_predecessors(r, d) / -gamma)
    batch = torch.arange(len(cost), device=cost.device)
    end = r[batch, (n - 1).clamp(min=0), (n + m - 2).clamp(min=0)]
    return torch.where((n > 0) & (m > 0), end, 0.0).to(cost.dtype), (r,)


def gradient(
    cost: Tensor, n: Tensor, m: Tensor, gamma: float, state: Sequence[Tensor], seed: Tensor
) -> Tensor:
    """seed · E (B, S, T): the mass `seed`, put on the cell (n, m), flows back to (1, 1)."""
    (r,) = state
    rows = torch.arange(cost.shape[1], device=cost.device)
    mass = torch.zeros_like(r)
    for d in reversed(range(r.shape[2])):
        at_end = (rows == (n - 1)[:, None]) & ((n + m - 2)[:, None] == d)
        mass[:, :, d] += torch.where(at_end, seed[:, None].double(), 0.0)
        scaled = _predecessors(r, d) / -gamma
        total = _logsumexp(scaled)
        weights = torch.exp2((scaled - total) * math.log2(math.e))
        diagonal, up, left = weights.masked_fill(total == -math.inf, 0.0)
        here = mass[:, :, d]
        if d > 0:
            mass[:, :, d - 1] += left * here
            mass[:, :-1, d - 1] += (up * here)[:, 1:]
        if d > 1:
            mass[:, :-1, d - 2] += (diagonal * here)[:, 1:]
    expected = _unskew(mass, cost.shape[2])
    return torch.where(_inside(cost, n, m), expected, 0.0).to(cost.dtype)


def _inside(cost: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """(B, S, T) bool: the cells within the lengths."""
    rows = torch.arange(cost.shape[1], device=cost.device)
    columns = torch.arange(cost.shape[2], device=cost.device)
    return (rows < n[:, None])[:, :, None] & (columns < m[:, None])[:, None, :]


def _skew(matrix: Tensor) -> Tensor:
    """(B, S, T) -> (B, S, S + T − 1), row i shifted right by i, +inf where no cell lies."""
    b, s, t = matrix.shape
    wide = pad(matrix, (0, s), value=math.inf).reshape(b, s * (s + t))
    return wide[:, : s * (s + t - 1)].reshape(b, s, s + t - 1)


def _unskew(skewed: Tensor, t: int) -> Tensor:
    """The inverse of `_skew`."""
    b, s, _ = skewed.shape
    return pad(skewed.reshape(b, -1), (0, s)).reshape(b, s, s + t)[:, :, :t]


def _predecessors(r: Tensor, d: int) -> Tensor:
    """(3, B, S): R at the diagonal, upper and left predecessor of the cells on anti-diagonal d."""
    found = r.new_full((3, *r.shape[:2]), math.inf)
    if d == 0:
        found[0, :, 0] = 0.0  # R_00
    if d > 1:
        found[0, :, 1:] = r[:, :-1, d - 2]
    if d > 0:
        found[1, :, 1:] = r[:, :-1, d - 1]
        found[2] = r[:, :, d - 1]
    return found


def _logsumexp(a: Tensor) -> Tensor:
    """(3, B, S) -> (B, S), over the first axis.

    With exp2 above, it spares the loop torch's exp, log and softmax: on the CPU, these wake a pool
    of threads, which takes longer than a diagonal.
    """
    return torch.logaddexp(torch.logaddexp(a[0], a[1]), a[2])
