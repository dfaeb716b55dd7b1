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
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
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

from dwakd_plugin.errors import UserError, first_line
from dwakd_plugin.io.files import replace_file
from dwakd_plugin.io.json_rows import json_rows
from dwakd_plugin.recipe.schema import TeacherConfig
from dwakd_plugin.tokenizers.loading import load_tokenizer

TEACHER_COLUMNS = ("teacher_input_ids", "teacher_labels")
SOURCE_COLUMN = "source_row"
STATUS_COLUMN = "dwakd_status"

# What can become of a row. Only the first two train; the rest say why a row was left out.
KEPT = "kept"
LABELS_ONLY = "kept for its labels only: no response left on the teacher's side"
NO_RESPONSE = "dropped: no response on the student's side"
STUDENT_TRUNCATED = "dropped: the student's sequence_len cuts the whole response away"
STUDENT_TOO_LONG = "dropped: longer than the student's sequence_len"
TEACHER_TOO_LONG = "dropped: longer than the teacher's sequence_len"


@dataclass
class RowReport:
    """What became of the rows, and where a `source_row` comes from."""

    counts: dict[str, int] = field(default_factory=dict)
    sources: list[tuple[str, int]] = field(default_factory=list)  # (path, first source_row)

    @property
    def kept(self) -> int:
        return self.counts.get(KEPT, 0) + self.counts.get(LABELS_ONLY, 0)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def locate(self, source_row: int) -> str:
        """`source_row` in words: which row of which data set."""
        for path, start in reversed(self.sources):
            if source_row >= start:
                return f"row {source_row - start} of {path}"
        return f"row {source_row}"


def load_teacher_tokenizer(teacher: TeacherConfig) -> PreTrainedTokenizerBase:
    """The teacher's own tokenizer. Raises UserError where there is none to load."""
    name = teacher.tokenizer or teacher.base_model
    return load_tokenizer(
        name,
        f"The teacher's tokenizer `{name}`",
        "Give a folder with tokenizer files or a hub id as dwakd.teacher.base_model (or "
        "dwakd.teacher.tokenizer).",
        end_remedy="Give a tokenizer that has one as dwakd.teacher.tokenizer.",
        revision=teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
    )


def teacher_recipe(
    cfg: DictDefault, teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase
) -> DictDefault:
    """The recipe as the teacher's side of each row sees it: its length, its template, no overrides.

    The student's special-token overrides and end-of-turn tokens are not the teacher's.
    """
    own = copy.deepcopy(cfg)
    own.sequence_len = teacher.sequence_len or cfg.sequence_len
    own.special_tokens = None
    own.eot_tokens = None
    own.chat_template_jinja = teacher.chat_template or tokenizer.chat_template
    return own


