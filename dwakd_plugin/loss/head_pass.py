"""The chunked pass of states through an output head, in O(chunk · V) memory.

    N tokens   V rows of the head   C tokens of one chunk

A `Kernel` turns the logits of a chunk into columns, one value a token, and the columns' gradients
into gradients of the logits. Logits live only while their chunk is at work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd_plugin.loss.linear import linear
from dwakd_plugin.loss.states import Head

# With chunk_size "auto", the logits of one chunk in float32 take at most this share of the device's
# memory; about six tensors of that size live at once. Of all memory, not of what is free: a run and
# its resumed half must cut the same chunks to agree bit for bit.
AUTO_CHUNK_SHARE = 1 / 128
# Within that share, so many tokens: with fewer, reading the head again for each chunk is what a
# product costs. And so many elements: more makes nothing faster. (On a CPU 64 MiB, above the 32 MiB
# up to which freed tensors stay on malloc's heap, which then grows with the number of chunks.)
AUTO_CHUNK_TOKENS = 128
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
                    the settings) → columns (C,), the first of them −log p_s(y). Without another
                    head, other_logits is what is given instead of states for one
    differentiable  how many of the columns, from the first, may carry a gradient
    gradients       the same arguments and a gradient (C,) for each of these columns → gradients in
                    student_logits and in other_logits, None where these are constants. None:
                    autograd's of `statistics`, with constant other_logits
    both            the same arguments and gradients → columns and the gradient in student_logits
                    in one go; then `statistics` need no graph. None: by autograd
    beforehand      (other states (C, D), other head, targets, the student's head) → what all of
                    these are given instead of other_logits. It is made before student_logits are,
                    so that other_logits never lie beside them; it may make these in parts. None:
                    other_logits themselves. Without another head it is not asked
    alone           whether nothing is compared: other_logits are (C, 0) then
    """

    statistics: Callable[..., tuple[Tensor, ...]]
    differentiable: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    gradients: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    both: Callable[..., tuple[tuple[Tensor, ...], Tensor]] | None = None
    beforehand: Callable[[Tensor, Head, Tensor, Head], Any] | None = None
    alone: bool = False

    def logits(
        self, hidden: Tensor, other: Tensor, targets: Tensor, head: Head, other_head: Head | None
    ) -> tuple[Tensor, Any]:
        """student_logits (C, Vs) of hidden (C, d), and what they are compared with."""
        if other_head is None:
            return head.logits(hidden), other
        if self.beforehand is None:
            compared = other_head.logits(other)
        else:
            compared = self.beforehand(other, other_head, targets, head)
        return head.logits(hidden), compared

    def backward(
        self, student_logits: Tensor, *rest: Any, grads: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if self.gradients is not None:
            return self.gradients(student_logits, *rest, *grads, **self.settings)
        return self.both_ways(student_logits, *rest, grads=grads)[1], None

    def both_ways(
        self, student_logits: Tensor, *rest: Any, grads: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The columns, and the gradient in student_logits; other_logits are constants."""
        if self.both is not None:
            return self.both(student_logits, *rest, *grads, **self.settings)
        with torch.enable_grad():
            leaf = student_logits.detach().requires_grad_()
            columns = self.statistics(leaf, *rest, **self.settings)
        pairs = zip(columns[: self.differentiable], grads, strict=True)
        outputs, seeds = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        grad = torch.autograd.grad(outputs, leaf, seeds)[0]
        return tuple(column.detach() for column in columns), grad


KernelParts = Sequence[tuple[int, Kernel]]


def through_student_head(
    kernel: Kernel | KernelParts,
    hidden: Tensor,
    other: Tensor,
    labels: Tensor,
    targets: Tensor,
    head: Head,
    other_head: Head | None,
    chunk_size: int,
    product: torch.dtype | None = None,
    weights: Sequence[Tensor] | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The kernel's columns of every token, and Σ weights · columns where `weights` are given.

    Where a sample's weights are known only when all of its tokens are through, the gradient in the
    head cannot be formed in forward: backward computes the logits again. The weighted sum's is
    formed in forward: with it alone backward goes through no head.

    Shapes: hidden (N, d) and the states that it is compared with, other (N, ·); labels and targets
    (N,); weights (N,), constants, for each differentiable column → columns (N,) each, the sum ().
    Instead of one kernel for all tokens there may be several, each for so many after another; they
    have as many columns. `other_head` is a constant, None where `other` is compared as it is; the
    heads' products are in `product`, or where that is None in the heads' own dtypes. Zero tokens
    pass as one empty chunk, with a graph.
    """
    computed = product or head.weight.dtype
    if computed == torch.float16 or not torch.is_grad_enabled():
        weights = None  # what is small in half precision needs the scale that backward brings
    other_head = other_head and other_head.detached()
    parts = [(len(hidden), kernel)] if isinstance(kernel, Kernel) else kernel
    settings = (parts, head, other_head, chunk_size, product, weights)
    *columns, weighted = _StudentPass.apply(  # type: ignore[no-untyped-call]
        hidden, other, head.weight, head.bias, labels, targets, settings
    )
    return tuple(columns), None if weights is None else weighted


class _Gradients:
    """Of a pass, a chunk at a time: in the states, and summed over chunks in the student's head."""

    def __init__(self, ctx: Any, weight: Tensor, bias: Tensor | None) -> None:
        self.needs_hidden, self.needs_other, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        self.hidden: list[Tensor] = []
        self.other: list[Tensor] = []
        # In half precision each chunk more would cost digits of the sum.
        self.weight = _zeros(weight) if needs_weight else None
        self.bias = _zeros(bias) if bias is not None and needs_bias else None

    def add(self, grad: Tensor, logits: Tensor, hidden: Tensor, head: Head) -> None:
        """From that in the logits (C, V) of hidden (C, d)."""
        grad = head.product_gradient(grad, logits)
        if self.needs_hidden:
            self.hidden.append(linear(grad, head.weight.T))
        if self.weight is not None:
            _add_product(self.weight, grad, hidden)
        if self.bias is not None:
            self.bias += grad.sum(0)

    def add_other(self, grad: Tensor, logits: Tensor, head: Head) -> None:
        if self.needs_other:
            self.other.append(linear(head.product_gradient(grad, logits), head.weight.T))

    def of(self, *inputs: Tensor | None) -> list[Tensor | None]:
        """In hidden, other, weight and bias, in the dtype of each."""
        states = (torch.cat(each) if each else None for each in (self.hidden, self.other))
        return [
            None if grad is None or into is None else grad.to(into.dtype)
            for grad, into in zip((*states, self.weight, self.bias), inputs, strict=True)
        ]


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


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
        settings: tuple[
            KernelParts, Head, Head | None, int, torch.dtype | None, Sequence[Tensor] | None
        ],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, other, weight, bias, labels, targets)
        ctx.settings, ctx.ready = settings, None
        ctx.set_materialize_grads(False)
        parts, head, other_head, chunk_size, product, weights = settings
        head, other_head = head.cast(product), other_head and other_head.cast(product)
        tokens = (hidden, other, labels, targets, *(weights or ()))
        gradients = None if weights is None else _Gradients(ctx, weight, bias)
        rows = []
        for kernel, h, o, y, target, *grads in _chunks(parts, tokens, chunk_size):
            logits, compared = kernel.logits(h, o, target, head, other_head)
            if gradients is None:
                rows.append(kernel.statistics(logits, compared, y, target, **kernel.settings))
            else:
                columns, grad = kernel.both_ways(logits, compared, y, target, grads=grads)
                gradients.add(grad, logits, h, head)
                rows.append(columns)
                del grad
            del logits, compared  # before others of their size are made
        columns = tuple(map(torch.cat, zip(*rows, strict=True)))
        differentiable = parts[0][1].differentiable
        ctx.mark_non_differentiable(*columns[differentiable:])
        if weights is None or gradients is None:
            return (*columns, columns[0].new_zeros(()))
        ctx.ready = gradients.of(hidden, other, weight, bias)
        taught = zip(weights, columns[:differentiable], strict=True)
        return (*columns, torch.stack([(each * column).sum() for each, column in taught]).sum())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts, *_, weights = ctx.settings
        *seeds, scale = (*grads[: parts[0][1].differentiable], grads[-1])
        ready, ctx.ready = ctx.ready, None  # scaled in place: a second backward finds none
        if scale is None or weights is None:
            ready = None
        elif ready is None:
            seeds = [_sum(seed, each * scale) for seed, each in zip(seeds, weights, strict=True)]
        else:
            ready = [grad if grad is None else grad.mul_(scale) for grad in ready]
        if any(seed is not None for seed in seeds):
            again = _StudentPass._again(ctx, seeds)
            ready = (
                again if ready is None else [_sum(*both) for both in zip(ready, again, strict=True)]
            )
        return (*(ready or [None] * 4), *[None] * 3)

    @staticmethod
    def _again(ctx: Any, seeds: Sequence[Tensor | None]) -> list[Tensor | None]:
        hidden, other, weight, bias, labels, targets = ctx.saved_tensors
        parts, head, other_head, chunk_size, product, _ = ctx.settings
        head = replace(head, weight=weight, bias=bias).cast(product)
        other_head = other_head and other_head.cast(product)
        gradients = _Gradients(ctx, weight, bias)
        known = next(seed for seed in seeds if seed is not None)
        seeds = [torch.zeros_like(known) if seed is None else seed for seed in seeds]
        tokens = (hidden, other, labels, targets, *seeds)
        for kernel, h, o, y, target, *grads in _chunks(parts, tokens, chunk_size):
            logits, compared = kernel.logits(h, o, target, head, other_head)
            grad, other_grad = kernel.backward(logits, compared, y, target, grads=grads)
            gradients.add(grad, logits, h, head)
            del grad, logits  # before another of their size is made
            if other_grad is not None and other_head is not None:
                gradients.add_other(other_grad, compared, other_head)
            del other_grad, compared
        return gradients.of(hidden, other, weight, bias)


def _chunks(parts: KernelParts, tokens: Sequence[Tensor], size: int) -> Iterator[Any]:
    """Each chunk of the tokens, behind the kernel that is theirs: none has tokens of two."""
    counts = [count for count, _ in parts]
    of_parts = zip(*(torch.split(tensor, counts) for tensor in tokens), strict=True)
    for (_, kernel), own in zip(parts, of_parts, strict=True):
        for chunk in zip(*(even_chunks(tensor, size) for tensor in own), strict=True):
            yield kernel, *chunk


def even_chunks(tokens: Tensor, size: int) -> Sequence[Tensor]:
    """Of at most `size` tokens (N, ...), as few as can be and alike: products of few are slow."""
    count = max(1, math.ceil(len(tokens) / size))
    return torch.split(tokens, max(1, math.ceil(len(tokens) / count)))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total (V, d) += gradᵀ hidden, summed over chunks in its own dtype."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, hidden.to(grad.dtype))
    else:
        total += grad.T @ hidden.to(grad.dtype)


@torch.no_grad()
def most_likely(hidden: Tensor, head: Head, chunk_size: int) -> Tensor:
    """The token that each hidden state (N, D) predicts, a chunk of logits at a time: (N,) long."""
    return torch.cat([head.logits(chunk).argmax(-1) for chunk in even_chunks(hidden, chunk_size)])
