"""One row of the data set becomes student *and* teacher token ids and labels, of each teacher.

Each row goes through axolotl's own tokenising strategy twice, once per tokenizer and chat
template, so that prompt masking, roles and `train_on_inputs` mean on the teacher's side what they
mean on the student's. One row in, one row out: the two sides are aligned by construction, and
merging, shuffling, splitting and saving carry both.

Columns added to axolotl's: `teacher_input_ids`, `teacher_labels` (of further teachers too, see
`models.batches.teacher_columns`), and `source_row` (the row's place in the data sets as the recipe
lists them).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import axolotl.utils.data.sft as axolotl_sft
import axolotl.utils.data.wrappers as axolotl_wrappers
from axolotl.utils.data.lock import LOCK_FILE_NAME
from axolotl.utils.data.shared import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from filelock import FileLock

from dwakd_plugin.data.dual_strategy import ANSWERS_COLUMN, STATUS_COLUMN
from dwakd_plugin.data.fingerprint import fingerprint, strategy_name
from dwakd_plugin.data.first_rows import check_first_rows, explain_bad_file
from dwakd_plugin.data.named_strategy import NamedStrategy
from dwakd_plugin.data.row_report import TRAINING, RowReport
from dwakd_plugin.data.several_strategies import strategy_of_all
from dwakd_plugin.data.teacher_side import TeacherSide, teacher_sides
from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.schema import DWAKDConfig

SOURCE_COLUMN = "source_row"
_WRITTEN_LAST = "dataset_info.json"  # of prepared rows
_FEW = 100_000  # are written in less time than axolotl takes to be imported


@contextlib.contextmanager
def dual_tokenization(cfg: DictDefault, config: DWAKDConfig) -> Iterator[RowReport]:
    """While open, axolotl's data loading tokenises every row for both models.

    Prepared data goes to a folder of its own beside axolotl's, so that rows prepared without a
    teacher, or with another, are never mixed in. The report is complete when the block ends, with
    a UserError where no row is left, or none has a teacher's side that the loss asks for.
    """
    sides = teacher_sides(cfg, config)
    prepared_path = cfg.dataset_prepared_path
    folder = Path(prepared_path or DEFAULT_DATASET_PREPARED_PATH) / (
        f"dwakd-{fingerprint(cfg, sides)}"
    )
    _remove_half_written(folder)
    if not any(folder.glob(f"*/{_WRITTEN_LAST}")):
        check_first_rows(cfg, sides)
    report = RowReport()
    original = axolotl_sft.get_dataset_wrapper

    def wrap(dataset_config: DictDefault, tokenizer: Any, cfg: DictDefault, **kwargs: Any) -> Any:
        return _wrap_all_sides(original, dataset_config, tokenizer, cfg, sides, report, kwargs)

    axolotl_sft.get_dataset_wrapper = wrap
    cfg.dataset_prepared_path = str(folder)
    try:
        with _few_rows_saved_here():
            yield report
    except UserError:
        raise
    except Exception as error:  # the data libraries raise whatever they like, and name no row
        explain_bad_file(cfg, error)
        raise
    finally:
        axolotl_sft.get_dataset_wrapper = original
        cfg.dataset_prepared_path = prepared_path
    report.keep(folder)
    report.check(config.loss.needs_teacher)


@contextlib.contextmanager
def _few_rows_saved_here() -> Iterator[None]:
    """While open, few rows are saved by this process: `datasets` starts another even for one shard,
    which imports axolotl anew before it writes."""
    save = Dataset.save_to_disk

    @wraps(save)
    def here(self: Dataset, *args: Any, num_proc: int | None = None, **further: Any) -> None:
        save(self, *args, num_proc=num_proc if len(self) > _FEW else None, **further)

    Dataset.save_to_disk = here
    try:
        yield
    finally:
        Dataset.save_to_disk = save


def _wrap_all_sides(
    original: Callable[..., Any],
    dataset_config: DictDefault,
    tokenizer: Any,
    cfg: DictDefault,
    sides: list[TeacherSide],
    report: RowReport,
    kwargs: dict[str, Any],
) -> tuple[Dataset, Any]:
    """axolotl's `get_dataset_wrapper` for all sides: tokenised rows, and the prompter."""
    dataset = kwargs["dataset"]
    strategy, prompter, process_kwargs = strategy_of_all(
        original, dataset_config, tokenizer, cfg, sides, kwargs
    )
    start = report.total
    report.sources.append((str(dataset_config.path), start))
    named = NamedStrategy(strategy, strategy_name(cfg, dataset_config, tokenizer))
    rows = axolotl_wrappers.wrap_dataset_for_tokenized_prompt(named, dataset, **process_kwargs)
    # At once: a column is read row by row where it is iterated over.
    statuses, answers = (rows[name][:] for name in (STATUS_COLUMN, ANSWERS_COLUMN))
    if not cfg.dataset_exact_deduplication:  # which compares whole rows, numbers included
        rows = rows.add_column(SOURCE_COLUMN, list(range(start, start + len(rows))))
    report.add(statuses, answers)
    kept = [index for index, status in enumerate(statuses) if status in TRAINING]
    if len(kept) < len(rows):
        rows = rows.select(kept)
    return rows.remove_columns([STATUS_COLUMN, ANSWERS_COLUMN]), prompter


def _remove_half_written(folder: Path) -> None:
    """Removes prepared rows that a killed run has not finished: axolotl would try to read them."""
    if not folder.is_dir():
        return
    # axolotl's own lock: another rank or run may be writing them.
    with FileLock(str(folder / LOCK_FILE_NAME)):
        for prepared in [path for path in folder.iterdir() if path.is_dir()]:
            if prepared.name.startswith("."):  # another rank's, which writes its report (`keep`)
                continue
            try:
                json.loads((prepared / _WRITTEN_LAST).read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                shutil.rmtree(prepared)