def fingerprint(
    cfg: DictDefault, teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Names what the teacher's side of prepared rows depends on; axolotl's own hash ignores it."""
    # All of it: two tokenizers may share a vocabulary and cut or begin texts in different ways.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    content = {
        "columns": [*TEACHER_COLUMNS, SOURCE_COLUMN],
        "tokenizer": hashlib.sha256(json.dumps(rules).encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "class": type(tokenizer).__name__,
        "chat_template": teacher.chat_template or tokenizer.chat_template,
        "sequence_len": teacher.sequence_len or cfg.sequence_len,
        "excess_length_strategy": cfg.excess_length_strategy,
        "min_sample_len": cfg.min_sample_len,
        "eval_sequence_len": cfg.eval_sequence_len,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def dual_tokenization(cfg: DictDefault, teacher: TeacherConfig) -> Iterator[RowReport]:
    """While open, axolotl's data loading tokenises every row for both models.

    Prepared data goes to a folder of its own beside axolotl's, so that rows prepared without a
    teacher, or with another, are never mixed in. The report is complete when the block ends.
    """
    teacher_tokenizer = load_teacher_tokenizer(teacher)
    teacher_cfg = teacher_recipe(cfg, teacher, teacher_tokenizer)
    prepared_path = cfg.dataset_prepared_path
    folder = Path(prepared_path or DEFAULT_DATASET_PREPARED_PATH) / (
        f"dwakd-{fingerprint(cfg, teacher, teacher_tokenizer)}"
    )
    _remove_half_written(folder)
    report = RowReport()
    original = axolotl_sft.get_dataset_wrapper

    def wrap(dataset_config: DictDefault, tokenizer: Any, cfg: DictDefault, **kwargs: Any) -> Any:
        return _wrap_both_sides(
            original, dataset_config, tokenizer, cfg, teacher_tokenizer, teacher_cfg, report, kwargs
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
    _keep_report(report, folder)
    if not report.kept and report.total:
        reasons = "\n".join(f"  {count} rows {status}" for status, count in report.counts.items())
        raise UserError(f"No row of the data is left to train on:\n{reasons}")


def _find_what_is_wrong(cfg: DictDefault, error: Exception) -> None:
    """Raises UserError where a local file of the recipe has a row that is none."""
    for dataset in [*(cfg.datasets or []), *(cfg.test_datasets or [])]:
        named = dataset.data_files or dataset.path
        places = [Path(str(name)) for name in (named if isinstance(named, list) else [named])]
        files = [file for place in places for file in [place, *sorted(place.glob("*"))]]
        for file in files:
            if file.suffix not in (".json", ".jsonl", ".ndjson") or not file.is_file():
                continue
            for where, row in json_rows(file):
                if not isinstance(row, dict):
                    raise UserError(f"{where} is no JSON object, and so no row.") from error


def _wrap_both_sides(
    original: Callable[..., Any],
    dataset_config: DictDefault,
    student_tokenizer: PreTrainedTokenizerBase,
    cfg: DictDefault,
    teacher_tokenizer: PreTrainedTokenizerBase,
    teacher_cfg: DictDefault,
    report: RowReport,
    kwargs: dict[str, Any],
) -> tuple[Dataset, Any]:
    """axolotl's `get_dataset_wrapper` for both tokenizers: tokenised rows, and the prompter."""
    dataset = kwargs["dataset"]
    name = f"{dataset_config.path} (type: {dataset_config.type})"
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"{name} is streamed, and the two sides of a streamed row cannot be checked before "
            "training. Remove `streaming`, so that the rows are prepared first."
        )
    teacher_dataset_config = copy.deepcopy(dataset_config)
    if str(dataset_config.type).startswith(("chat_template", "messages")):
        # A teacher without a chat template of its own renders the student's.
        teacher_dataset_config.chat_template = "jinja"
        teacher_dataset_config.chat_template_jinja = (
            teacher_cfg.chat_template_jinja
            or get_chat_template_from_config(cfg, dataset_config, student_tokenizer)
        )

    student_strategy, prompter, process_kwargs = _capture_strategy(
        original, name, dataset_config, student_tokenizer, cfg, kwargs
    )
    teacher_strategy, _, _ = _capture_strategy(
        original, name, teacher_dataset_config, teacher_tokenizer, teacher_cfg, kwargs
    )
    strategy = _DualStrategy(
        student_strategy,
        teacher_strategy,
        name,
        student_len=cfg.sequence_len,
        teacher_len=teacher_cfg.sequence_len,
        excess_length=(cfg.excess_length_strategy or "drop").lower(),
    )
    start = sum(count for count in report.counts.values())
    report.sources.append((str(dataset_config.path), start))
    rows = axolotl_wrappers.wrap_dataset_for_tokenized_prompt(strategy, dataset, **process_kwargs)
    statuses = rows[STATUS_COLUMN]
    if not cfg.dataset_exact_deduplication:  # which compares whole rows, numbers included
        rows = rows.add_column(SOURCE_COLUMN, list(range(start, start + len(rows))))
    for status, count in Counter(statuses).items():
        report.counts[status] = report.counts.get(status, 0) + count
    kept = [index for index, status in enumerate(statuses) if status in (KEPT, LABELS_ONLY)]
    if len(kept) < len(rows):
        rows = rows.select(kept)
    return rows.remove_columns(STATUS_COLUMN), prompter


