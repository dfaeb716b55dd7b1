"""The token level: sums of cross-entropies and divergences in both spaces (Eq. 3-16), ULD, and the
teacher's probabilities by the student's tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dwakd_plugin.loss.alignment import valid_positions
from dwakd_plugin.loss.divergence import (
    StudentStatistics,
    TeacherStatistics,
    map_token_chunks,
    mapped_statistics,
    sorted_distance,
    student_space_statistics,
    teacher_space_statistics,
    tokens_per_chunk,
)
from dwakd_plugin.loss.states import (
    Head,
    ResponseStates,
    gathered,
    padded,
    required_labels,
    response_index,
)
from dwakd_plugin.loss.token_weights import (
    normalise_per_sample,
    student_token_weights,
    teacher_token_weights,
)
from dwakd_plugin.recipe.schema import LossConfig


@dataclass(frozen=True)
class Matched:
    """What each position learns from, in the other model's space.

    A position that is not compared holds anything finite.
    """

    t2s_hidden: Tensor  # (B, S, d)
    s2t_hidden: Tensor  # (B, T, D)
    targets: Tensor  # (B, S) long, of the projected teacher's cross-entropy
    student_compared: Tensor  # (B, S) bool
    teacher_compared: Tensor  # (B, T) bool
    teacher_index: Tensor  # places to compare in the flattened (B · T), and maybe more
    agreeing_only: bool = False  # D where the projected teacher's argmax is the target

    def at_end(self, student_lengths: Tensor, teacher_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The last position of each sample on both sides, as (B, S) and (B, T) bool: none where
        one of the two is not compared."""
        sides = (self.student_compared, student_lengths), (self.teacher_compared, teacher_lengths)
        last = [
            compared
            & (torch.arange(1, compared.shape[1] + 1, device=lengths.device) == lengths[:, None])
            for compared, lengths in sides
        ]
        both = last[0].any(1) & last[1].any(1)
        return last[0] & both[:, None], last[1] & both[:, None]


