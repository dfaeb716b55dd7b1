"""Rows that nobody would write: tokenised twice, or left out or refused for a reason."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dwakd_plugin.errors import UserError
from tests.fuzz.cases import cases, located
from tests.fuzz.texts import TEXTS

ANY_TEXT = st.one_of(TEXTS, st.text(max_size=20), st.sampled_from(["\ud800", "a\udfff\ud83d", "é"]))
VALUES = st.one_of(
    ANY_TEXT,
    st.none(),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.lists(ANY_TEXT, max_size=2),
    st.dictionaries(st.text(max_size=5), ANY_TEXT, max_size=2),
)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.one_of(st.sampled_from(["system", "user", "assistant", "tool"]), VALUES),
                "content": VALUES,
            }
        ),
        VALUES,
    ),
    max_size=4,
)
SEGMENTS = st.lists(
    st.one_of(st.fixed_dictionaries({"label": st.booleans(), "text": VALUES}), VALUES), max_size=4
)
ROW = st.one_of(
    st.fixed_dictionaries(
        {"instruction": ANY_TEXT, "output": ANY_TEXT}, optional={"input": VALUES}
    ),
    st.fixed_dictionaries({}, optional={"instruction": VALUES, "input": VALUES, "output": VALUES}),
    st.fixed_dictionaries({"messages": MESSAGES}),
    st.fixed_dictionaries({"segments": SEGMENTS}),
    st.dictionaries(st.text(max_size=8), VALUES, max_size=3),
)
TYPES: dict[str, dict[str, Any]] = {
    "alpaca": {"type": "alpaca"},
    "chat_template": {"type": "chat_template", "chat_template": "chatml"},
    "llama3": {"type": "chat_template", "chat_template": "llama3"},
    "gemma": {"type": "chat_template", "chat_template": "gemma"},
    "input_output": {"type": "input_output"},
}


class _Captured(Exception):
    """Carries the strategy out of axolotl's way."""


@pytest.fixture(scope="module")
def strategies(lab: Path) -> dict[str, Any]:
    """What each type of data set tokenises a row with, for both models."""
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset

    from dwakd_plugin.data import dual_tokenization as dual
    from dwakd_plugin.recipe.schema import DWAKDConfig

    config = DWAKDConfig.model_validate({"teacher": str(lab / "teacher")})
    student_tokenizer = AutoTokenizer.from_pretrained(lab / "student")

    def capture(strategy: Any, *_: Any, **__: Any) -> Any:
        raise _Captured(strategy.strategy)  # what the name stands for

    found = {}
    for name, entry in TYPES.items():
        dataset_config = DictDefault({"path": "rows.jsonl", **entry})
        cfg = DictDefault({"sequence_len": 200, "train_on_inputs": False, "datasets": [entry]})
        kwargs = {
            "dataset": Dataset.from_list([{"x": "y"}]),
            "dataset_base_type": entry["type"],
            "dataset_prompt_style": None,
        }
        with pytest.MonkeyPatch.context() as patch, pytest.raises(_Captured) as captured:
            patch.setattr(dual.axolotl_wrappers, "wrap_dataset_for_tokenized_prompt", capture)
            dual._wrap_all_sides(
                dual.axolotl_sft.get_dataset_wrapper,
                dataset_config,
                student_tokenizer,
                cfg,
                dual.teacher_sides(cfg, config),
                dual.RowReport(),
                kwargs,
            )
        found[name] = captured.value.args[0]
    return found


