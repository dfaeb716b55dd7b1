"""Distillation in the teacher's space: what the student's states say in the teacher's words.

    teacher_kd = Σ_j w_t,j KL(p_t,j ‖ p_s2t,j)      p_s2t = softmax(h_s2t Wtᵀ)        (Eq. 8, 15)
    w_t,j      ∝ 1 − H(p_t,j) / log Vt              constants                             (Eq. 14)

The divergence is always forward KL (D5), at temperature τ on both sides, without a factor τ² (D4);
entropies at temperature 1. Over compared positions, whose weights sum to the sample's length. The
most expensive term: two products with the teacher's head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd_plugin.loss.head_pass import even_chunks
from dwakd_plugin.loss.linear import linear
from dwakd_plugin.loss.matches import Figure, Projecting
from dwakd_plugin.loss.record import HeadPasses, Term
from dwakd_plugin.loss.states import Head, gathered, padded
from dwakd_plugin.loss.token_weights import teacher_token_weights

# What the text costs the teacher itself, in nats: of all of it, and of a response's end.
TEACHER = (
    Figure("teacher_ce", "teacher_ce", "paired_tokens"),
    Figure("teacher_end_ce", "teacher_end_ce", "end_tokens", logged=False),
)


class TeacherStatistics(NamedTuple):
    """Per teacher token, each (N,): the first carries a gradient, the others are detached."""

    divergence: Tensor  # KL(p_t ‖ p_s2t) at temperature τ
    entropy: Tensor  # H(p_t)
    ce: Tensor  # −log p_t(label)


def teacher_statistics_(
    teacher_logits: Tensor, s2t_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[TeacherStatistics, Tensor]:
    """What the teacher-space term needs of each token.

    And the divergence's gradient (p_s2t − p_t) / τ in s2t_logits. Works in place, with one more
    tensor of the size of the logits; both inputs are lost.

    Shapes: teacher_logits and s2t_logits (C, Vt), without a graph, and the teacher's labels (C,) →
    each statistic (C,), (C, Vt).
    """
    # Shifted by the largest, exponentials never overflow; probabilities are `weights / total`.
    teacher_logits -= teacher_logits.amax(-1, keepdim=True)
    weights = teacher_logits.exp()
    total = weights.sum(-1)
    token_entropy = total.log() - torch.linalg.vecdot(weights, teacher_logits) / total
    ce = total.log() - teacher_logits.gather(-1, labels[:, None]).squeeze(-1)
    if temperature != 1:
        teacher_logits /= temperature
        torch.exp(teacher_logits, out=weights)
        total = weights.sum(-1)
    s2t_logits -= s2t_logits.amax(-1, keepdim=True)
    s2t_logits /= temperature
    teacher_logits -= s2t_logits
    divergence = torch.linalg.vecdot(weights, teacher_logits) / total - total.log()
    s2t_total = s2t_logits.exp_().sum(-1)
    divergence += s2t_total.log()
    s2t_logits /= (s2t_total * temperature)[:, None]
    s2t_logits.addcmul_(weights, (1 / (total * temperature))[:, None], value=-1)
    return TeacherStatistics(divergence, token_entropy, ce), s2t_logits


def compiled_statistics_(
    teacher_logits: Tensor, s2t_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[TeacherStatistics, Tensor]:
    """`teacher_statistics_` on the CPU, with no further tensor of the size of the logits."""
    from dwakd_plugin.loss.terms import dual_space_cpu  # numba, which a GPU has no need of

    columns = dual_space_cpu.teacher_statistics_(teacher_logits, s2t_logits, labels, temperature)
    return TeacherStatistics(*columns), s2t_logits


class TeacherPass(torch.autograd.Function):
    """`teacher_statistics_` of every token, a chunk of logits at a time, and with its gradient.

    A token's divergence depends on its own projected state alone, and the head is constant. So one
    row (D,) per token is all that backward needs: it is formed in forward, and a chunk's logits are
    computed once, where recomputing them would take two more products with the head.

    Shapes: projected and hidden (N, D), the teacher's labels (N,) → each statistic (N,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        hidden: Tensor,
        labels: Tensor,
        head: Head,
        temperature: float,
        chunk_size: int,
        compiled: bool,
    ) -> tuple[Tensor, ...]:
        said = compiled_statistics_ if compiled else teacher_statistics_
        rows, gradients = [], []
        chunks = (even_chunks(tensor, chunk_size) for tensor in (projected, hidden, labels))
        for p, h, y in zip(*chunks, strict=True):
            logits = head.logits(p)
            kept = logits if head.softcap is None else logits.clone()
            statistics, gradient = said(head.logits(h), logits, y, temperature)
            if ctx.needs_input_grad[0]:
                gradient = linear(head.product_gradient(gradient, kept), head.weight.T)
                gradients.append(gradient.to(projected.dtype))
            del logits, kept, gradient  # before the next chunk's are made
            rows.append(statistics)
        ctx.save_for_backward(torch.cat(gradients) if gradients else projected)
        divergence, *detached = map(torch.cat, zip(*rows, strict=True))
        ctx.mark_non_differentiable(*detached)
        return divergence, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient).to(gradient.dtype), *[None] * 6


def _teacher_kd(passes: HeadPasses[Projecting]) -> dict[str, Tensor]:
    batch, match, teacher = passes.batch, passes.match, passes.batch.teacher
    index, compared, at_end = match.teacher_index, match.teacher_compared, match.ends[1]
    labels = torch.zeros_like(compared, dtype=torch.long)  # any, where there are none
    if teacher.labels is not None:
        labels = teacher.labels.where(compared, 0)
    columns: tuple[Tensor, ...] = TeacherPass.apply(  # type: ignore[no-untyped-call]
        *(gathered(tensor, index) for tensor in (match.s2t_hidden, teacher.hidden, labels)),
        teacher.head.cast(batch.product),
        batch.loss.temperature,
        batch.chunk(teacher.head),
        batch.compiled,
    )
    divergence, entropy, ce = (padded(column, index, compared) for column in columns)
    vocab, weighting = teacher.head.weight.shape[0], batch.loss.teacher_weighting
    lengths = batch.teacher_side.lengths
    weights = teacher_token_weights(entropy, vocab, compared, weighting, lengths)
    sums = {"teacher_kd": (weights * divergence.where(compared, 0.0)).sum()}
    if teacher.labels is not None:
        sums["teacher_ce"] = ce.where(compared, 0.0).sum()
        sums["teacher_end_ce"] = ce.where(at_end, 0.0).sum()
    return sums


TEACHER_SPACE = Term(
    "teacher_kd",
    "teach",
    _teacher_kd,
    per="teacher_tokens",
    trains=frozenset({"s2t"}),
    figures=TEACHER,
)
