"""Who learns from whom: one file a match. A term asks a match for what it compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from dwakd_plugin.loss.alignment import band_penalty
from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.states import Head, gathered, required_labels

__all__ = ["Banded", "Figure", "Match", "Projecting"]


@dataclass(frozen=True)
class Figure:
    """A figure of a log line: the sum of `sums` over the sum of `per`, both by their names.

    Counts that are always there: `student_tokens` with a label; `distilled_tokens`, those of them
    in samples that have a teacher side; `teacher_tokens`, of samples that have a student side. One
    that is not `logged` is only for `train.health` to watch.
    """

    name: str
    sums: str
    per: str
    logged: bool = True


class Match(ABC):
    """What each position learns from, in one batch; a term asks, and then it is computed.

    Of the class: rows, what the rows' `pairs` are (positions of the same token, or that have read
    the same text); figures, what is logged of the match itself; embeds, whether the student's
    embeddings are read.
    """

    rows: ClassVar[Literal["token", "prefix"] | None] = None
    figures: ClassVar[tuple[Figure, ...]] = ()
    embeds: ClassVar[bool] = False

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    @property
    @abstractmethod
    def compared(self) -> Tensor:
        """(B, S) bool, the student's positions that have something to learn from."""

    @cached_property
    def targets(self) -> Tensor:
        """(B, S) long, what the other side should predict there; any elsewhere. What else it may
        mean to a term's kernel, its class says."""
        return required_labels(self.batch.student)

    @abstractmethod
    def other(self, index: Tensor) -> tuple[Tensor, Head | None]:
        """States (N, ·) that the positions at `index` are compared with, and a head for them.

        Without a head, what a kernel takes as it is.
        """

    def sums(self) -> Mapping[str, Tensor]:
        """The sums of `figures`, of what has been computed."""
        return {}


class Banded(Match):
    """A match that has a band for soft-DTW."""

    @property
    @abstractmethod
    def inside(self) -> Tensor:
        """(B, S, T) bool, the cells within the band."""

    @cached_property
    def penalty(self) -> Tensor | None:
        """What the band adds to the cost (B, S, T); None without a band."""
        config = self.batch.soft_dtw
        return band_penalty(self.inside, config, self.batch.dtype) if config.band else None


class Projecting(Banded):
    """A match through projectors: each side's states in the other's space.

    Of the class: agreeing_only, whether D is taken only where the projected teacher's argmax is the
    target.
    """

    embeds: ClassVar[bool] = True
    agreeing_only: ClassVar[bool] = False

    @property
    @abstractmethod
    def teacher_compared(self) -> Tensor:
        """(B, T) bool."""

    @property
    @abstractmethod
    def teacher_index(self) -> Tensor:
        """The places of `teacher_compared` in the flattened (B · T), or more."""

    @property
    @abstractmethod
    def t2s_hidden(self) -> Tensor:
        """(B, S, d), finite where nothing is compared."""

    @property
    @abstractmethod
    def s2t_hidden(self) -> Tensor:
        """(B, T, D), finite where nothing is compared."""

    @property
    @abstractmethod
    def matrix(self) -> Tensor:
        """(B, S, T), where each student position looks."""

    def other(self, index: Tensor) -> tuple[Tensor, Head]:
        return gathered(self.t2s_hidden, index), self.batch.student.head

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The last position of each sample on both sides, (B, S) and (B, T) bool: none where one of
        the two is not compared."""
        student = self.compared & self.batch.student_side.last
        teacher = self.teacher_compared & self.batch.teacher_side.last
        both = (student.any(1) & teacher.any(1))[:, None]
        return student & both, teacher & both