def cross_entropy(student: ResponseStates, loss: LossConfig) -> Tensor:
    """Σ −log p_s(y), without a teacher."""
    index = response_index(student)

    def statistics(hidden: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (F.cross_entropy(student.head.logits(hidden), labels, reduction="none"),)

    (ce,) = map_token_chunks(
        statistics,
        chunk_of(loss, student.head),
        gathered(student.hidden, index),
        gathered(required_labels(student), index),
    )
    return ce.sum()


def in_order_sums(
    student: ResponseStates,
    teacher: ResponseStates,
    student_lengths: Tensor,
    teacher_lengths: Tensor,
    loss: LossConfig,
) -> dict[str, Tensor]:
    """The labels' CE and ULD's distance, of the same logits; the i-th positions are compared."""
    index = response_index(student)
    S, T = student.hidden.shape[1], teacher.hidden.shape[1]
    compared = valid_positions(torch.minimum(student_lengths, teacher_lengths), S)
    partner = index // S * T + (index % S).clamp(max=T - 1)
    partner_hidden = gathered(teacher.hidden.detach(), partner)
    partner_hidden = partner_hidden.where(gathered(compared, index)[:, None], 0.0)
    head = teacher.head.detached()

    def statistics(hidden: Tensor, labels: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = student.head.logits(hidden)
        with torch.no_grad():
            teacher_logits = head.logits(teacher_hidden)
        return (
            F.cross_entropy(logits, labels, reduction="none"),
            sorted_distance(logits, teacher_logits, loss.temperature),
        )

    ce, distances = map_token_chunks(
        statistics,
        min(chunk_of(loss, student.head), chunk_of(loss, head)),
        gathered(student.hidden, index),
        gathered(required_labels(student), index),
        partner_hidden,
    )
    weights = normalise_per_sample(compared.to(distances.dtype), compared, student_lengths)
    sums = {
        "uld": (weights * padded(distances, index, compared).where(compared, 0.0)).sum(),
        "paired_tokens": compared.sum(),
    }
    if loss.ce_weight > 0:
        sums["ce"] = ce.sum()
    return sums


def mapped_sums(
    student: ResponseStates,
    teacher: ResponseStates,
    student_lengths: Tensor,
    loss: LossConfig,
) -> dict[str, Tensor]:
    """The labels' CE, and D between the teacher's probabilities by the student's tokens and p_s.

        p_map,i(s) = Σ_{v: token_map(v) = s} p_t,j(v) / Σ_{v: token_map(v) ≥ 0} p_t,j(v)
        student_kd = Σ w_i D(p_map,i ‖ p_s,i) over pairs (i, j) + Σ −log p_s,i(y_i) over the rest

    The weights of a sample's pairs sum to their number, so that each token weighs as much as any
    other: where the teacher says nothing, the label stands in for it. With the labels left to λ_CE
    alone, tokens that only one tokenizer cuts off would be taught less, and unlearnt.
    """
    if student.pairs is None or teacher.pairs is None or teacher.token_map is None:
        raise ValueError("matching by mapping needs `pairs` of both sides, and a `token_map`")
    index, mapping = response_index(student), teacher.token_map
    valid = valid_positions(student_lengths, student.hidden.shape[1])
    compared = torch.zeros_like(valid).flatten().index_fill(0, student.pairs, True).view_as(valid)
    partner = torch.zeros(valid.numel(), dtype=torch.long, device=valid.device)
    partner = partner.index_copy(0, student.pairs, teacher.pairs)[index]
    partner_hidden = gathered(teacher.hidden.detach(), partner)
    partner_hidden = partner_hidden.where(gathered(compared, index)[:, None], 0.0)
    head = teacher.head.detached()

    def statistics(hidden: Tensor, labels: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, ...]:
        logits = student.head.logits(hidden)
        with torch.no_grad():
            theirs = head.logits(teacher_hidden)
        return mapped_statistics(logits, theirs, mapping, labels, loss.divergence, loss.temperature)

    tokens = StudentStatistics(
        *map_token_chunks(
            statistics,
            min(chunk_of(loss, student.head), chunk_of(loss, head)),
            gathered(student.hidden, index),
            gathered(required_labels(student), index),
            partner_hidden,
        )
    )
    ce = tokens.ce
    tokens = StudentStatistics(*(padded(values, index, compared) for values in tokens))
    weights = student_token_weights(
        tokens.entropy, tokens.gate, compared, loss.student_weighting, compared.sum(1)
    )
    taught = (weights * tokens.divergence.where(compared, 0.0)).sum()
    at_end = compared & (valid.cumsum(1) == student_lengths[:, None])
    sums = {
        "student_kd": taught + tokens.ce.where(valid & ~compared, 0.0).sum(),
        "paired_tokens": compared.sum(),
        "t2s_correct": (tokens.t2s_correct & compared).sum(),
        "gate": tokens.gate.where(compared, 0.0).sum(),
        "teacher_ce": tokens.t2s_ce.where(compared, 0.0).sum(),
        "paired_ce": tokens.ce.detach().where(compared, 0.0).sum(),
        "teacher_end_ce": tokens.t2s_ce.where(at_end, 0.0).sum(),
        "end_ce": tokens.ce.detach().where(at_end, 0.0).sum(),
        "end_tokens": at_end.sum(),
    }
    if loss.ce_weight > 0:
        sums["ce"] = ce.sum()
    return sums


def student_space_sums(
    student: ResponseStates, matched: Matched, lengths: Tensor, at_end: Tensor, loss: LossConfig
) -> dict[str, Tensor]:
    """Sums in the student's space: CE of every position, the rest of compared ones (Eq. 11-16).

    `at_end` (B, S) bool are the ends that are reported.
    """
    index = response_index(student)
    head, compared = student.head, matched.student_compared

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return replace(head, weight=weight, bias=bias).logits(hidden)

    flat = student_space_statistics(
        gathered(student.hidden, index),
        gathered(matched.t2s_hidden, index),
        gathered(required_labels(student), index),
        gathered(matched.targets, index),
        (head.weight, head.bias),
        logits,
        loss.divergence,
        loss.temperature,
        chunk_of(loss, head),
    )
    tokens = StudentStatistics(*(padded(values, index, compared) for values in flat))
    taught = compared & tokens.t2s_correct if matched.agreeing_only else compared
    weights = student_token_weights(
        tokens.entropy, tokens.gate, taught, loss.student_weighting, lengths
    )
    alike = normalise_per_sample(compared.to(weights.dtype), compared, lengths)
    sums = {
        "t2s_ce": (alike * tokens.t2s_ce.where(compared, 0.0)).sum(),
        "student_kd": (weights * tokens.divergence.where(taught, 0.0)).sum(),
        "paired_tokens": compared.sum(),
        "t2s_correct": (tokens.t2s_correct & compared).sum(),
        "gate": tokens.gate.where(compared, 0.0).sum(),
        "paired_ce": tokens.ce.detach().where(compared, 0.0).sum(),
        "end_ce": tokens.ce.detach().where(at_end, 0.0).sum(),
        "end_tokens": at_end.sum(),
    }
    if loss.ce_weight > 0:
        sums["ce"] = tokens.ce.sum()
    return sums


def teacher_space_sums(
    teacher: ResponseStates, matched: Matched, lengths: Tensor, at_end: Tensor, loss: LossConfig
) -> dict[str, Tensor]:
    """Σ w_t KL(p_t ‖ p_s2t) of compared positions (Eq. 14, 15), and the teacher's own CE there.

    `at_end` (B, T) bool are the ends that are reported.
    """
    index, compared = matched.teacher_index, matched.teacher_compared
    head = teacher.head.detached()
    labels = torch.zeros_like(compared, dtype=torch.long)  # any, where there are none
    if teacher.labels is not None:
        labels = teacher.labels.where(compared, 0)

    flat = teacher_space_statistics(
        gathered(teacher.hidden.detach(), index),
        gathered(matched.s2t_hidden, index),
        gathered(labels, index),
        head.logits,
        loss.temperature,
        chunk_of(loss, head),
    )
    tokens = TeacherStatistics(*(padded(values, index, compared) for values in flat))
    weights = teacher_token_weights(
        tokens.entropy, head.weight.shape[0], compared, loss.teacher_weighting, lengths
    )
    sums = {"teacher_kd": (weights * tokens.divergence.where(compared, 0.0)).sum()}
    if teacher.labels is not None:
        sums["teacher_ce"] = tokens.ce.where(compared, 0.0).sum()
        sums["teacher_end_ce"] = tokens.ce.where(at_end, 0.0).sum()
    return sums


def chunk_of(loss: LossConfig, head: Head) -> int:
    """How many tokens go through a head at once."""
    return tokens_per_chunk(loss.chunk_size, head.weight.shape[0], head.weight.device)
