"""The chunked pass of states through an output head, in O(chunk · V) memory.

    N tokens   V rows of the head   C tokens of one chunk

A `Kernel` turns the logits of a chunk into columns, one value a token, and the columns' gradients
into gradients of the logits. Logits live only while their chunk is at work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd_plugin.loss.states import Head

# With chunk_size "auto", the logits of one chunk in float32 take at most this share of the device's
# memory; about six tensors of that size live at once. Of all memory, not of what is free: a run and
# its resumed half must cut the same chunks to agree bit for bit.
AUTO_CHUNK_SHARE = 1 / 128
# Within that share, so many tokens: with fewer, reading the head again for each chunk is what a
# product costs. And so many elements: more makes nothing faster. (On a CPU 64 MiB, above the 32 MiB
# up to which freed tensors stay on malloc's heap, which then grows with the number of chunks.)
AUTO_CHUNK_TOKENS = 256
AUTO_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


def tokens_per_chunk(
    chunk_size: int | Literal["auto"], vocab_size: int, device: torch.device
) -> int:
    """Tokens that go through a head of `vocab_size` rows at once."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return tokens_per_chunk_of(chunk_size, vocab_size, device.type, memory)


def tokens_per_chunk_of(
    chunk_size: int | Literal["auto"], vocab_size: int, kind: str, memory: float
) -> int:
    """The same for a kind of device with so many bytes, which need not be here."""
    if chunk_size != "auto":
        return chunk_size
    wanted = max(AUTO_CHUNK_TOKENS * vocab_size, AUTO_CHUNK_ELEMENTS.get(kind, 2**24))
    return max(1, min(wanted, int(memory * AUTO_CHUNK_SHARE) // 4) // vocab_size)


@dataclass(frozen=True)
class Kernel:
    """What a pass makes of the logits of a chunk.

    statistics      (student_logits (C, Vs), other_logits (C, V), labels (C,), targets (C,), and
                    the settings) → columns (C,), the first of them −log p_s(y)
    differentiable  how many of the columns, from the first, may carry a gradient
    gradients       the same arguments and a gradient (C,) for each of these columns → gradients in
                    student_logits and in other_logits, None where these are constants. None:
                    autograd's of `statistics`, with constant other_logits
    alone           whether nothing is compared: other_logits are (C, 0) then
    """

    statistics: Callable[..., tuple[Tensor, ...]]
    differentiable: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    gradients: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    alone: bool = False

    def backward(
        self, student_logits: Tensor, *rest: Tensor, grads: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if self.gradients is not None:
            return self.gradients(student_logits, *rest, *grads, **self.settings)
        with torch.enable_grad():
            leaf = student_logits.detach().requires_grad_()
            columns = self.statistics(leaf, *rest, **self.settings)[: self.differentiable]
        reached = [pair for pair in zip(columns, grads, strict=True) if pair[0].requires_grad]
        outputs, seeds = zip(*reached, strict=True)
        return torch.autograd.grad(outputs, leaf, seeds)[0], None


def through_student_head(
    kernel: Kernel,
    hidden: Tensor,
    other: Tensor,
    labels: Tensor,
    targets: Tensor,
    head: Head,
    other_head: Head,
    chunk_size: int,
    product: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The kernel's columns of every token. Zero tokens pass as one empty chunk, with a graph.

    The weights of a sample's tokens are known only when all are through, so that the gradient in
    the head cannot be formed in forward: backward computes the logits again.

    Shapes: hidden (N, d) and the states that it is compared with, other (N, ·); labels and targets
    (N,) → columns (N,) each. `other_head` is a constant; the heads' products are in `product`, or
    where that is None in the heads' own dtypes.
    """
    columns: tuple[Tensor, ...] = _StudentPass.apply(  # type: ignore[no-untyped-call]
        hidden,
        other,
        head.weight,
        head.bias,
        labels,
        targets,
        (kernel, head, other_head.detached(), chunk_size, product),
    )
    return columns


class _StudentPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        other: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        targets: Tensor,
        settings: tuple[Kernel, Head, Head, int, torch.dtype | None],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, other, weight, bias, labels, targets)
        ctx.settings = settings
        kernel, head, other_head, chunk_size, product = settings
        head, other_head = head.cast(product), other_head.cast(product)
        chunks = (torch.split(tensor, chunk_size) for tensor in (hidden, other, labels, targets))
        rows = [
            kernel.statistics(head.logits(h), other_head.logits(o), y, target, **kernel.settings)
            for h, o, y, target in zip(*chunks, strict=True)
        ]
        columns = tuple(map(torch.cat, zip(*rows, strict=True)))
        ctx.mark_non_differentiable(*columns[kernel.differentiable :])
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, other, weight, bias, labels, targets = ctx.saved_tensors
        kernel, head, other_head, chunk_size, product = ctx.settings
        head = replace(head, weight=weight, bias=bias).cast(product)
        other_head = other_head.cast(product)
        needs_hidden, needs_other, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        hidden_grads, other_grads = [], []
        weight_grad = torch.zeros_like(weight) if needs_weight else None
        bias_grad = torch.zeros_like(bias) if needs_bias else None
        tokens = (hidden, other, labels, targets, *grads[: kernel.differentiable])
        chunks = (torch.split(tensor, chunk_size) for tensor in tokens)
        for h, o, y, target, *seeds in zip(*chunks, strict=True):
            logits, other_logits = head.logits(h), other_head.logits(o)
            grad, other_grad = kernel.backward(logits, other_logits, y, target, grads=seeds)
            grad = head.product_gradient(grad, logits)
            if needs_hidden:
                hidden_grads.append(grad @ head.weight)
            if weight_grad is not None:
                _add_product(weight_grad, grad, h)
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            del grad, logits  # before another of their size is made
            if needs_other and other_grad is not None:
                other_grad = other_head.product_gradient(other_grad, other_logits)
                other_grads.append(other_grad @ other_head.weight)
            del other_grad, other_logits
        return (
            torch.cat(hidden_grads).to(hidden.dtype) if hidden_grads else None,
            torch.cat(other_grads).to(other.dtype) if other_grads else None,
            weight_grad,
            bias_grad,
            *[None] * 3,
        )


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total (V, d) += gradᵀ hidden, summed over chunks in its own dtype."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, hidden.to(grad.dtype))
    else:
        total += grad.T @ hidden.to(grad.dtype)


@torch.no_grad()
def most_likely(hidden: Tensor, head: Head, chunk_size: int) -> Tensor:
    """The token that each hidden state (N, D) predicts, a chunk of logits at a time: (N,) long."""
    return torch.cat([head.logits(chunk).argmax(-1) for chunk in torch.split(hidden, chunk_size)])
