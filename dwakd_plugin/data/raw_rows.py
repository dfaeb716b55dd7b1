"""A recipe's rows as they were written, each with the prompt that the teacher reads before its
answer.

axolotl loads and renders them, for the teacher's side alone: in its own chat template, with its own
tokenizer. A prompt is what stands before the answer in the rendered row, so that the teacher
answers just where it will be read in training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import axolotl.utils.data.sft as axolotl_sft
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from dwakd_plugin.data.answer_places import (
    PROBE,
    MessagesPlace,
    Place,
    ToolCall,
    find_field,
)
from dwakd_plugin.data.answers import last_answer
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer, teacher_recipe
from dwakd_plugin.data.two_strategies import capture_strategy, templates
from dwakd_plugin.errors import UserError, first_line
from dwakd_plugin.recipe.schema import DWAKDConfig

# Settings of a data set that say where it is, and not what its rows are like.
_WHERE = (
    "path",
    "name",
    "split",
    "data_files",
    "data_dir",
    "revision",
    "trust_remote_code",
    "shards",
    "shards_idx",
    "preprocess_shards",
    "ds_type",
)
# What a prompt doesn't depend on: which parts of a row are learnt.
_AS_ANSWERED = {
    "roles_to_train": ["assistant"],
    "train_on_inputs": False,
    "train_on_eos": "turn",
    "train_on_eot": None,
    "message_field_training": None,
    "message_field_training_detail": None,
}


@dataclass(frozen=True)
class Prompt:
    """The teacher's tokens before an answer. `source` is the row's number in the recipe's data."""

    source: int
    table: int
    row: int
    ids: list[int]


@dataclass
class Prompts:
    """What can be answered of a recipe's rows.

    `left_out` counts by reason. `ends` are the tokens that end an answer in the rendered rows, and
    `behind` is how many more the template writes behind such a token.
    """

    tables: list[Table]
    tokenizer: Any
    longest: int  # tokens of a row on the teacher's side
    found: list[Prompt] = field(default_factory=list)
    left_out: dict[str, int] = field(
        default_factory=lambda: {"too_long": 0, "not_rendered": 0, "tool_call": 0}
    )
    ends: set[int] = field(default_factory=set)
    behind: int = 0


class Table:
    """One data set of a recipe: its rows, and the teacher's rendering of them."""

    def __init__(self, entry: Mapping[str, Any], rows: Dataset, strategy: Any, own: Any) -> None:
        """entry: the recipe's own words; own: those that the teacher's side is rendered by."""
        self.entry = dict(entry)
        self.rows = rows.with_format(None)
        self.name = f"{entry['path']} (type: {_words(entry.get('type'))})"
        self._path = entry["path"]
        self._strategy = strategy
        self._place = self._find_place(own)
        self._blank: tuple[list[int] | None] | None = None  # the prompt of an empty row, once known

    @property
    def shape(self) -> dict[str, Any]:
        """The settings that say what its rows are like."""
        return {key: value for key, value in self.entry.items() if key not in _WHERE}

    def where(self, row: int) -> str:
        return f"Row {row + 1} of {self._path}"

    def answered(self, row: int, answer: str) -> dict[str, Any]:
        """The row with another answer."""
        return self._place.put(self.rows[row], answer)

    def has_answer(self, row: int) -> bool:
        """Whether the row brings an answer of its own."""
        return self._place.has_answer(self.rows[row])

    def prompt(self, row: int) -> tuple[list[int], list[int]] | None:
        """The tokens before the answer, and those from its end on, if it has one; None where the
        answer isn't in what is rendered. Raises ToolCall, and UserError for what isn't a question.
        """
        content = self.rows[row]
        try:
            probed = self._place.put(content, PROBE)
        except ValueError as error:
            raise UserError(
                f"{self.where(row)} has nothing to answer: {error}. Fill it in, or leave it out."
            ) from error
        found = self._cut(probed, row)
        if found is not None and found[0] == self._nothing(content, row):
            raise UserError(
                f"{self.where(row)} has nothing to answer: its prompt is that of an empty row. "
                "Fill it in, or leave it out."
            )
        return found

    def _nothing(self, content: dict[str, Any], row: int) -> list[int] | None:
        """The prompt of a row that asks nothing, as far as this type has one."""
        if self._blank is None:
            blank = self._place.without_prompt(content)
            cut = None if blank is None else self._cut(blank, row)
            self._blank = (None if cut is None else cut[0],)
        return self._blank[0]

    def _find_place(self, own: DictDefault) -> Place:
        prompter = getattr(self._strategy, "prompter", None)
        if str(own.type).startswith(("chat_template", "messages")):
            keys = prompter.message_property_mappings
            return MessagesPlace(
                prompter.field_messages,
                keys.get("role", "role"),
                keys.get("content", "content"),
                prompter.roles,
                prompter.field_thinking,
            )
        first = self.rows[0] if len(self.rows) else {}
        place = find_field(first, self._answer)
        if place is None:
            raise UserError(
                f"{self.name}: no one text field of its rows is the answer, so another answer "
                "cannot be written back. Types that it works for are chat_template, alpaca and the "
                "other instruction types, and formats of your own with a field_output."
            )
        return place

    def _answer(self, row: dict[str, Any]) -> str | None:
        try:
            cut = self._rendered(row)
        except Exception:  # the field was none that this type knows
            return None
        if cut is None:
            return None
        ids, begin, end = cut
        return str(self._strategy.tokenizer.decode(ids[begin:end], skip_special_tokens=True))

    def _cut(self, row: dict[str, Any], number: int) -> tuple[list[int], list[int]] | None:
        try:
            cut = self._rendered(row)
        except Exception as error:  # strategies and templates raise whatever they like
            raise UserError(
                f"{self.where(number)} doesn't fit its type ({_words(self.entry.get('type'))}), or "
                f"the teacher's chat template: {type(error).__name__}: {first_line(error)}"
            ) from error
        if cut is None:
            return None
        ids, begin, end = cut
        tokenizer = self._strategy.tokenizer
        if PROBE not in tokenizer.decode(ids[begin:end]):
            return None
        added = tokenizer.added_tokens_decoder
        ends = [place for place in range(begin, len(ids)) if ids[place] in added]
        return ids[:begin], ids[ends[0] :] if ends else []

    def _rendered(self, row: dict[str, Any]) -> tuple[list[int], int, int] | None:
        """A row's tokens, and where its last labelled run begins and ends; None without one."""
        tokens = self._strategy.tokenize_prompt(copy.deepcopy(row))
        ids, labels = list(tokens["input_ids"]), list(tokens["labels"])
        begin, end = last_answer(labels)
        return (ids, begin, end) if 0 < begin < end else None


