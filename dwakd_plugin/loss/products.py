"""Products of float32 matrices in float32, whatever the process has agreed to (D3).

`tf32: true` and `torch.set_float32_matmul_precision` leave ten bits, or seven, of each factor. That
is for the models and their heads; of a cosine near 1 it would leave nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@contextmanager
def in_full_precision() -> Iterator[None]:
    """While open, products of float32 matrices are not rounded any further, on any device."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        kept = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(kept)
        return
    every: Any = torch.backends  # whose types don't name them all
    backends = every.cuda.matmul, every.mkldnn.matmul
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in full precision, forward and backward: (B, L, M), (B, M, N) → (B, L, N)."""
    return _Product.apply(a, b)  # type: ignore[no-untyped-call, no-any-return]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with in_full_precision():
            return a @ b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (a, b), (of_a, of_b) = ctx.saved_tensors, ctx.needs_input_grad
        with in_full_precision():
            return grad @ b.mT if of_a else None, a.mT @ grad if of_b else None
