"""Each row through axolotl's strategies twice: the same text on both sides, or a reason why not."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer

from dwakd_plugin.data.dual_strategy import DualStrategy
from dwakd_plugin.data.dual_tokenization import _remove_half_written, dual_tokenization
from dwakd_plugin.data.first_rows import explain_bad_file
from dwakd_plugin.data.row_report import (
    CUT,
    KEPT,
    LABELS_ONLY,
    NO_RESPONSE,
    STUDENT_TOO_LONG,
    STUDENT_TRUNCATED,
    TEACHER_TOO_LONG,
    RowReport,
)
from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.schema import parse_recipe
from tests.conftest import CHAT_TEMPLATE, ROWS, write_rows

Recipe = Callable[..., dict[str, Any]]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "Nothing more."},
        ]
    }
    for row in ROWS
]


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[[dict[str, Any]], tuple[Any, RowReport]]:
    """A recipe's prepared training rows, and the report on them."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager

    def run(settings: dict[str, Any]) -> tuple[Any, RowReport]:
        file = tmp_path / "recipe.yml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        PluginManager.get_instance().plugins.clear()
        cfg = load_cfg(str(file))
        config = parse_recipe(settings)
        if config is None:  # without a teacher
            return load_datasets(cfg=cfg), RowReport()
        with dual_tokenization(cfg, config) as report:
            datasets = load_datasets(cfg=cfg)
        return datasets, report

    return run


def texts(lab: Path, row: dict[str, Any]) -> tuple[str, str]:
    """What the labels of both sides say, without special tokens."""
    sides = (("student", "labels"), ("teacher", "teacher_labels"))
    student, teacher = (
        AutoTokenizer.from_pretrained(lab / model).decode(
            [label for label in row[column] if label != -100], skip_special_tokens=True
        )
        for model, column in sides
    )
    return student, teacher


FORMATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "alpaca": ({"type": "alpaca"}, ROWS),
    "chat_template": (
        {"type": "chat_template", "chat_template": "chatml", "field_messages": "messages"},
        CHATS,
    ),
    "user_defined": (
        {
            "type": {
                "field_instruction": "instruction",
                "field_output": "output",
                "format": "Q: {instruction}\nA: ",
                "no_input_format": "Q: {instruction}\nA: ",
            }
        },
        ROWS,
    ),
    "input_output": (
        {"type": "input_output"},
        [
            {
                "segments": [
                    {"label": False, "text": f"Q: {row['instruction']}\nA: "},
                    {"label": True, "text": row["output"]},
                ]
            }
            for row in ROWS
        ],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_both_sides_have_the_same_response(
    name: str, recipe: Recipe, prepare: Any, lab: Path, tmp_path: Path
) -> None:
    entry, rows = FORMATS[name]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    settings = recipe({}, datasets=[{"path": path, **entry}], sequence_len=512)
    datasets, report = prepare(settings)
    assert len(datasets.train_dataset) == len(rows) == report.kept
    for row in datasets.train_dataset:
        student, teacher = texts(lab, row)
        # A chat template may end a turn with a newline after its end token, on one side only.
        assert student.strip() == teacher.strip()
        source = rows[row["source_row"]]
        said = source.get("output") or (
            source["segments"][1]["text"]
            if "segments" in source
            else source["messages"][1]["content"]
        )
        assert said in student
        assert len(row["teacher_input_ids"]) == len(row["teacher_labels"])


def test_every_row_is_cut_by_the_teachers_that_it_has(
    prepare: Callable[..., Any], recipe: Recipe, lab: Path, tmp_path: Path
) -> None:
    one, other = (write_rows(tmp_path / f"{name}.jsonl", ROWS[:8]) for name in "ab")
    teacher = {"base_model": str(lab / "teacher")}
    settings = recipe({"variant": "mapped"})
    settings["datasets"] = [{"path": str(file), "type": "alpaca"} for file in (one, other)]
    alone, _ = prepare(settings | {"dwakd": {"teacher": teacher}})
    given = {row["source_row"]: row for row in alone.train_dataset}
    lengths = [len(given[place]["teacher_input_ids"]) for place in range(8)]
    short = sorted(lengths)[3]  # half of the rows are longer
    teachers = [
        teacher | {"name": "maths", "datasets": [str(one)]},
        teacher | {"name": "code", "sequence_len": short},
    ]
    settings["dwakd"] = {"teachers": teachers}
    datasets, report = prepare(settings)
    rows = {row["source_row"]: row for row in datasets.train_dataset}
    fits = [length <= short for length in lengths]
    # What is too long for the only teacher that a row has is dropped; what another has, trains.
    assert set(rows) == {*range(8), *(8 + place for place in range(8) if fits[place])}
    assert report.counts == {KEPT: len(rows), TEACHER_TOO_LONG: 16 - len(rows)}
    for place, row in rows.items():
        assert row["input_ids"] == given[place]["input_ids"]
        theirs = given[place]["teacher_input_ids"], given[place]["teacher_labels"]
        sides = [(row[f"teacher_input_ids{n}"], row[f"teacher_labels{n}"]) for n in ("", "_2")]
        assert sides[0] == (theirs if place < 8 else ([0], [-100]))
        assert sides[1] == (theirs if fits[place % 8] else ([0], [-100]))
    assert report.each["maths"].counts == {KEPT: 8}
    assert report.each["code"].counts == {KEPT: 2 * sum(fits), TEACHER_TOO_LONG: 16 - 2 * sum(fits)}
    _, again = prepare(settings)  # what was prepared is read back
    assert again.each == report.each


def test_a_strategy_that_edits_its_row_leaves_the_other_what_the_user_wrote() -> None:
    seen = []

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        seen.append(copy.deepcopy(row))
        row["messages"].clear()
        return {"input_ids": [1, 2], "labels": [-100, -100]}

    side = SimpleNamespace(tokenize_prompt=tokenize)
    both = DualStrategy(
        side,
        side,
        "rows",
        readers=(None, None),  # type: ignore[arg-type]  # no answer is read where there is none
        lengths=(8, 8),
        excess_length="drop",
        aligner=None,
        different_answers="drop",
        messages="messages",
        tools="tools",
        thinking=None,
        teacher_name="teacher",
    )
    row = {"messages": ["Hi"]}
    both.tokenize_prompt(row)
    assert seen == [row, row] == [{"messages": ["Hi"]}] * 2


def test_the_teacher_gets_its_own_chat_template(
    recipe: Recipe, prepare: Any, lab: Path, tmp_path: Path
) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", CHATS))
    entry = {"path": path, "type": "chat_template", "chat_template": "alpaca"}
    datasets, _ = prepare(recipe({}, datasets=[entry], sequence_len=512))
    teacher = AutoTokenizer.from_pretrained(lab / "teacher")
    student = AutoTokenizer.from_pretrained(lab / "student")
    row = datasets.train_dataset[0]
    assert "<|im_start|>assistant" in teacher.decode(row["teacher_input_ids"])
    assert "### Response" in student.decode(row["input_ids"])


def test_rows_left_out_are_counted_with_the_reason(
    recipe: Recipe, prepare: Any, tmp_path: Path
) -> None:
    empty = {"instruction": "Say nothing.", "input": "", "output": ""}
    long = {"instruction": "Talk.", "input": "", "output": "blah zork quux " * 100}
    path = str(write_rows(tmp_path / "rows.jsonl", [*ROWS, long]))
    entry = [{"path": path, "type": "alpaca"}]
    _, report = prepare(recipe({}, datasets=entry))
    assert report.counts[STUDENT_TOO_LONG] == 1
    assert report.kept == len(ROWS)

    _, report = prepare(
        recipe({"teacher": {"sequence_len": 256}}, datasets=entry, sequence_len=2048)
    )
    assert report.counts[TEACHER_TOO_LONG] == 1

    silent = [
        {"segments": [{"label": False, "text": row["instruction"]}, {"label": True, "text": ""}]}
        for row in (empty, *ROWS[:1])
    ]
    spoken = [{"segments": [{"label": True, "text": "A word or two."}]}]
    path = str(write_rows(tmp_path / "segments.jsonl", silent + spoken))
    _, report = prepare(recipe({}, datasets=[{"path": path, "type": "input_output"}]))
    assert report.counts[NO_RESPONSE] == 2
    assert report.kept == 1


def test_truncation_may_take_a_response_from_one_side(
    recipe: Recipe, prepare: Any, tmp_path: Path
) -> None:
    long_prompt = {"instruction": "Why? " * 200, "input": "", "output": "Because."}
    path = str(write_rows(tmp_path / "rows.jsonl", [*ROWS[:3], long_prompt]))
    settings = recipe(
        {"teacher": {"sequence_len": 256}},
        datasets=[{"path": path, "type": "alpaca"}],
        sequence_len=2048,
        excess_length_strategy="truncate",
    )
    datasets, report = prepare(settings)
    assert report.counts[LABELS_ONLY] == 1
    assert len(datasets.train_dataset) == 4
    assert all(len(row["teacher_input_ids"]) <= 256 for row in datasets.train_dataset)

    settings |= {"sequence_len": 256, "dataset_prepared_path": str(tmp_path / "again")}
    _, report = prepare(settings)
    assert report.counts[STUDENT_TRUNCATED] == 1


def test_truncation_cuts_both_sides_at_the_same_byte(
    recipe: Recipe, prepare: Any, lab: Path, tmp_path: Path
) -> None:
    long = {"instruction": "Talk.", "input": "", "output": "It returns the größte of 数, " * 40}
    path = str(write_rows(tmp_path / "rows.jsonl", [*ROWS[:3], long]))
    settings = recipe(
        {}, datasets=[{"path": path, "type": "alpaca"}], excess_length_strategy="truncate"
    )
    for lengths in ((256, 2048), (2048, 256), (256, 251)):
        settings |= {"sequence_len": lengths[0]}
        settings["dwakd"]["teacher"]["sequence_len"] = lengths[1]
        datasets, report = prepare(settings)
        assert report.counts == {KEPT: 3, CUT: 1}
        (row,) = [row for row in datasets.train_dataset if row["source_row"] == 3]
        student, teacher = texts(lab, row)
        assert student == teacher
        assert len(student) > 100 and long["output"].startswith(student)
        sides = len(row["input_ids"]), len(row["teacher_input_ids"])
        assert all(size <= length for size, length in zip(sides, lengths, strict=True))
        assert any(size > length - 12 for size, length in zip(sides, lengths, strict=True))
        assert len(row["labels"]) == len(row["attention_mask"]) == len(row["input_ids"])


def test_prepared_rows_of_another_teacher_are_not_reused(
    recipe: Recipe, prepare: Any, lab: Path, tmp_path: Path
) -> None:
    first, _ = prepare(recipe({}))
    reused, report = prepare(recipe({}))
    assert report.kept == len(ROWS)  # the report is kept with the rows
    assert report.locate(3).endswith("row 3 of " + str(lab / "rows.jsonl"))
    assert reused.train_dataset.to_list() == first.train_dataset.to_list()
    template = {"teacher": {"sequence_len": 200}}
    prepare(recipe(template))
    assert len(list((tmp_path / "prepared").glob("dwakd-*"))) == 2


def test_rows_that_were_mapped_for_another_student_are_not_reused(
    recipe: Recipe, prepare: Any, tmp_path: Path
) -> None:
    """`datasets` keeps them beside the data file's, where nobody looks when `prepared` is gone."""
    labels = {}
    for on_inputs in (False, True):
        datasets, _ = prepare(recipe({}, train_on_inputs=on_inputs))
        labels[on_inputs] = datasets.train_dataset["labels"][0]
        shutil.rmtree(tmp_path / "prepared")
    assert labels[False][0] == -100 != labels[True][0]


def test_rows_prepared_without_a_teacher_are_not_mixed_in(recipe: Recipe, prepare: Any) -> None:
    both = {"teacher_input_ids", "teacher_labels"}
    plain, _ = prepare(recipe(None))
    assert not both & set(plain.train_dataset.column_names)
    distilled, report = prepare(recipe({}))
    assert both < set(distilled.train_dataset.column_names)
    assert report.kept == len(ROWS)
    again, _ = prepare(recipe(None))
    assert again.train_dataset.to_list() == plain.train_dataset.to_list()


def test_a_teacher_that_reads_otherwise_has_rows_of_its_own(
    recipe: Recipe, prepare: Any, lab: Path, tmp_path: Path
) -> None:
    """The same name, vocabulary and special tokens; then another chat template."""
    teacher = tmp_path / "teacher"
    shutil.copytree(lab / "teacher", teacher)
    path = str(write_rows(tmp_path / "rows.jsonl", CHATS))
    settings = recipe(
        {"teacher": {"base_model": str(teacher)}},
        datasets=[{"path": path, "type": "chat_template", "chat_template": "chatml"}],
    )

    def teacher_rows() -> list[list[int]]:
        datasets, report = prepare(settings)
        assert report.kept == len(CHATS)
        return [row["teacher_input_ids"] for row in datasets.train_dataset]

    first = teacher_rows()
    assert teacher_rows() == first
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:20]
    file.write_text(json.dumps(content), encoding="utf-8")
    second = teacher_rows()
    assert second != first
    settings["dwakd"]["teacher"]["chat_template"] = CHAT_TEMPLATE.replace("<|im_start|>", "* ")
    assert teacher_rows() not in (first, second)
    assert len(list((tmp_path / "prepared").glob("dwakd-*"))) == 3


