"""Soft-DTW between padded batches of sequences, from a cost matrix (arXiv 2602.21669, Eq. 17-25).

Shapes: B samples, S student positions, T teacher positions. A backend is a module of two functions,

    value(cost, n, m, gamma)                  -> values (B,), state
    gradient(cost, n, m, gamma, state, seed)  -> seed_b · ∂value_b/∂cost_b (B, S, T)

where n, m (B,) int64 are the lengths and `state` is a tuple of tensors that `gradient` wants back
from `value`. A backend gives +inf where every path is barred, NaN where it read a NaN or −inf, and
0 for an empty sample. One that finds value and gradient of several costs in one go has `paths` too.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd_plugin.loss.soft_dtw.layout import together

__all__ = ["Backend", "expected_alignments", "in_one_launch", "soft_dtw"]

Backend = Literal["auto", "torch", "numba", "triton"]

_MODULES = {"torch": "wavefront", "numba": "cpu", "triton": "gpu"}


def soft_dtw(
    cost: Tensor,
    student_lengths: Tensor,
    teacher_lengths: Tensor,
    gamma: float,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Soft-DTW of each sample, differentiable in `cost`.

        softmin_γ(a, b, c) = −γ log(exp(−a/γ) + exp(−b/γ) + exp(−c/γ))
        R_ij = cost_ij + softmin_γ(R_{i−1,j−1}, R_{i−1,j}, R_{i,j−1}),   R_00 = 0, other borders +∞
        value = R_nm = −γ log Σ_{monotone paths p} exp(−Σ_{(i,j) ∈ p} cost_ij / γ)

    (arXiv 2602.21669, Eq. 17-25). The gradient is the expected alignment: the probability that a
    path drawn with weight exp(−cost(p)/γ) goes through the cell.

    Args:
        cost: (B, S, T), float32 or float64. Only `[:n, :m]` of a sample is read. +inf bars a cell.
        student_lengths: (B,) integers, n ≤ S of each sample.
        teacher_lengths: (B,) integers, m ≤ T of each sample.
        gamma: smoothing, > 0. A plain number: no gradient reaches it.
        backend: "auto" takes numba on the CPU and triton on CUDA, and torch where these are not
            installed or the device is another.

    Returns:
        (B,) in the dtype of `cost`. 0 with a zero gradient where n or m is 0; NaN, also for the
        gradient over `[:n, :m]`, where a NaN or −inf was read; +inf with a zero gradient where
        every path is barred, for numba also by a cost above 7e14 · gamma. The gradient outside
        `[:n, :m]` is 0.

    Raises:
        TypeError: `cost` is neither float32 nor float64, or the lengths are not integers.
        ValueError: shapes do not fit, gamma is not a positive finite number, a length is outside
            its range (lengths already on a GPU are clamped instead: a check would stall it), or
            the backend does not serve the device.
        ImportError: the backend asked for is not installed.

    >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> two = torch.tensor([2])
    >>> soft_dtw(cost, two, two, gamma=1.0)  # −log(1 + 2/e): one path costs 0, two cost 1
    tensor([-0.5514])
    """
    if cost.dim() != 3:
        raise ValueError(f"cost must have the shape (B, S, T), got {tuple(cost.shape)}")
    if cost.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cost must be float32 or float64, got {cost.dtype}; use cost.float()")
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"gamma must be a positive finite number, got {gamma}")
    n = _checked_lengths("student_lengths", student_lengths, cost, dim=1)
    m = _checked_lengths("teacher_lengths", teacher_lengths, cost, dim=2)
    module = _backend(backend, cost.device.type)
    if cost.numel() == 0:
        return cost.sum((1, 2))  # zeros, with a graph
    values: Tensor = _SoftDTW.apply(  # type: ignore[no-untyped-call]
        cost, n, m, float(gamma), module
    )
    return values