def _capture_strategy(
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


class _DualStrategy:
    """A tokenising strategy for axolotl's data set wrapper that runs two, and judges the row."""

    supports_batched = False

    def __init__(
        self,
        student: Any,
        teacher: Any,
        name: str,
        *,
        student_len: int,
        teacher_len: int,
        excess_length: str,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.name = name
        self.student_len = student_len
        self.teacher_len = teacher_len
        self.excess_length = excess_length
        self.filter_rows = getattr(student, "filter_rows", None)

    def tokenize_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        row = dict(row)  # which decodes it
        # Strategies may edit the row in place, and both must see what the user wrote.
        student = dict(self._tokenize(self.student, copy.deepcopy(row)))
        teacher = dict(self._tokenize(self.teacher, copy.deepcopy(row)))
        status = self._status(student, teacher)
        if self.excess_length == "truncate":
            teacher = {key: teacher[key][: self.teacher_len] for key in ("input_ids", "labels")}
        return {
            **student,
            "teacher_input_ids": teacher["input_ids"],
            "teacher_labels": teacher["labels"],
            STATUS_COLUMN: status,
        }

    def _tokenize(self, strategy: Any, row: dict[str, Any]) -> dict[str, Any]:
        try:
            tokens = strategy.tokenize_prompt(row)
            ids, labels = tokens["input_ids"], tokens["labels"]
        except Exception as error:  # strategies and templates raise whatever they like
            raise UserError(
                f"A row of {self.name} does not fit its type: {type(error).__name__}: "
                f"{first_line(error)}\nThe row: {_preview(row)}"
            ) from error
        if len(ids) != len(labels) or not all(isinstance(each, int) for each in ids):
            raise UserError(
                f"A row of {self.name} does not become one sequence of tokens, so its two sides "
                "cannot be paired. Give each field as one text, and use `type: alpaca`, "
                f"`type: chat_template` or `type: input_output`.\nThe row: {_preview(row)}"
            )
        return tokens

    def _status(self, student: dict[str, Any], teacher: dict[str, Any]) -> str:
        if not _has_response(student["labels"]):
            return NO_RESPONSE
        truncate = self.excess_length == "truncate"
        if len(student["input_ids"]) > self.student_len:
            if not truncate:
                return STUDENT_TOO_LONG
            if not _has_response(student["labels"][: self.student_len]):
                return STUDENT_TRUNCATED
        teacher_labels = teacher["labels"]
        if len(teacher["input_ids"]) > self.teacher_len:
            if not truncate:
                return TEACHER_TOO_LONG
            teacher_labels = teacher_labels[: self.teacher_len]
        return KEPT if _has_response(teacher_labels) else LABELS_ONLY


def _has_response(labels: list[int]) -> bool:
    """Whether any position predicts something: the first label has no position before it."""
    return any(label != -100 for label in labels[1:])


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


def _keep_report(report: RowReport, folder: Path) -> None:
    """Saves the report beside the prepared rows, or reads it back when those were reused."""
    file = folder / "rows.json"
    if report.sources and folder.is_dir():
        replace_file(file, json.dumps(asdict(report), indent=1))
    elif not report.sources and file.is_file():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            report.counts.update({str(status): int(n) for status, n in saved["counts"].items()})
            report.sources.extend((str(path), int(start)) for path, start in saved["sources"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} is damaged ({error}). Remove the folder {folder}: its rows are prepared "
                "again."
            ) from error


def _preview(row: dict[str, Any], limit: int = 200) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[:limit] + " …"
