"""One row of the data set becomes student *and* teacher token ids and labels.

Each row goes through axolotl's own tokenising strategy twice, once per tokenizer and chat
template, so that prompt masking, roles and `train_on_inputs` mean on the teacher's side what they
mean on the student's. One row in, one row out: the two sides are aligned by construction, and
merging, shuffling, splitting and saving carry both.

Columns added to axolotl's: `teacher_input_ids`, `teacher_labels`, and `source_row` (the row's place
in the data sets as the recipe lists them).
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axolotl.utils.data.sft as axolotl_sft
import axolotl.utils.data.wrappers as axolotl_wrappers
from axolotl.prompt_strategies.completion import CompletionPromptTokenizingStrategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.data.lock import LOCK_FILE_NAME
from axolotl.utils.data.shared import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from dwakd_plugin.data.answers import AnswerReader
from dwakd_plugin.data.dual_strategy import ANSWERS_COLUMN, STATUS_COLUMN, DualStrategy
from dwakd_plugin.data.row_report import TRAINING, RowReport
from dwakd_plugin.data.teacher_side import (
    default_template,
    fingerprint,
    load_teacher_tokenizer,
    local_files,
    teacher_recipe,
)
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.json_rows import json_rows
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.tokenizers.loading import follows_its_file

TEACHER_COLUMNS = ("teacher_input_ids", "teacher_labels")
SOURCE_COLUMN = "source_row"


@contextlib.contextmanager
def dual_tokenization(cfg: DictDefault, config: DWAKDConfig) -> Iterator[RowReport]:
    """While open, axolotl's data loading tokenises every row for both models.

    Prepared data goes to a folder of its own beside axolotl's, so that rows prepared without a
    teacher, or with another, are never mixed in. The report is complete when the block ends, with
    a UserError where no row is left, or none has a teacher's side that the loss asks for.
    """
    teacher_tokenizer = load_teacher_tokenizer(config.teacher)
    teacher_cfg = teacher_recipe(cfg, config.teacher, teacher_tokenizer)
    prepared_path = cfg.dataset_prepared_path
    folder = Path(prepared_path or DEFAULT_DATASET_PREPARED_PATH) / (
        f"dwakd-{fingerprint(cfg, config, teacher_cfg, teacher_tokenizer)}"
    )
    _remove_half_written(folder)
    report = RowReport()
    original = axolotl_sft.get_dataset_wrapper

    def wrap(dataset_config: DictDefault, tokenizer: Any, cfg: DictDefault, **kwargs: Any) -> Any:
        return _wrap_both_sides(
            original,
            dataset_config,
            (tokenizer, teacher_tokenizer),
            (cfg, teacher_cfg),
            config,
            report,
            kwargs,
        )

    axolotl_sft.get_dataset_wrapper = wrap
    cfg.dataset_prepared_path = str(folder)
    try:
        yield report
    except UserError:
        raise
    except Exception as error:  # the data libraries raise whatever they like, and name no row
        _find_what_is_wrong(cfg, error)
        raise
    finally:
        axolotl_sft.get_dataset_wrapper = original
        cfg.dataset_prepared_path = prepared_path
    report.keep(folder)
    report.check(config.loss.needs_teacher)


def _find_what_is_wrong(cfg: DictDefault, error: Exception) -> None:
    """Raises UserError where a local file of the recipe has a row that is none."""
    for file in local_files(cfg):
        if file.suffix not in (".json", ".jsonl", ".ndjson"):
            continue
        for where, row in json_rows(file):
            if not isinstance(row, dict):
                raise UserError(f"{where} isn't a JSON object, and so not a row.") from error


def _wrap_both_sides(
    original: Callable[..., Any],
    dataset_config: DictDefault,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    recipes: tuple[DictDefault, DictDefault],
    config: DWAKDConfig,
    report: RowReport,
    kwargs: dict[str, Any],
) -> tuple[Dataset, Any]:
    """axolotl's `get_dataset_wrapper` for both sides, the student's first: tokenised rows, and the
    prompter."""
    dataset = kwargs["dataset"]
    (student_tokenizer, teacher_tokenizer), (cfg, teacher_cfg) = tokenizers, recipes
    if not follows_its_file(student_tokenizer, student_tokenizer.name_or_path):
        raise UserError(
            f"The student's tokenizer, loaded as {type(student_tokenizer).__name__}, doesn't cut "
            f"texts as the tokenizer.json in {student_tokenizer.name_or_path} does, so the model "
            "would read another text than it knows. Set `tokenizer_type: PreTrainedTokenizerFast` "
            "in the recipe, which takes that file as it is."
        )
    name = f"{dataset_config.path} (type: {dataset_config.type})"
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"{name} is streamed, and the two sides of a streamed row cannot be checked before "
            "training. Remove `streaming`, so that the rows are prepared first."
        )
    student_dataset_config, teacher_dataset_config = templates(
        dataset_config, student_tokenizer, cfg, teacher_cfg, config
    )
    student_strategy, prompter, process_kwargs = capture_strategy(
        original, name, student_dataset_config, student_tokenizer, cfg, kwargs
    )
    teacher_strategy, _, _ = capture_strategy(
        original, name, teacher_dataset_config, teacher_tokenizer, teacher_cfg, kwargs
    )
    strategy = DualStrategy(
        student_strategy,
        teacher_strategy,
        name,
        readers=(
            AnswerReader(student_tokenizer, cfg.eot_tokens or ()),
            AnswerReader(teacher_tokenizer, teacher_cfg.eot_tokens or ()),
        ),
        lengths=(cfg.sequence_len, teacher_cfg.sequence_len),
        excess_length=(cfg.excess_length_strategy or "drop").lower(),
        different_answers=config.different_answers,
        messages=dataset_config.field_messages or "messages",
        tools=dataset_config.field_tools or "tools",
        teacher_name=config.teacher.tokenizer or config.teacher.base_model,
    )
    start = report.total
    report.sources.append((str(dataset_config.path), start))
    rows = axolotl_wrappers.wrap_dataset_for_tokenized_prompt(strategy, dataset, **process_kwargs)
    statuses = rows[STATUS_COLUMN]
    if not cfg.dataset_exact_deduplication:  # which compares whole rows, numbers included
        rows = rows.add_column(SOURCE_COLUMN, list(range(start, start + len(rows))))
    report.add(statuses, rows[ANSWERS_COLUMN])
    kept = [index for index, status in enumerate(statuses) if status in TRAINING]
    if len(kept) < len(rows):
        rows = rows.select(kept)
    return rows.remove_columns([STATUS_COLUMN, ANSWERS_COLUMN]), prompter


def templates(
    dataset_config: DictDefault,
    student_tokenizer: PreTrainedTokenizerBase,
    cfg: DictDefault,
    teacher_cfg: DictDefault,
    config: DWAKDConfig,
) -> tuple[DictDefault, DictDefault]:
    """The data set's settings for each side: the same, but for the chat templates."""
    student, teacher = copy.deepcopy(dataset_config), copy.deepcopy(dataset_config)
    if str(dataset_config.type).startswith(("chat_template", "messages")):
        asked = dataset_config.chat_template or cfg.chat_template
        if isinstance(student_tokenizer.chat_template, dict) and asked in (
            None,
            "tokenizer_default",
        ):
            student.chat_template = "jinja"
            student.chat_template_jinja = default_template(
                student_tokenizer.chat_template, "The student's tokenizer", "chat_template_jinja"
            )
        # A teacher without a chat template of its own renders the student's.
        teacher.chat_template = "jinja"
        teacher.chat_template_jinja = (
            teacher_cfg.chat_template_jinja
            or get_chat_template_from_config(cfg, student, student_tokenizer)
        )
        if config.teacher.thinking_key is not None:
            teacher.template_thinking_key = config.teacher.thinking_key
    return student, teacher


