"""Divergences between next-token distributions, and the chunked pass through an output head.

    N tokens   V rows of the head   C tokens of one chunk

Every divergence takes log-probabilities of shape (..., V), the target's first, and returns one
value per token (...). Callers detach the target. All are 0 at equality and none is ever negative.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dwakd_plugin.config import Divergence
from dwakd_plugin.loss.token_weights import entropy

SKEW = 0.1  # λ of the skewed divergences, as in DistiLLM (arXiv 2402.03898)
HEAD_MASS = 0.5  # μ of adaptive KL: probability mass that makes up the target's head
# With chunk_size "auto", the logits of one chunk: this share of the device's memory in float32, at
# most so many. About eight tensors of that size live at once. Of all memory, not of what is free: a
# run and its resumed half must cut the same chunks to agree bit for bit. On a CPU 64 MiB a tensor:
# tensors of 32 MiB and less stay on malloc's heap, which then grows with the number of chunks.
AUTO_CHUNK_SHARE = 1 / 256
AUTO_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p (log p − log q)."""
    # F.kl_div computes the same six times slower on a CPU (its exponential is not vectorised).
    divergence: Tensor = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
    return divergence


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight·p + (1 − weight)·q), finite where both underflow."""
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def forward_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(target ‖ student): covers the target's modes. The paper's choice (D5)."""
    return _kl(target, student)


def reverse_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(student ‖ target): seeks the target's modes."""
    return _kl(student, target)


def skewed_forward_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(target ‖ λ·target + (1 − λ)·student), at most −log λ (DistiLLM)."""
    return _kl(target, _log_mixture(target, student, SKEW))


def skewed_reverse_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(student ‖ λ·student + (1 − λ)·target), at most −log λ (DistiLLM)."""
    return _kl(student, _log_mixture(student, target, SKEW))


def js(target: Tensor, student: Tensor) -> Tensor:
    """Jensen-Shannon: ½ KL(target ‖ m) + ½ KL(student ‖ m), m their mean; at most log 2."""
    mean = _log_mixture(target, student, 0.5)
    return 0.5 * (_kl(target, mean) + _kl(student, mean))


def adaptive_kl(target: Tensor, student: Tensor) -> Tensor:
    """Forward and reverse KL, mixed by where the two differ (AKL, arXiv 2404.02657).

        g_head, g_tail = Σ |target − student| over the target's head and tail (detached)
        AKL = (g_head · forward + g_tail · reverse) / (g_head + g_tail)

    The head is the smallest set of most likely tokens that holds half of the target's mass.
    """
    with torch.no_grad():
        target_probs, order = target.exp().sort(dim=-1, descending=True)
        gap = (target_probs - student.exp().gather(-1, order)).abs()
        mass_before = target_probs.cumsum(-1) - target_probs
        head_gap = (gap * (mass_before < HEAD_MASS)).sum(-1)
        gap_total = gap.sum(-1)
        # At equality both gaps are 0, and so are both divergences: any share will do.
        head_share = head_gap / gap_total.clamp_min(torch.finfo(gap.dtype).tiny)
    return head_share * forward_kl(target, student) + (1 - head_share) * reverse_kl(target, student)


DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "js": js,
}


class StudentStatistics(NamedTuple):
    """Per student token, each (N,): the first three carry gradients, the others are detached."""

    ce: Tensor  # −log p_s(y)
    t2s_ce: Tensor  # −log p_t2s(y)
    divergence: Tensor  # D(p_t2s ‖ p_s) at temperature τ
    entropy: Tensor  # H(p_s)
    gate: Tensor  # max_v p_t2s(v)
    t2s_correct: Tensor  # argmax p_t2s = y


class TeacherStatistics(NamedTuple):
    """Per teacher token, each (N,): the first carries a gradient, the other is detached."""

    divergence: Tensor  # KL(p_t ‖ p_s2t) at temperature τ
    entropy: Tensor  # H(p_t)


