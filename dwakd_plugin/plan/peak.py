"""A recipe's plan: its worst moment on a card, and the largest micro-batch that fits.

What a run takes in memory and time, from the configs of its models alone. Bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.teacher.kept_states import bytes_per_token
from dwakd_plugin.plan.cards import Card
from dwakd_plugin.plan.moments import BEFORE, moments
from dwakd_plugin.plan.parts import Lengths, Parts, total
from dwakd_plugin.plan.step_time import seconds_per_step
from dwakd_plugin.recipe.schema import parse_recipe

KEPT = "kept by malloc"  # the part's name
# malloc's heap ends between the most that was on it at one moment (every freed block used again)
# and the sum of each part's own most (none, as long-lived blocks lie between). So far from the one
# to the other: one figure for all, fitted to the measurements in docs/planning.md.
NOT_USED_AGAIN = 0.4


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
    lengths: Lengths
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.total <= self.card.usable


def plan(
    recipe: dict[str, Any],
    on: Card,
    *,
    micro_batch: int | None = None,
    response_share: float = 1.0,
    lengths: Lengths | None = None,
) -> Plan:
    """Plans an effective recipe (with its `dwakd:` block). Raises UserError.

    Rows are as long as `sequence_len`, with `response_share` of that being response, or have the
    `lengths` given, as far as `sequence_len` lets them.
    """
    config = parse_recipe(recipe)
    if config is None:
        raise UserError("The recipe does not say `distillation: dwakd`.")
    batch = micro_batch or int(recipe.get("micro_batch_size") or 1)
    return _plan(Parts(recipe, config, on, batch, response_share, lengths))


def largest_micro_batch(
    recipe: dict[str, Any],
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


def _plan(run: Parts) -> Plan:
    by_moment = moments(run)
    totals = {name: total(parts.values()) for name, parts in by_moment.items()}
    name, highest = max(totals.items(), key=lambda item: item[1].total)
    peak = highest.total
    if run.card.kind == "cpu":
        # malloc keeps small blocks once a step has had them, whatever they were for.
        steps = {moment: size for moment, size in totals.items() if moment not in BEFORE}
        heap = max(size.heap for size in steps.values())
        apart: dict[str, float] = {}
        for sizes in by_moment.values():
            for part, size in sizes.items():
                apart[part] = max(apart.get(part, 0), size.heap)
        heap += NOT_USED_AGAIN * max(0, sum(apart.values()) - heap)
        moment = max(steps, key=lambda one: (steps[one].mapped, steps[one].heap))
        if heap + steps[moment].mapped > peak:
            name, peak = moment, heap + steps[moment].mapped
    parts = {part: size.total for part, size in by_moment[name].items()}
    parts[KEPT] = peak - totals[name].total
    largest: dict[str, float] = {}
    for sizes in by_moment.values():
        for part, size in sizes.items():
            largest[part] = max(largest.get(part, 0), size.total)
    largest[KEPT] = parts[KEPT]
    return Plan(
        card=run.card,
        micro_batch=run.batch,
        peak=name,
        total=peak,
        parts={part: size for part, size in parts.items() if size > 0},
        largest={part: size for part, size in largest.items() if size > 0},
        seconds_per_step=seconds_per_step(run),
        cache_bytes_per_row=run.lengths.teacher_response
        * bytes_per_token(
            run.teacher.hidden_size, run.config.teacher.cache_dtype, run.teacher_dtype
        ),
        teacher_name=run.teacher.name,
        student_parameters=run.student.parameters,
        trained_parameters=run.student.trained,
        teacher_parameters=run.teacher.parameters,
        lengths=run.lengths,
        assumptions=tuple(run.assumptions),
    )