@pytest.mark.parametrize(
    ("rows", "entry", "message"),
    [
        ([{"text": "Some text."}], {"type": "completion"}, "chunks of two tokenizers do not match"),
        ([{"question": "?"}], {"type": "alpaca"}, "doesn't fit its type: KeyError"),
        (
            [{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2]}],
            {"type": None},
            "tokenised already",
        ),
    ],
)
def test_what_cannot_be_tokenised_twice_is_refused(
    rows: list[dict[str, Any]],
    entry: dict[str, Any],
    message: str,
    recipe: Recipe,
    prepare: Any,
    tmp_path: Path,
) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=message):
        prepare(recipe({}, datasets=[{"path": path, **entry}]))


GOOD = b'{"instruction": "a", "input": "", "output": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b'{"instruction": "a", "output": \n' + GOOD, "Row 2 of .* is not JSON"),
        (GOOD + b'{"instruction": "a", "output": "\\ud800"}\n', "Row 2 of .* lone surrogate"),
        (GOOD + b"\n" + GOOD[:30] + b"\xf6" + GOOD[30:], "not UTF-8: byte 0xf6 in line 3"),
        (GOOD + b"[" * 9999, "Row 2 of .* is not JSON"),
        (GOOD + b"3\n", "Row 2 of .* isn't a JSON object"),
        (b"[1, 2", "isn't a JSON list"),
        (b" \n\n", "is empty"),
    ],
)
def test_what_is_no_row_in_a_data_file_is_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "data" / "rows.jsonl"
    file.parent.mkdir()
    file.write_bytes(content)
    for place in ({"path": str(file)}, {"path": "json", "data_files": [str(file)]}):
        cfg = DictDefault({"datasets": [place]})
        with pytest.raises(UserError, match=message):
            explain_bad_file(cfg, ValueError())
    with pytest.raises(UserError, match=message):
        explain_bad_file(DictDefault({"test_datasets": [{"path": str(file.parent)}]}), OSError())
    file.write_bytes(GOOD)
    explain_bad_file(DictDefault({"datasets": [{"path": str(file)}]}), ValueError())