@given(row=ROW, name=st.sampled_from(sorted(TYPES)))
@cases(120, 5000)
@example(row={"instruction": "\ud800", "output": "x"}, name="alpaca")
@example(row={"instruction": "a", "output": "\0"}, name="alpaca")
@example(row={"messages": [{"role": "assistant", "content": "x"}]}, name="gemma")
@example(row={"messages": [{"role": "user", "content": None}]}, name="chat_template")
@example(row={"segments": [{"label": True, "text": "x"}, 3]}, name="input_output")
@example(row={"instruction": "x", "output": "a" * 1_000_000}, name="alpaca")
@example(row={"instruction": "", "output": [""]}, name="alpaca")
def test_a_row_is_tokenised_twice_or_left_out(
    row: dict[str, Any], name: str, strategies: dict[str, Any]
) -> None:
    from dwakd_plugin.data.dual_strategy import STATUS_COLUMN
    from dwakd_plugin.data.row_report import (
        KEPT,
        LABELS_DIFFERENT,
        LABELS_ONLY,
        NO_RESPONSE,
        STUDENT_TOO_LONG,
        STUDENT_TRUNCATED,
        TEACHER_TOO_LONG,
    )

    strategy = strategies[name]
    before = copy.deepcopy(row)
    try:
        tokens = strategy.tokenize_prompt(row)
    except UserError as error:
        located(str(error), "rows.jsonl")
        return
    assert repr(row) == repr(before)
    status = tokens[STATUS_COLUMN]
    dropped = (NO_RESPONSE, STUDENT_TOO_LONG, STUDENT_TRUNCATED, TEACHER_TOO_LONG)
    assert status in (KEPT, LABELS_DIFFERENT, LABELS_ONLY, *dropped)
    sides = (("input_ids", "labels"), ("teacher_input_ids", "teacher_labels"))
    responses = []
    for ids, labels in sides:
        assert len(tokens[ids]) == len(tokens[labels])
        assert all(b in (-100, a) for a, b in zip(tokens[ids], tokens[labels], strict=True))
        responses.append([label for label in tokens[labels][1:] if label != -100])
    assert bool(responses[0]) or status == NO_RESPONSE
    if status != KEPT:
        return
    assert responses[1]
    student, teacher = (
        side.tokenizer.decode(
            response, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for side, response in zip((strategy.student, strategy.teacher), responses, strict=True)
    )
    wild = any(mark in repr(row) for mark in ("<|", "</s>", "<s>", "<unk>", "<pad>", "<eos>"))
    if not wild:  # a special token in the text is one to the tokenizer that has it
        assert student.strip() == teacher.strip()


LINES = st.one_of(
    ROW.map(lambda row: json.dumps(row)),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False)),
    VALUES.map(lambda value: json.dumps(value)),
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "[", "{}", "[]", "null", "NaN", '{"a":', "[" * 3000, "1" * 5000, "\ufeff"]
    ),
    st.sampled_from(["[1, 2]", '[{"instruction": "a", "output": "b"}]', '{"messages": []}']),
)


@given(lines=st.lists(LINES, max_size=5), ending=st.sampled_from([b"", b"\xff", b"\n", b"\0"]))
@cases(120, 5000)
@example(lines=['{"instruction": "a", "output": "\\ud800"}'], ending=b"")
@example(lines=['{"instruction": "a", "output": "b"}', "[" * 100_000], ending=b"")
@example(lines=["[" * 100_000], ending=b"")
@example(lines=['{"instruction": "a", "output": ' + "1" * 5000 + "}"], ending=b"")
@example(lines=["\ufeff", '{"instruction": "a", "output": "b"}'], ending=b"\n")
def test_evaluation_rows_are_read_or_located(
    lines: list[str], ending: bytes, scratch: Path, lab: Path
) -> None:
    from dwakd_plugin.evaluate.rows import Format, encode, read_rows

    file = scratch / "rows.jsonl"
    file.write_bytes("\n".join(lines).encode(errors="surrogatepass") + ending)
    try:
        rows = read_rows(file)
    except UserError as error:
        located(str(error), "rows.jsonl")
        return
    assert rows
    tokenizer = _lab_tokenizer(lab)
    for row in rows:
        assert row.references and all(each.strip() for each in row.references)
        kinds = ["chat"] if row.instruction is None else ["chat", "alpaca", "text"]
        for kind in kinds:
            form = Format(kind, "as asked", "{instruction}\n{input}\n")
            try:
                encoded = encode(row, form, tokenizer, [tokenizer.eos_token_id])
            except UserError as error:
                located(str(error))
                continue
            assert encoded.prompt and encoded.response
            assert encoded.response[-1] in tokenizer.added_tokens_decoder


@cache
def _lab_tokenizer(lab: Path) -> Any:
    return AutoTokenizer.from_pretrained(lab / "teacher")
