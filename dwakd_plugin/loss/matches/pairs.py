"""Positions of the same token, byte for byte, learn from one another (DSKDv2)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from dwakd_plugin.loss.alignment import pair_band
from dwakd_plugin.loss.head_pass import most_likely
from dwakd_plugin.loss.matches import Projecting
from dwakd_plugin.loss.states import gathered, required_labels


class SameToken(Projecting):
    """Pairs (i, j) of positions that predict the same bytes (DSKDv2, arXiv 2504.11426).

        h_t2s,i = t2s(g_j)      h_s2t,j = s2t(h_i)      target_i = token_map(argmax p_t,j)

    Compared are pairs whose target is a token of the student's. The band's centres lie on the
    pairs. Raises ValueError where one of the two sides has no `pairs`, the teacher no `token_map`.
    """

    rows = "token"
    agreeing_only = True

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        student, teacher = self.batch.student.pairs, self.batch.teacher.pairs
        if student is None or teacher is None:
            raise ValueError("exact matching needs `pairs` of both student and teacher (P,)")
        return student, teacher

    @cached_property
    def _predicted(self) -> Tensor:
        """The teacher's argmax of each pair in the student's vocabulary, −1 where none: (P,)."""
        teacher = self.batch.teacher
        if teacher.token_map is None:
            raise ValueError("exact matching needs the teacher's `token_map` (Vt,)")
        hidden = gathered(teacher.hidden, self._pairs[1])
        head = teacher.head.cast(self.batch.product)
        return teacher.token_map[most_likely(hidden, head, self.batch.chunk(head))]

    def _placed(self, values: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """(P, ...) → (B, L, ...), 0 elsewhere."""
        grid = values.new_zeros(valid.numel(), *values.shape[1:])
        return grid.index_copy(0, index, values).view(*valid.shape, *values.shape[1:])

    @cached_property
    def t2s_hidden(self) -> Tensor:
        ours, theirs = self._pairs
        projected = self.batch.project("t2s", gathered(self.batch.teacher_side.hidden, theirs))
        return self._placed(projected, ours, self.batch.student_side.valid)

    @cached_property
    def s2t_hidden(self) -> Tensor:
        ours, theirs = self._pairs
        projected = self.batch.project("s2t", gathered(self.batch.student_side.hidden, ours))
        return self._placed(projected, theirs, self.batch.teacher_side.valid)

    @cached_property
    def targets(self) -> Tensor:
        labels = required_labels(self.batch.student)
        ours = self._pairs[0]
        wanted = torch.where(self._predicted >= 0, self._predicted, labels.flatten()[ours])
        return labels.flatten().index_copy(0, ours, wanted).view_as(labels)

    @cached_property
    def compared(self) -> Tensor:
        return self._placed(self._predicted >= 0, self._pairs[0], self.batch.student_side.valid)

    @cached_property
    def teacher_compared(self) -> Tensor:
        return self._placed(self._predicted >= 0, self._pairs[1], self.batch.teacher_side.valid)

    @cached_property
    def teacher_index(self) -> Tensor:
        return self._pairs[1]

    @cached_property
    def _partners(self) -> Tensor:
        """For each student position its pair's number among the teacher's, from 1, or 0: (B, S)."""
        ours, theirs = self._pairs
        numbers = theirs % self.batch.teacher.hidden.shape[1] + 1
        return self._placed(numbers, ours, self.batch.student_side.valid)

    @cached_property
    def matrix(self) -> Tensor:
        size = self.batch.teacher.hidden.shape[1]
        columns = torch.arange(1, size + 1, device=self._partners.device)
        return (self._partners[..., None] == columns).to(self.batch.dtype)

    @cached_property
    def inside(self) -> Tensor:
        student, teacher = self.batch.student_side, self.batch.teacher_side
        size = self.batch.teacher.hidden.shape[1]
        return pair_band(
            self._partners, student.lengths, teacher.lengths, size, self.batch.soft_dtw
        )