def student_statistics(
    student_logits: Tensor,
    t2s_logits: Tensor,
    labels: Tensor,
    divergence: Divergence,
    temperature: float,
) -> StudentStatistics:
    """What the student-space terms need of each token (Eq. 3-6, 11, 12).

    The target p_t2s is detached in the divergence: cross-entropy alone trains it.

    Shapes: student_logits and t2s_logits (C, Vs), labels (C,).
    """
    log_probs = student_logits.log_softmax(-1)
    t2s_log_probs = t2s_logits.log_softmax(-1)
    return StudentStatistics(
        ce=F.nll_loss(log_probs, labels, reduction="none"),
        t2s_ce=F.nll_loss(t2s_log_probs, labels, reduction="none"),
        divergence=DIVERGENCES[divergence](
            (t2s_logits.detach() / temperature).log_softmax(-1),
            (student_logits / temperature).log_softmax(-1),
        ),
        entropy=entropy(log_probs),
        gate=t2s_log_probs.detach().max(-1).values.exp(),
        t2s_correct=t2s_log_probs.detach().argmax(-1) == labels,
    )


def teacher_statistics(
    teacher_logits: Tensor, s2t_logits: Tensor, temperature: float
) -> TeacherStatistics:
    """What the teacher-space term needs of each token (Eq. 8, 14); always forward KL (D5).

    Shapes: teacher_logits and s2t_logits (C, Vt).
    """
    teacher_logits = teacher_logits.detach()
    return TeacherStatistics(
        divergence=forward_kl(
            (teacher_logits / temperature).log_softmax(-1),
            (s2t_logits / temperature).log_softmax(-1),
        ),
        entropy=entropy(teacher_logits.log_softmax(-1)),
    )


def tokens_per_chunk(
    chunk_size: int | Literal["auto"], vocab_size: int, device: torch.device
) -> int:
    """Tokens that go through a head of `vocab_size` rows at once."""
    if chunk_size != "auto":
        return chunk_size
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elements = min(int(memory * AUTO_CHUNK_SHARE) // 4, AUTO_CHUNK_ELEMENTS.get(device.type, 2**24))
    return max(1, elements // vocab_size)


class _TeacherSpace(torch.autograd.Function):
    """`teacher_statistics` chunk by chunk, with the gradient formed in forward.

    A token's divergence depends on its own projected state alone, and the head is constant. So one
    row (D,) per token is all that backward needs, and a chunk's logits are computed once, where
    recomputing them in backward would take two more products with the head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        hidden: Tensor,
        logits: Callable[[Tensor], Tensor],
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        divergences, entropies, gradients = [], [], []
        chunks = (torch.split(tensor, chunk_size) for tensor in (projected, hidden))
        for projected_chunk, hidden_chunk in zip(*chunks, strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                leaf = projected_chunk.detach().requires_grad_(ctx.needs_input_grad[0])
                divergence, token_entropy = teacher_statistics(
                    logits(hidden_chunk), logits(leaf), temperature
                )
                if ctx.needs_input_grad[0]:
                    gradients += torch.autograd.grad(divergence.sum(), leaf)
            divergences.append(divergence.detach())
            entropies.append(token_entropy)
        ctx.save_for_backward(torch.cat(gradients) if gradients else projected)
        entropies_ = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies_)
        return torch.cat(divergences), entropies_

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient).to(gradient.dtype), None, None, None, None


def teacher_space_statistics(
    hidden: Tensor,
    projected: Tensor,
    logits: Callable[[Tensor], Tensor],
    temperature: float,
    chunk_size: int,
) -> TeacherStatistics:
    """`teacher_statistics` of every token, a chunk of logits at a time.

    Shapes: the teacher's hidden states and the student's projected ones (N, D), `logits` their
    constant head → each result (N,). The gradient reaches `projected` only.
    """
    divergence, token_entropy = _TeacherSpace.apply(  # type: ignore[no-untyped-call]
        projected, hidden, logits, temperature, chunk_size
    )
    return TeacherStatistics(divergence, token_entropy)


def map_token_chunks(
    statistics: Callable[..., tuple[Tensor, ...]], chunk_size: int, *tokens: Tensor
) -> tuple[Tensor, ...]:
    """Apply `statistics` to chunks of tokens and join what it returns per token.

    Each chunk is recomputed in backward, so that its logits live only while it is at work: memory
    is O(chunk · V) instead of O(N · V), for one more forward through the head. Zero tokens pass as
    one empty chunk, and keep their graph.

    Shapes: each of `tokens` (N, ...) → each result (N,).
    """
    chunks = zip(*(torch.split(tensor, chunk_size) for tensor in tokens), strict=True)
    results = [
        checkpoint(statistics, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return tuple(torch.cat(column) for column in zip(*results, strict=True))
