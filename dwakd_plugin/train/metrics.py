"""What a run logs: sums of the loss's terms since the last log line, and their means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dwakd_plugin.loss import Figure, LossTerms, every_sum, variant_of
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train.health import shares
from dwakd_plugin.train.parts import Part, prefixes

# Sums that are of the rows, whichever teachers they have.
_OF_LABELS = ("ce", "student_tokens")


class Sums:
    """Of each of LossTerms, over micro-batches.

    Of several teachers, also each one's own, behind its prefix; then those without one are of the
    objective, in which a teacher has a share of each row.
    """

    def __init__(self, prefixes: Sequence[str] = ("",)) -> None:
        self._prefixes = prefixes
        self._sums: dict[str, Tensor] = {}

    def add(self, parts: Sequence[Part]) -> None:
        for part in parts:
            for name, value in vars(part.terms).items():
                self._add_part(part, name, value.detach().double())

    def _add_part(self, part: Part, name: str, value: Tensor) -> None:
        if len(self._prefixes) == 1:
            self._put(name, value)
        elif name in _OF_LABELS:
            self._put(name, value if part.labels else 0 * value)
        else:
            self._put(name, part.share * value)
            if part.whose:
                self._put(part.whose + name, value)

    def _put(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value

    def over_ranks(self, accelerator: Any) -> dict[str, float]:
        """The sums of all ranks; empty where none added anything. All ranks must take part.

        A rank without a batch takes part with zeros: the others would wait for it.
        """
        zero = torch.zeros((), device=accelerator.device)
        own = self._prefixes if len(self._prefixes) > 1 else ()
        names = [whose + name for whose in ("", *own) for name in every_sum()]
        values = torch.stack(
            [zero + bool(self._sums), *(self._sums.get(name, zero).float() for name in names)]
        )
        added, *totals = accelerator.reduce(values, reduction="sum").tolist()
        return dict(zip(names, totals, strict=True)) if added else {}


class LabelCounts:
    """How often each token was a label, of this rank's rows, which are drawn as the others' are."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._counts = torch.zeros(tokens, dtype=torch.int32, device=device)

    def add(self, labels: Tensor) -> None:
        labels = labels.flatten()
        self._counts.scatter_add_(0, labels.clamp(min=0), labels.ne(-100).int())

    def chance(self) -> float:
        """How often guessing the most frequent one would be right."""
        return (self._counts.max() / self._counts.sum().clamp(min=1)).item()


def means(
    totals: dict[str, float], config: DWAKDConfig, kd_ramp: float, prefix: str
) -> dict[str, float]:
    """Means over the tokens that each figure counts, with the shares of the loss.

    Where there are several teachers, each one's own stand behind its name: `maths/student_kd`.
    Beside those that are logged there are those that only `health` judges.
    """
    if not totals:
        return {}
    figures = {
        whose + figure.name: totals[whose + figure.sums] / totals[whose + figure.per]
        for whose in {"", *prefixes(config)}
        for figure in _figures(config, prefix)
        if totals.get(whose + figure.per, 0) > 0
    }
    weights = LossTerms.weights(config.loss, kd_ramp)
    return figures | shares({name: weight * totals[name] for name, weight in weights.items()})


def logged(figures: dict[str, float], config: DWAKDConfig, prefix: str) -> dict[str, float]:
    """What of the figures is logged, by its name in the log."""
    return {
        prefix + whose + figure.name: round(figures[whose + figure.name], 5)
        for whose in dict.fromkeys(("", *prefixes(config)))
        for figure in _figures(config, prefix)
        if figure.logged and whose + figure.name in figures
    }


def _figures(config: DWAKDConfig, prefix: str) -> Iterable[Figure]:
    return variant_of(config.loss).figures(config.loss, evaluating=prefix != "")


def perplexity(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
