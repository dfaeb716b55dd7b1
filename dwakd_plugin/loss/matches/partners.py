"""Each student position learns from one teacher position's own probabilities."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from dwakd_plugin.loss.alignment import pair_band, valid_positions
from dwakd_plugin.loss.matches import Banded, Match
from dwakd_plugin.loss.states import Head, gathered


class _Partners(Match):
    @property
    @abstractmethod
    def partner(self) -> Tensor:
        """Of each position, by its place in the flattened (B · T): (B, S)."""

    def other(self, index: Tensor) -> tuple[Tensor, Head | None]:
        """The partners' states; or of `top` the ids and then the log-probabilities, (N, 2k)."""
        teacher, place = self.batch.teacher, gathered(self.partner, index)
        compared = gathered(self.compared, index)[:, None]
        if teacher.top is None:
            return gathered(teacher.hidden, place).where(compared, 0.0), teacher.head
        # As one tensor: in float32 an id is exact below 2^24.
        both = [gathered(each, place).to(self.batch.dtype) for each in teacher.top]
        return torch.cat(both, -1).where(compared, 0.0), None


class InOrder(_Partners):
    """Pairs (i, i): the position of the same number, as far as the shorter side goes."""

    @cached_property
    def compared(self) -> Tensor:
        lengths = torch.minimum(self.batch.student_side.lengths, self.batch.teacher_side.lengths)
        return valid_positions(lengths, self.batch.student.hidden.shape[1])

    @cached_property
    def partner(self) -> Tensor:
        (B, S), T = self.compared.shape, self.batch.teacher.hidden.shape[1]
        rows, columns = (torch.arange(size, device=self.compared.device) for size in (B, S))
        return rows[:, None] * T + columns.clamp(max=T - 1)


class SamePrefix(_Partners, Banded):
    """Pairs (i, j) of positions that have read the same bytes, or of the student's inside what the
    teacher's predicts: `targets` are then the numbers of what it has read of that, elsewhere 0.

    The band's centres lie on the pairs, those inside a token of the teacher's among them.

    Raises ValueError where one of the two sides has no `pairs`, or the teacher no `token_map`.
    """

    rows = "prefix"

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Places in the flattened (B · S) and (B · T): (P,) each."""
        student, teacher = self.batch.student, self.batch.teacher
        if student.pairs is None or teacher.pairs is None or teacher.token_map is None:
            raise ValueError("matching by mapping needs `pairs` of both sides, and a `token_map`")
        return student.pairs, teacher.pairs

    @cached_property
    def compared(self) -> Tensor:
        none = torch.zeros_like(self.batch.student_side.valid)
        return none.flatten().index_fill(0, self.pairs[0], True).view_as(none)

    @cached_property
    def same_prefix(self) -> Tensor:
        """The pairs of positions that have read the same bytes, to the last: (B, S) bool."""
        return self.compared & (self.targets == 0)

    @cached_property
    def inside(self) -> Tensor:
        student, teacher = self.batch.student_side, self.batch.teacher_side
        size = teacher.valid.shape[1]
        partners = (self.partner % size + 1).where(self.compared, 0)
        return pair_band(partners, student.lengths, teacher.lengths, size, self.batch.soft_dtw)

    @cached_property
    def spelt(self) -> Tensor:
        """The student's positions whose token the teacher spells with several: (B, S) bool."""
        none = torch.zeros_like(self.batch.student_side.valid)
        places = self.batch.student.spelt
        if places is None or not self.batch.spells:
            return none
        return none.flatten().index_fill(0, places, True).view_as(none)

    @cached_property
    def partner(self) -> Tensor:
        first = torch.zeros_like(self.compared, dtype=torch.long)
        return first.flatten().index_copy(0, *self.pairs).view_as(first)

    @cached_property
    def targets(self) -> Tensor:
        read, none = self.batch.student.read, torch.zeros_like(self.partner)
        if read is None or self.batch.teacher.continuations is None:
            return none
        return none.flatten().index_copy(0, self.pairs[0], read).view_as(none)
