"""A few rows of each data set tokenised for both sides, before all are: what is wrong, and where.

What axolotl itself would say of a data set that it cannot use comes late, and names no line of the
recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import axolotl.utils.data.sft as axolotl_sft
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.sft import _load_and_process_single_dataset
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.dict import DictDefault

from dwakd_plugin.data.dual_strategy import STATUS_COLUMN
from dwakd_plugin.data.fingerprint import local_files
from dwakd_plugin.data.row_report import TRAINING
from dwakd_plugin.data.several_strategies import strategy_of_all
from dwakd_plugin.data.teacher_side import TeacherSide
from dwakd_plugin.errors import UserError, first_line
from dwakd_plugin.io.json_rows import json_rows

FEW = 8  # rows of a data set that are looked at
MANY = 1000  # where none of them trains: perhaps others do


def check_first_rows(cfg: DictDefault, sides: list[TeacherSide]) -> None:
    """Raises UserError that names each data set of the recipe that cannot be trained on, and why.

    A data set is loaded as axolotl loads it, and some of its rows, spread over it, are tokenised
    for all sides. No model is loaded, and nothing is written but the data libraries' own caches.
    """
    try:
        student_tokenizer = load_tokenizer(cfg)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        name = cfg.tokenizer_config or cfg.base_model
        raise UserError(
            f"The student's tokenizer `{name}` cannot be loaded: {first_line(error)}\n"
            "Give a folder with tokenizer files or a hub id as base_model, or as tokenizer_config."
        ) from error
    original = axolotl_sft.get_dataset_wrapper

    def look(dataset_config: DictDefault, tokenizer: Any, cfg: DictDefault, **kwargs: Any) -> Any:
        if dataset_config.type is None and "input_ids" not in kwargs["dataset"].column_names:
            raise UserError("it has no `type`: write `type: alpaca`, `type: chat_template`, ...")
        strategy, prompter, _ = strategy_of_all(
            original, dataset_config, tokenizer, cfg, sides, kwargs
        )
        _look(strategy, kwargs["dataset"])
        return kwargs["dataset"], prompter

    problems = []
    axolotl_sft.get_dataset_wrapper = look
    try:
        for place, entry, split in _entries(cfg):
            try:
                _load_and_process_single_dataset(
                    dataset_config=entry,
                    cfg=cfg,
                    tokenizer=student_tokenizer,
                    split=split,
                    seed=cfg.seed,
                )
            except UserError as error:
                problems.append(f"{place} ({entry.path}): {error}")
            except Exception as error:  # axolotl and the data libraries raise whatever they like
                problems.append(f"{place} ({entry.path}): {_explained(entry, error)}")
    finally:
        axolotl_sft.get_dataset_wrapper = original
    if problems:
        raise UserError("The recipe's data cannot be trained on:\n" + "\n".join(problems))


def _entries(cfg: DictDefault) -> Iterator[tuple[str, DictDefault, str]]:
    """Each data set of the recipe: its place there, its settings, and the split that is meant."""
    for key, split in (("datasets", "train"), ("test_datasets", "test")):
        for number, entry in enumerate(cfg[key] or []):
            for named in datasets_with_name_generator([entry]):
                yield f"{key}[{number}]", named, split


def _look(strategy: Any, dataset: Any) -> None:
    """Tokenises rows until enough were seen and one trains; raises UserError where none does."""
    if not len(dataset):
        raise UserError("it has no rows")
    found: dict[str, int] = {}
    step = max(1, len(dataset) // MANY)
    order = [*range(0, len(dataset), max(1, len(dataset) // FEW))][:FEW]
    order += [row for row in range(0, len(dataset), step) if row not in order]
    for seen, row in enumerate(order, 1):
        status = strategy.tokenize_prompt(dataset[row])[STATUS_COLUMN]
        found[status] = found.get(status, 0) + 1
        if seen >= min(FEW, len(order)) and not found.keys().isdisjoint(TRAINING):
            return
    which = "of the data" if step == 1 else f"of {len(order):,} rows, spread over the data,"
    reasons = "; ".join(f"{count:,} rows {status}" for status, count in found.items())
    raise UserError(f"No row {which} is left to train on: {reasons}")


def _explained(entry: DictDefault, error: Exception) -> str:
    """Why a data set cannot be loaded: by its file's first bad row, else in the library's words."""
    try:
        explain_bad_file(DictDefault({"datasets": [entry]}), error)
    except UserError as found:
        return str(found)
    return f"it cannot be loaded: {type(error).__name__}: {first_line(error)}"


def explain_bad_file(cfg: DictDefault, error: Exception) -> None:
    """Raises UserError where a local file of the recipe has a row that is none."""
    for file in local_files(cfg):
        if file.suffix not in (".json", ".jsonl", ".ndjson"):
            continue
        for where, row in json_rows(file):
            if not isinstance(row, dict):
                raise UserError(f"{where} isn't a JSON object, and so not a row.") from error
