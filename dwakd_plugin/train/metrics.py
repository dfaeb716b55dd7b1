"""What a run logs: sums of the loss's terms since the last log line, and their means."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dwakd_plugin.loss import Figure, LossTerms, every_sum, variant_of
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train.health import shares


class Sums:
    """Of each of LossTerms, over micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: LossTerms) -> None:
        for name, value in vars(terms).items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()

    def over_ranks(self, accelerator: Any) -> dict[str, float]:
        """The sums of all ranks; empty where none added anything. All ranks must take part.

        A rank without a batch takes part with zeros: the others would wait for it.
        """
        zero = torch.zeros((), device=accelerator.device)
        names = every_sum()
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

    Beside those that are logged there are those that only `health` judges.
    """
    if not totals:
        return {}
    figures = {
        figure.name: totals[figure.sums] / totals[figure.per]
        for figure in _figures(config, prefix)
        if totals[figure.per] > 0
    }
    weights = LossTerms.weights(config.loss, kd_ramp)
    return figures | shares({name: weight * totals[name] for name, weight in weights.items()})


def logged(figures: dict[str, float], config: DWAKDConfig, prefix: str) -> dict[str, float]:
    """What of the figures is logged, by its name in the log."""
    return {
        prefix + figure.name: round(figures[figure.name], 5)
        for figure in _figures(config, prefix)
        if figure.logged and figure.name in figures
    }


def _figures(config: DWAKDConfig, prefix: str) -> Iterable[Figure]:
    return variant_of(config.loss).figures(config.loss, evaluating=prefix != "")


def mean_cross_entropy(terms: LossTerms) -> Tensor:
    return terms.ce.detach() / terms.student_tokens.clamp(min=1)


def perplexity(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