def capture_strategy(
    original: Callable[..., Any],
    name: str,
    dataset_config: DictDefault,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DictDefault,
    kwargs: dict[str, Any],
) -> tuple[Any, Any, dict[str, Any]]:
    """The strategy that axolotl would have used, its prompter, and how many processes it wanted."""
    captured: list[tuple[Any, dict[str, Any]]] = []

    def capture(strategy: Any, dataset: Any, **process_kwargs: Any) -> Any:
        captured.append((strategy, process_kwargs))
        return dataset

    wrap = axolotl_wrappers.wrap_dataset_for_tokenized_prompt
    axolotl_wrappers.wrap_dataset_for_tokenized_prompt = capture
    try:
        _, prompter = original(
            dataset_config=dataset_config, tokenizer=tokenizer, cfg=cfg, **kwargs
        )
    finally:
        axolotl_wrappers.wrap_dataset_for_tokenized_prompt = wrap
    if not captured:
        raise UserError(
            f"{name} is tokenised already, or in a way that axolotl does not expose, so it cannot "
            "be tokenised again for the teacher. Give the rows as text, for example with "
            "`type: alpaca`, `type: chat_template` or `type: input_output`."
        )
    strategy, process_kwargs = captured[0]
    if isinstance(strategy, CompletionPromptTokenizingStrategy):
        raise UserError(
            f"{name} cuts texts into chunks of tokens, and the chunks of two tokenizers do not "
            "match. Use a type with one response a row: `type: alpaca`, `type: chat_template`, "
            "`type: input_output` or a prompt format of your own."
        )
    return strategy, prompter, process_kwargs


def _remove_half_written(folder: Path) -> None:
    """Removes prepared rows that a killed run has not finished: axolotl would try to read them."""
    if not folder.is_dir():
        return
    # axolotl's own lock: another rank or run may be writing them.
    with FileLock(str(folder / LOCK_FILE_NAME)):
        for prepared in [path for path in folder.iterdir() if path.is_dir()]:
            try:
                json.loads((prepared / "dataset_info.json").read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):  # it is written last
                shutil.rmtree(prepared)
