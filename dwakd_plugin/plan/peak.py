"""A recipe's plan: its worst moment on a card, and the largest micro-batch that fits.

What a run takes in memory and time, from the configs of its models alone. Bytes throughout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dwakd_plugin.models.teacher.kept_states import bytes_per_token, kept_form
from dwakd_plugin.plan.cards import Card
from dwakd_plugin.plan.moments import FILLING, INITIALISATION, moments
from dwakd_plugin.plan.parts import Lengths, Parts
from dwakd_plugin.plan.several import WEIGHTS, assumptions_of, moments_of_several
from dwakd_plugin.plan.step_time import seconds_per_step
from dwakd_plugin.recipe import Recipe

KEPT = "kept by malloc"  # the part's name


@dataclass(frozen=True)
class TeacherPart:
    """What a run takes for one of several teachers."""

    model: str
    weights: float
    parameters: int
    cache_bytes_per_row: float


@dataclass(frozen=True)
class Plan:
    """What a micro-batch of a recipe takes on a card."""

    card: Card
    micro_batch: int
    peak: str  # the phase of a step (or of loading) that takes most
    total: float
    parts: dict[str, float]  # at that moment; they add up to `total`
    largest: dict[str, float]  # of each part, at its own worst moment
    seconds_per_step: float
    cache_bytes_per_row: float
    teacher_name: str
    student_parameters: int
    trained_parameters: int
    teacher_parameters: int
    teachers: dict[str, TeacherPart]  # by name, where there are several; else empty
    lengths: Lengths
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.total <= self.card.usable


def plan(
    recipe: Recipe,
    on: Card,
    *,
    micro_batch: int | None = None,
    response_share: float = 1.0,
    lengths: Lengths | None = None,
) -> Plan:
    """Plans a recipe. Raises UserError.

    Rows are as long as `sequence_len`, with `response_share` of that being response, or have the
    `lengths` given, as far as `sequence_len` lets them.
    """
    batch, config = micro_batch or recipe.micro_batch_size, recipe.config
    several = config.teachers if config.loss.needs_teacher else []
    configs = {one.name: config.of(one) for one in several} if len(several) > 1 else {"": config}
    return _plan(
        {
            name: Parts(dict(recipe.keys), own, on, batch, response_share, lengths)
            for name, own in configs.items()
        }
    )


def largest_micro_batch(
    recipe: Recipe,
    on: Card,
    *,
    response_share: float = 1.0,
    lengths: Lengths | None = None,
    limit: int = 4096,
) -> int:
    """The largest micro-batch whose plan fits on the card; 0 where not even one row does."""

    def fits(batch: int) -> bool:
        return plan(
            recipe, on, micro_batch=batch, response_share=response_share, lengths=lengths
        ).fits

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _plan(runs: dict[str, Parts]) -> Plan:
    """The highest moment; on a CPU, what each part of a step takes at its own worst, added up.

    glibc's malloc keeps freed blocks up to 32 MiB (mallopt(3), DEFAULT_MMAP_THRESHOLD_MAX). That
    the next part of a step finds no use for them is assumed, but that gradients take the place of
    the activations that they are formed from, and the steps that of what was freed before them;
    docs/planning.md has it against recorded runs.
    """
    run, *further = runs.values()
    by_moment = moments_of_several(runs) if further else moments(run)
    # Of several teachers each has its own filling, which names it.
    early = [name for name in by_moment if name.startswith((INITIALISATION, FILLING))]
    before = {name: by_moment.pop(name) for name in early}
    peak = max(by_moment, key=lambda name: sum(by_moment[name].values()))
    largest, parts = _largest(by_moment.values()), by_moment[peak]
    if run.card.kind == "cpu":
        in_turn = _largest(map(_in_place_of_activations, by_moment.values()))
        parts = parts | {KEPT: sum(in_turn.values()) - sum(parts.values())}
    largest = _largest([largest, *before.values(), parts])
    for name, once in before.items():
        if sum(once.values()) > sum(parts.values()):
            peak, parts = name, once
    return Plan(
        card=run.card,
        micro_batch=run.batch,
        peak=peak,
        total=sum(parts.values()),
        parts={part: size for part, size in parts.items() if size > 0},
        largest={part: size for part, size in largest.items() if size > 0},
        seconds_per_step=seconds_per_step(run)
        + sum(seconds_per_step(each, body=False) for each in further),
        cache_bytes_per_row=sum(map(_cache_bytes, runs.values())),
        teacher_name=", ".join(dict.fromkeys(each.teacher.name for each in runs.values())),
        student_parameters=run.student.parameters,
        trained_parameters=run.student.trained,
        teacher_parameters=sum(each.teacher.parameters for each in runs.values()),
        teachers={
            name: TeacherPart(
                each.teacher.name,
                each.weights()[WEIGHTS],
                each.teacher.parameters,
                _cache_bytes(each),
            )
            for name, each in runs.items()
            if further
        },
        lengths=run.lengths,
        assumptions=assumptions_of(runs) if further else tuple(run.assumptions),
    )


def _cache_bytes(run: Parts) -> float:
    """Of a row in a teacher cache."""
    each = bytes_per_token(
        run.teacher.hidden_size, kept_form(run.config.teacher), run.teacher_dtype
    )
    return run.lengths.teacher_response * each


def _in_place_of_activations(parts: dict[str, float]) -> dict[str, float]:
    """With the gradients counted among the student's activations."""
    together = ("gradients", "student activations")
    rest = {part: size for part, size in parts.items() if part not in together}
    return rest | {together[1]: sum(parts.get(part, 0) for part in together)}


def _largest(moments_: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of each part, at its own worst moment."""
    largest: dict[str, float] = {}
    for parts in moments_:
        for part, size in parts.items():
            largest[part] = max(largest.get(part, 0), size)
    return largest
