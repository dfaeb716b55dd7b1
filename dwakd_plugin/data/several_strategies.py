"""A row tokenised for the student and each of several teachers; for one alone, as `dual_strategy`.

A row trains where it does with one of its teachers at least. On the side of a teacher that it
doesn't learn from, it is one token without a label, so that nothing is computed for it there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from dwakd_plugin.data.dual_strategy import ANSWERS_COLUMN, STATUS_COLUMN, DualStrategy
from dwakd_plugin.data.row_report import TAUGHT, TRAINING
from dwakd_plugin.data.teacher_side import TeacherSide
from dwakd_plugin.data.two_strategies import dual_strategy
from dwakd_plugin.models.batches import teacher_columns

_NOTHING = ([0], [-100])  # every vocabulary has the first token


def strategy_of_all(
    original: Callable[..., Any],
    dataset_config: DictDefault,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DictDefault,
    sides: list[TeacherSide],
    kwargs: dict[str, Any],
) -> tuple[DualStrategy | SeveralStrategies, Any, dict[str, Any]]:
    """What tokenises a data set's rows for all sides, and what else `dual_strategy` returns.

    Held-out rows that no teacher names are read by all of them.
    """
    path = str(dataset_config.path)
    teaching = [side for side in sides if side.teacher.teaches(path)] or sides
    found = {
        side.teacher.name: dual_strategy(
            original,
            dataset_config,
            (tokenizer, side.tokenizer),
            (cfg, side.recipe),
            side.config,
            kwargs,
        )
        for side in teaching
    }
    strategy, *further = next(iter(found.values()))
    if len(sides) == 1:
        return strategy, *further
    strategies = {name: each[0] for name, each in found.items()}
    return SeveralStrategies(strategies, [side.teacher.name for side in sides]), *further


class SeveralStrategies:
    """A tokenising strategy that runs one for each teacher of a data set, among all `names`."""

    supports_batched = False

    def __init__(self, strategies: Mapping[str, DualStrategy], names: list[str]) -> None:
        self.strategies = strategies
        self.names = names
        self.filter_rows = next(iter(strategies.values())).filter_rows

    def tokenize_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        found = {name: each.tokenize_prompt(row) for name, each in self.strategies.items()}
        statuses = {name: str(each[STATUS_COLUMN]) for name, each in found.items()}
        # Rows that are cut to fit are cut for each teacher alone; the student reads the longest.
        result = dict(max(found.values(), key=lambda each: len(each["input_ids"])))
        for number, name in enumerate(self.names):
            sides = _NOTHING
            if statuses.get(name) in TAUGHT:
                sides = [found[name][column] for column in teacher_columns(0)]
            result |= dict(zip(teacher_columns(number), sides, strict=True))
        each = {name: (statuses[name], json.loads(found[name][ANSWERS_COLUMN])) for name in found}
        best = [status for status in TRAINING if status in statuses.values()]
        result[STATUS_COLUMN] = next(iter([*best, *statuses.values()]))
        result[ANSWERS_COLUMN] = json.dumps({"each": each})
        return result