def test_a_line_that_is_no_row_ends_in_a_message(
    recipe: Recipe, prepare: Any, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b'{"instruction": "a", "output": \n')
    with pytest.raises(UserError, match=r"Row 2 of .* is not JSON"):
        prepare(recipe({}, datasets=[{"path": str(file), "type": "alpaca"}]))


def test_no_row_left_is_an_error(recipe: Recipe, prepare: Any) -> None:
    with pytest.raises(UserError, match="No row of the data is left"):
        prepare(recipe({}, sequence_len=16))


def test_axolotl_still_has_what_the_plugin_replaces() -> None:
    """A canary for axolotl's releases: these names are replaced while the data is loaded."""
    import axolotl.utils.data.sft as sft
    import axolotl.utils.data.wrappers as wrappers

    assert sft.get_dataset_wrapper is wrappers.get_dataset_wrapper
    assert callable(wrappers.wrap_dataset_for_tokenized_prompt)


def test_row_report_locates_rows() -> None:
    report = RowReport(sources=[("a.jsonl", 0), ("b.jsonl", 10)])
    assert report.locate(9) == "row 9 of a.jsonl"
    assert report.locate(10) == "row 0 of b.jsonl"
    assert json.dumps(report.counts) == "{}"


def test_what_another_rank_is_writing_stays(tmp_path: Path) -> None:
    for name in ("0123abcd", ".rows.json-k3j2"):
        (tmp_path / name).mkdir()
    _remove_half_written(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [".rows.json-k3j2"]
