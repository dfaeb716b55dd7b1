"""The loss of a batch in parts: of the rows that have the same teachers, one for each of these.

    L = λ_CE Σ_b ce_b + Σ_b Σ_{k ∈ K_b} π_kb (λ_KD kd_kb + λ_DTW dtw_kb)

    π_kb = w_k / Σ_{j ∈ K_b} w_j

K_b are the teachers on whose side row b has a response, and w_k their weights in the recipe. So a
row with one teacher learns from that one in full, and the labels count once, however many there
are. With one teacher in all there is one part, of all rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwakd_plugin.data.collator import TAUGHT_BY, sides_of_teachers
from dwakd_plugin.loss import LossTerms, ResponseStates
from dwakd_plugin.recipe.schema import DWAKDConfig, LossConfig
from dwakd_plugin.train.distillation import Distillation

Sides = tuple[ResponseStates, ResponseStates | None]  # the student's, and a teacher's
ALIGNED_STATES = ("pairs", "read", "spelt", "spelt_read")  # of the student, with one teacher
TermsOf = Callable[[ResponseStates, ResponseStates | None, LossConfig], LossTerms]


class Part(NamedTuple):
    """Terms by one teacher, of rows that have the same teachers.

    whose    what stands before this teacher's figures in the log; empty for the only one
    share    π of these rows
    labels   whether this part has the rows' cross-entropy, which one of theirs has
    loss     the λ that the terms have here
    """

    whose: str
    share: float
    labels: bool
    loss: LossConfig
    terms: LossTerms


def prefixes(config: DWAKDConfig) -> tuple[str, ...]:
    """What stands before each teacher's own figures in the log; empty where there is but one."""
    if len(config.teachers) < 2:
        return ("",)
    return tuple(f"{teacher.name}/" for teacher in config.teachers)


def sides_of(
    distillation: Distillation, batch: dict[str, Any], student: ResponseStates
) -> list[Sides]:
    """Both sides of a collated batch for each teacher; no teacher's where no row asks for it."""
    teachers: Sequence[Any] = distillation.teachers or (None,)
    taught_by = batch.get(TAUGHT_BY, [[0]])
    asked = {number for own in taught_by for number in own}
    sides: list[Sides] = []
    for number, (teacher, own) in enumerate(zip(teachers, sides_of_teachers(batch), strict=True)):
        states = teacher.states(own) if teacher is not None and number in asked else None
        aligned = {name: own.get(f"student_{name}") for name in ALIGNED_STATES}
        sides.append((replace(student, **aligned) if number else student, states))
    return sides


def parts_of(
    config: DWAKDConfig,
    sides: Sequence[Sides],
    taught_by: Sequence[Sequence[int]] | None,
    loss: LossConfig,
    terms_of: TermsOf,
) -> list[Part]:
    """The parts of a batch's loss, with `loss` as the λ of the whole.

    taught_by: the numbers of each row's teachers, where there are several (`DualCollator`).
    """
    if taught_by is None:
        ((student, teacher),) = sides
        return [Part("", 1.0, True, loss, terms_of(student, teacher, loss))]
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, own in enumerate(taught_by):
        groups[tuple(own)].append(place)
    parts = []
    for own, rows in groups.items():
        places = None if len(rows) == len(taught_by) else rows
        if not own:
            parts.append(_part("", 0.0, True, loss, (sides[0][0], None), places, terms_of))
        whole = sum(config.teachers[number].weight for number in own)
        for number in own:
            share, name = config.teachers[number].weight / whole, prefixes(config)[number]
            labels = number == own[0]
            parts.append(_part(name, share, labels, loss, sides[number], places, terms_of))
    return parts


def _part(
    whose: str,
    share: float,
    labels: bool,
    loss: LossConfig,
    sides: Sides,
    places: list[int] | None,
    terms_of: TermsOf,
) -> Part:
    own = loss.model_copy(
        update={
            "ce_weight": loss.ce_weight if labels else 0.0,
            "kd_weight": share * loss.kd_weight,
            "dtw_weight": share * loss.dtw_weight,
            "cosine_weight": share * loss.cosine_weight,
        }
    )
    student, teacher = sides
    if places is not None:
        rows = torch.tensor(places, device=student.hidden.device)
        student = student.samples(rows)
        teacher = None if teacher is None else teacher.samples(rows)
    return Part(whose, share, labels, own, terms_of(student, teacher, own))


def objective(parts: Sequence[Part], kd_ramp: float) -> Tensor:
    """The sum over all parts, which the trainer divides by the labels of the step."""
    return reduce(add, (part.terms.total(part.loss, kd_ramp) for part in parts))


def label_tokens(parts: Sequence[Part]) -> Tensor:
    """How many labels the batch has."""
    return reduce(add, (part.terms.student_tokens for part in parts if part.labels))


def mean_cross_entropy(parts: Sequence[Part]) -> Tensor:
    """The labels' cross-entropy per token, without a graph."""
    sums = reduce(add, (part.terms.ce.detach() for part in parts if part.labels))
    return sums / label_tokens(parts).clamp(min=1)