def read_prompts(
    cfg: DictDefault, config: DWAKDConfig, entries: list[dict[str, Any]], student_tokenizer: Any
) -> Prompts:
    """The tables of a recipe, loaded, without prompts as yet: `fill` finds these.

    cfg is axolotl's, entries are its data sets in the recipe's own words; the student's tokenizer
    has the chat template that a teacher without one takes. Raises UserError where rows cannot be
    written back.
    """
    tokenizer = load_teacher_tokenizer(config.teacher)
    cfg.train_on_inputs = False
    own = teacher_recipe(cfg, config.teacher, tokenizer)
    original = axolotl_sft.get_dataset_wrapper
    tables: list[Table] = []

    def wrap(dataset_config: DictDefault, tokenizer: Any, cfg: DictDefault, **kwargs: Any) -> Any:
        _, theirs = templates(dataset_config, student_tokenizer, cfg, own, config)
        if str(dataset_config.type).startswith(("chat_template", "messages")):
            theirs = DictDefault({**theirs, **_AS_ANSWERED})
        name = f"{dataset_config.path} (type: {_words(dataset_config.type)})"
        strategy, _, _ = capture_strategy(original, name, theirs, tokenizer, own, kwargs)
        tables.append(Table(entry, kwargs["dataset"], strategy, theirs))
        return kwargs["dataset"], None

    axolotl_sft.get_dataset_wrapper = wrap
    try:
        for written, settings in zip(entries, cfg.datasets, strict=True):
            entry = written
            for dataset_config in datasets_with_name_generator([settings]):
                axolotl_sft._load_and_process_single_dataset(
                    dataset_config=dataset_config,
                    cfg=cfg,
                    tokenizer=tokenizer,
                    split="train",
                    seed=cfg.seed,
                )
    finally:
        axolotl_sft.get_dataset_wrapper = original
    return Prompts(tables, tokenizer, int(own.sequence_len))


def fill(prompts: Prompts, held_out: frozenset[int]) -> Iterator[tuple[int, int]]:
    """Finds the prompts, all but those of rows `held_out`; says how many rows of how many are done.

    Raises UserError for a row that asks nothing, or doesn't fit its type.
    """
    total = sum(len(table.rows) for table in prompts.tables)
    source = 0
    for number, table in enumerate(prompts.tables):
        for row in range(len(table.rows)):
            yield source, total
            if source not in held_out:
                _add(prompts, Prompt(source, number, row, []))
            source += 1
    yield total, total


def _add(prompts: Prompts, prompt: Prompt) -> None:
    try:
        found = prompts.tables[prompt.table].prompt(prompt.row)
    except ToolCall:
        prompts.left_out["tool_call"] += 1
        return
    if found is None:
        prompts.left_out["not_rendered"] += 1
        return
    ids, end = found
    prompts.ends.update(end[:1])
    prompts.behind = max(prompts.behind, len(end) - 1)
    if len(ids) >= prompts.longest:
        prompts.left_out["too_long"] += 1
        return
    prompts.found.append(Prompt(prompt.source, prompt.table, prompt.row, ids))


def _words(kind: Any) -> str:
    return kind if isinstance(kind, str) else "of your own"