def expected_alignments(
    costs: Sequence[Tensor],
    lengths: Sequence[tuple[Tensor, Tensor]],
    gamma: float,
    *,
    largest: float | None = None,
    backend: Backend = "auto",
) -> list[tuple[Tensor, Tensor]]:
    """Soft-DTW (B,) and its gradient, the expected alignment (B, S, T), of each constant cost.

    As `soft_dtw` has them, of costs of one dtype, and on a GPU from one launch. `largest`: no
    finite |cost| exceeds it, by which a GPU has less to carry; None where that isn't known.
    """
    module = _backend(backend, costs[0].device.type)
    jobs = [
        (
            cost.detach(),
            _checked_lengths("student_lengths", n, cost, dim=1),
            _checked_lengths("teacher_lengths", m, cost, dim=2),
        )
        for cost, (n, m) in zip(costs, lengths, strict=True)
    ]
    if hasattr(module, "paths") and all(cost.numel() for cost in costs):
        return module.paths(jobs, gamma, largest)  # type: ignore[no-any-return]
    found = []
    for cost, n, m in jobs:
        if cost.numel() == 0:
            found.append((cost.sum((1, 2)), cost))
            continue
        values, state = module.value(cost, n, m, gamma)
        seed = _seed(torch.ones_like(values), values)
        found.append((values, module.gradient(cost, n, m, gamma, state, seed)))
    return found


def in_one_launch(
    shapes: Sequence[tuple[int, int, int]], device: torch.device
) -> Sequence[Sequence[int]]:
    """Which costs (B, S, T), by number, are worth being given to `expected_alignments` together.

    On a GPU as many as fit; elsewhere each alone, as then only one is in memory.
    """
    if device.type == "cuda":
        return together(shapes)
    return [[number] for number in range(len(shapes))]


def _seed(grad: Tensor, values: Tensor) -> Tensor:
    """What the gradient starts with: nothing where no path is open, NaN where one was read."""
    return grad.masked_fill(values == math.inf, 0.0).masked_fill(values.isnan(), math.nan)


def _checked_lengths(name: str, lengths: Tensor, cost: Tensor, dim: int) -> Tensor:
    """`lengths` as (B,) int64 on the device of `cost`, each within 0 .. cost.shape[dim]."""
    if lengths.shape != cost.shape[:1]:
        raise ValueError(
            f"{name} must have the shape ({cost.shape[0]},), got {tuple(lengths.shape)}"
        )
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {lengths.dtype}")
    limit = cost.shape[dim]
    if lengths.device.type == "cpu":
        each = lengths.tolist()
        if any(length < 0 or length > limit for length in each):
            raise ValueError(f"{name} must lie in 0..{limit}, got {each}")
        return lengths.to(cost.device, torch.int64)
    return lengths.to(cost.device, torch.int64).clamp(0, limit)


def _backend(name: Backend, device: str) -> ModuleType:
    """The backend's module; numba and triton are imported here, not with this package."""
    if name == "auto":
        fast: Backend = "numba" if device == "cpu" else "triton"
        served = device in ("cpu", "cuda") and importlib.util.find_spec(fast)
        name = fast if served else "torch"
    if name not in _MODULES:
        raise ValueError(f"backend must be auto, torch, numba or triton, got {name!r}")
    if name == "numba" and device != "cpu":
        raise ValueError(f"backend 'numba' needs a CPU tensor, got one on {device}")
    if name == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton' needs a CUDA tensor, got one on {device}")
    return importlib.import_module(f"{__name__}.{_MODULES[name]}")


class _SoftDTW(torch.autograd.Function):
    """Keeps the cost and the backend's state; the gradient is written once, already scaled."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, n: Tensor, m: Tensor, gamma: float, backend: ModuleType
    ) -> Tensor:
        values, state = backend.value(cost, n, m, gamma)
        ctx.save_for_backward(cost, n, m, values, *state)
        ctx.gamma, ctx.backend = gamma, backend
        return values  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        cost, n, m, values, *state = ctx.saved_tensors
        seed = _seed(grad, values)
        return ctx.backend.gradient(cost, n, m, ctx.gamma, state, seed), None, None, None, None
