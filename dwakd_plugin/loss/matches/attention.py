"""Every student position learns from all of the teacher's, by cross-model attention."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from dwakd_plugin.loss.alignment import (
    attention_band,
    attention_entropy,
    attention_spread,
    cross_model_attention,
    standardise_scale,
)
from dwakd_plugin.loss.matches import Figure, Projecting
from dwakd_plugin.loss.products import product
from dwakd_plugin.loss.states import response_index


class Attention(Projecting):
    """Attention in both directions (Eq. 1, 2, Appendix C), per sample:

        q = query([e_in; e_tgt])    k = N([f_in; f_tgt])
        A, B = softmax of q kᵀ / √(2D) over teacher and over student positions
        h_t2s = A t2s(N(f_tgt) + N(g))      h_s2t = B s2t(h)

    The embeddings in the query are constants. Sums for the log, of the tokens of samples with both
    sides: attention_entropy, Σ H(A_i) in nats, of attention to one and the same position each;
    attention_spread, Σ H(mean A), which says how much of the row is looked at by any; and
    attention_limit, Σ log T, the most that both can be.
    """

    figures: ClassVar = (
        Figure("attention_entropy", "attention_entropy", "distilled_tokens"),
        Figure("attention_spread", "attention_spread", "distilled_tokens", logged=False),
        Figure("attention_limit", "attention_limit", "distilled_tokens", logged=False),
    )

    @cached_property
    def attention(self) -> tuple[Tensor, Tensor]:
        """A (B, S, T) and B (B, T, S)."""
        student, teacher = self.batch.student_side, self.batch.teacher_side
        read = torch.cat([student.input_embeds, student.target_embeds], -1).detach()
        key = torch.cat([teacher.input_embeds, teacher.target_embeds], -1)
        return cross_model_attention(
            self.batch.project("query", read),
            standardise_scale(key, teacher.valid),
            student.valid,
            teacher.valid,
        )

    @cached_property
    def value(self) -> Tensor:
        """t2s(N(f_tgt) + N(g)), or t2s(N(g)) with `attention_value: hidden`: (B, T, d)."""
        teacher = self.batch.teacher_side
        read = standardise_scale(teacher.hidden, teacher.valid)
        if self.batch.loss.attention_value == "label_and_hidden":
            read = standardise_scale(teacher.target_embeds, teacher.valid) + read
        return self.batch.project("t2s", read)

    @cached_property
    def t2s_hidden(self) -> Tensor:
        return product(self.attention[0], self.value)

    @cached_property
    def s2t_hidden(self) -> Tensor:
        projected = self.batch.project("s2t", self.batch.student_side.hidden)
        return product(self.attention[1], projected)

    @cached_property
    def compared(self) -> Tensor:
        return self.batch.student_side.valid

    @cached_property
    def teacher_compared(self) -> Tensor:
        return self.batch.teacher_side.valid

    @cached_property
    def teacher_index(self) -> Tensor:
        return response_index(self.batch.teacher)

    @cached_property
    def matrix(self) -> Tensor:
        return self.attention[0]

    @cached_property
    def inside(self) -> Tensor:
        student, teacher = self.batch.student_side, self.batch.teacher_side
        return attention_band(self.matrix, student.lengths, teacher.lengths, self.batch.soft_dtw)

    def sums(self) -> dict[str, Tensor]:
        if "attention" not in vars(self):  # nothing asked for it
            return {}
        lengths = self.batch.student_side.lengths
        limit = self.batch.teacher_side.lengths.clamp_min(1).to(self.batch.dtype).log()
        return {
            "attention_entropy": attention_entropy(self.matrix).sum(),
            "attention_spread": (lengths * attention_spread(self.matrix, lengths)).sum(),
            "attention_limit": (lengths * limit).sum(),
        }
