"""What is known of a term and of a variant: log, health and projectors follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.head_pass import Kernel, through_student_head
from dwakd_plugin.loss.matches import Figure, Match
from dwakd_plugin.loss.states import gathered, padded, required_labels, response_index
from dwakd_plugin.recipe.schema import LossConfig

Role = Literal["labels", "teach", "hidden", "projector", "warp"]


M = TypeVar("M", bound=Match)


@dataclass(frozen=True)
class HeadPasses(Generic[M]):
    """A batch and its match, and what the student's head says of each token, computed once."""

    batch: Batch
    match: M
    kernel: Kernel
    weights: Sequence[Tensor] | None = None  # (B, S) of each differentiable column, where known
    shared: dict[str, Tensor] = field(default_factory=dict)  # what one term found for another

    @property
    def student(self) -> tuple[Tensor, ...]:
        """The kernel's columns, (B, S) each; 0 where there is no label."""
        return self._student[0]

    @property
    def weighted(self) -> Tensor | None:
        """Σ weights · columns, whose gradients are formed with it; None where that can't be."""
        return self._student[1]

    @cached_property
    def _student(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        student, match = self.batch.student, self.match
        index, labels = response_index(student), required_labels(student)
        hidden, targets, heads = gathered(student.hidden, index), labels, [student.head]
        other, other_head = hidden.new_zeros(len(index), 0), None
        if not self.kernel.alone:
            targets = match.targets
            other, other_head = match.other(index)
            heads += [] if other_head is None else [other_head]
        columns, weighted = through_student_head(
            self.kernel,
            hidden,
            other,
            gathered(labels, index),
            gathered(targets, index),
            student.head,
            other_head,
            self.batch.chunk(*heads),
            self.batch.product,
            self.weights and [gathered(each, index) for each in self.weights],
        )
        return tuple(padded(column, index, labels) for column in columns), weighted


def no_column(passes: HeadPasses[Any]) -> tuple[Tensor, ...]:
    """The `weights` of a term that reads nothing of the student's head: all of it is `beside`."""
    return ()


@dataclass(frozen=True)
class Term:
    """One sum of the objective; its equation stands where it is made.

    role      what it is for: the labels, teaching the student, drawing its hidden states to the
              teacher's, teaching a projector, or warping sequences onto one another; ce_weight
              weighs the first, cosine_weight the third, dtw_weight the last, kd_weight the others
    value     passes → its sum by its name, with a graph, and the sums of its figures
    per       the count that its line in the log divides by
    kernel    what the pass through the student's head has to yield for it
    weights   passes → the weight of each column of that pass in its sum, (B, S), where these are
              known before the pass: then backward needs none of its own
    beside    among the sums of `value` the part of it that has a pass of its own, and so isn't in
              the columns
    trains    the projectors that it trains
    figures   what else is logged of it
    ramps     whether `kd_warmup_steps` holds it back at first (D6)
    needs_states  whether it reads the teacher's states; else the teacher's `top` will do
    embeds    whether it reads the embeddings of what is to be predicted, whatever the match reads
    """

    name: str
    role: Role
    value: Callable[[HeadPasses[Any]], Mapping[str, Tensor]]
    per: str = "distilled_tokens"
    kernel: Callable[[Batch], Kernel] | None = None
    weights: Callable[[HeadPasses[Any]], Sequence[Tensor] | None] | None = None
    beside: str | None = None
    trains: frozenset[str] = frozenset()
    figures: tuple[Figure, ...] = ()
    ramps: bool = False
    needs_states: bool = True
    embeds: bool = False

    def weight(self, loss: LossConfig, kd_ramp: float = 1.0) -> float:
        """Its λ."""
        if self.role == "labels":
            return loss.ce_weight
        if self.role == "hidden":
            return loss.cosine_weight
        weight = loss.dtw_weight if self.role == "warp" else loss.kd_weight
        return weight * kd_ramp if self.ramps else weight


@dataclass(frozen=True)
class Variant:
    """What `loss.matching` stands for: who learns from whom, and the terms in their order.

    in_words       the distillation in a run's report; `{divergence}` is filled in
    always_trains  projectors that train while any term asks for the teacher
    follows_head   projectors that aren't parameters, as they follow the student's head
    unlogged       figures that say nothing here, and are left to health
    """

    match: type[Match]
    terms: tuple[Term, ...]
    in_words: str
    always_trains: frozenset[str] = frozenset()
    follows_head: frozenset[str] = frozenset()
    unlogged: frozenset[str] = frozenset()

    def needs_states(self, loss: LossConfig) -> bool:
        """Whether the teacher's states are needed; else its `top` will do (`ResponseStates`)."""
        return any(term.needs_states for term in self.active(loss))

    def needs_embeds(self, loss: LossConfig) -> bool:
        """Whether the student's embeddings are read."""
        read = self.match.embeds or any(term.embeds for term in self.active(loss))
        return loss.needs_teacher and read

    def active(self, loss: LossConfig) -> tuple[Term, ...]:
        """The terms that have a weight; the others are not computed."""
        return tuple(term for term in self.terms if term.weight(loss) > 0)

    def figures(self, loss: LossConfig, *, evaluating: bool = False) -> Iterator[Figure]:
        """What a log line has of these settings; an evaluation has the labels' in any case."""
        active = self.active(loss)
        for term in self.terms:
            if term in active or (evaluating and term.role == "labels"):
                yield Figure(term.name, term.name, term.per)
        for figure in (
            *(figure for term in active for figure in term.figures),
            *(self.match.figures if loss.needs_teacher else ()),
        ):
            logged = figure.logged and figure.name not in self.unlogged
            yield Figure(figure.name, figure.sums, figure.per, logged)

    def trained_projectors(self, loss: LossConfig) -> frozenset[str]:
        """The projectors that these settings train; where there are none, none are made."""
        always = self.always_trains if loss.needs_teacher else frozenset()
        return always.union(*(term.trains for term in self.active(loss))) - self.follows_head
