"""What a run logs: sums of the loss's terms since the last log line, and their means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dwakd_plugin.loss import LossTerms
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train.health import shares

# What is logged, as (name, sum, count): both are fields of LossTerms.
METRICS = (
    ("ce", "ce", "student_tokens"),
    ("t2s_ce", "t2s_ce", "distilled_tokens"),
    ("student_kd", "student_kd", "distilled_tokens"),
    ("teacher_kd", "teacher_kd", "teacher_tokens"),
    ("hidden_dtw", "hidden_dtw", "distilled_tokens"),
    ("embed_dtw", "embed_dtw", "distilled_tokens"),
    ("uld", "uld", "distilled_tokens"),
    ("paired_share", "paired_tokens", "distilled_tokens"),
    ("t2s_accuracy", "t2s_correct", "paired_tokens"),
    ("gate", "gate", "paired_tokens"),
    ("teacher_ce", "teacher_ce", "paired_tokens"),
    ("paired_ce", "paired_ce", "paired_tokens"),
    ("attention_entropy", "attention_entropy", "distilled_tokens"),
    ("band_share", "band_cells_inside", "band_cells"),
)
# What `health` asks for beyond them.
UNLOGGED = tuple(
    (name, name, count)
    for count, names in (
        ("distilled_tokens", ("attention_spread", "attention_limit")),
        ("end_tokens", ("teacher_end_ce", "end_ce")),
    )
    for name in names
)
LOSS_TERMS = ("ce", "t2s_ce", "student_kd", "teacher_kd", "hidden_dtw", "embed_dtw", "uld")


class Sums:
    """Of each field of LossTerms, over micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.double()

    def over_ranks(self, accelerator: Any) -> dict[str, float]:
        """The sums of all ranks; empty where nothing was added. All ranks must take part."""
        if not self._sums:
            return {}
        values = torch.stack([value.float() for value in self._sums.values()])
        totals = accelerator.reduce(values, reduction="sum").tolist()
        return dict(zip(self._sums, totals, strict=True))


def means(totals: dict[str, float], config: DWAKDConfig, kd_ramp: float) -> dict[str, float]:
    """Means over the tokens that each figure counts, with the shares of the loss.

    Beside those of `METRICS` there are those that `health` judges.
    """
    if not totals:
        return {}
    absent = _absent_figures(config)
    figures = {
        name: totals[total] / totals[count]
        for name, total, count in METRICS + UNLOGGED
        if totals[count] > 0 and name not in absent
    }
    weights = LossTerms.weights(config.loss, kd_ramp)
    return figures | shares({name: weight * totals[name] for name, weight in weights.items()})


def logged(figures: dict[str, float], config: DWAKDConfig, prefix: str) -> dict[str, float]:
    """What of the figures is logged, by its name in the log."""
    active = _active_terms(config)
    return {
        prefix + name: round(figures[name], 5)
        for name, _, _ in METRICS
        if name in figures
        and (name not in LOSS_TERMS or name in active or prefix)
        # Else it is `ce`.
        and (name != "paired_ce" or config.loss.matching in ("exact", "mapped"))
    }


# The terms of `kd_weight`, by `loss.matching`.
_DISTILLING = {
    "attention": {"t2s_ce", "student_kd", "teacher_kd"},
    "exact": {"t2s_ce", "student_kd", "teacher_kd"},
    "mapped": {"student_kd"},
    "order": {"uld"},
}


def _active_terms(config: DWAKDConfig) -> set[str]:
    """The terms that the settings ask for; the others are 0 and not worth a line."""
    active = set()
    if config.loss.ce_weight > 0:
        active.add("ce")
    if config.loss.kd_weight > 0:
        active |= _DISTILLING[config.loss.matching]
    if config.loss.dtw_weight > 0:
        active |= {"hidden_dtw", "embed_dtw"}
    return active


def _absent_figures(config: DWAKDConfig) -> set[str]:
    """Figures of what the settings do not have, in training and in evaluation."""
    attends = config.loss.needs_teacher and config.loss.matching == "attention"
    attention = {"attention_entropy", "attention_spread", "attention_limit"}
    absent = {"paired_share"} if attends else attention
    if not config.loss.trained_projectors:
        kept = _DISTILLING[config.loss.matching] if config.loss.needs_teacher else set()
        absent |= set(LOSS_TERMS) - {"ce"} - kept
    if not config.loss.needs_teacher or config.loss.matching == "order":
        absent |= {"t2s_accuracy", "gate", "teacher_ce", "paired_ce", "teacher_end_ce", "end_ce"}
    if not config.loss.needs_teacher:
        absent |= {"paired_share"}
    if config.loss.matching != "order":
        absent |= {"uld"}
    return absent


def mean_cross_entropy(terms: dict[str, Tensor]) -> Tensor:
    return terms["ce"] / terms["student_tokens"].clamp(min=1)


def perplexity(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
