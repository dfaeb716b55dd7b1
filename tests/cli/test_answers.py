"""`dwakd answers`: the rows come out as they went in, the same however they were made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dwakd_cli.main import app
from dwakd_plugin.data.answer_places import MessagesPlace, ToolCall
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate import teacher_answers
from dwakd_plugin.evaluate.answer_choice import choose
from dwakd_plugin.evaluate.responses import Response
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.train.open_run import open_rows
from tests.conftest import ROWS, write_rows
from tests.speakers import make_speaker

Recipe = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def speaker(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_speaker(lab, tmp_path_factory.mktemp("speaker"))


@pytest.fixture
def asked(recipe: Recipe, write: Write, speaker: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes rows and a recipe of them whose teacher is the speaker."""

    def build(rows: list[dict[str, Any]], kind: Any = "alpaca", **settings: Any) -> Path:
        data = {"path": str(write_rows(tmp_path / "data.jsonl", rows)), "type": kind}
        data |= settings.pop("data", {})
        teacher = {"base_model": str(speaker), **settings.pop("teacher", {})}
        return write(recipe({"teacher": teacher}, datasets=[data], **settings))

    return build


def answers(file: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(
        app,
        ["answers", str(file), "--json", "--max-new-tokens", "24", *options],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def read(file: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def trained_on(file: Path, report: dict[str, Any]) -> list[Any]:
    """The rows of the answers as axolotl prepares them for both sides."""
    recipe = ReadRecipe.read(file, {}).but(datasets=report["datasets"])
    with open_rows(recipe) as (_, (rows, _), told):
        assert told.kept == told.total  # both sides have the same answers
        return sorted(rows.with_format(None), key=lambda row: row["source_row"])


def test_an_interrupted_run_ends_with_the_same_file(
    asked: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speaker: Path
) -> None:
    rows = [{**row, "id": f"row {number}"} for number, row in enumerate(ROWS[:10])]
    file = asked(rows)
    options = ("--samples", "2", "--batch-size", "3", "--temperature", "1")
    report = answers(file, "--out", "whole/rows.jsonl", *options)
    whole = Path("whole/rows.jsonl").read_bytes()
    found = read("whole/rows.jsonl")
    # Everything but the answer is as it was, and each answer is of letters.
    original = {row["id"]: row for row in rows}
    assert len(found) == report["kept"] and {len(found), 0} != {0}
    for row in found:
        assert {**row, "output": ""} == {**original[row["id"]], "output": ""}
        assert row["output"].replace(" ", "").isalpha()
        assert row["output"] != original[row["id"]]["output"]
    dropped = report["dropped"]
    assert report["answers"] == 20 == report["kept"] + sum(dropped.values())
    assert dropped["unended"] > 0 and report["ended"] < 1
    assert report["tokens_kept"]["longest"] <= 24 == report["tokens"]["longest"]
    assert report["log_probability"] < 0 < report["tokens_per_second"]

    original_engine = teacher_answers.with_transformers
    calls: list[Any] = []

    def stopping(*given: Any, **more: Any) -> Any:
        generate = original_engine(*given, **more)

        def some(*batch: Any) -> Any:
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append(batch)
            return generate(*batch)

        return some

    monkeypatch.setattr(teacher_answers, "with_transformers", stopping)
    cut = ["answers", str(file), "--out", "cut/rows.jsonl", "--max-new-tokens", "24", *options]
    stopped = CliRunner().invoke(app, cut)
    assert stopped.exit_code == 130 or isinstance(stopped.exception, KeyboardInterrupt | SystemExit)
    assert "The same command goes on" in stopped.output
    monkeypatch.setattr(teacher_answers, "with_transformers", original_engine)
    samples = Path("cut/rows.samples.jsonl")
    lines = samples.read_bytes().splitlines(keepends=True)
    assert len(lines) == 10 and not Path("cut/rows.jsonl").exists()
    samples.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # a kill within a line
    with pytest.raises(UserError, match=r"temperature: 1\.0 there, 0\.5 here"):
        answers(file, "--out", "cut/rows.jsonl", *options, "--temperature", "0.5")
    answers(file, "--out", "cut/rows.jsonl", *options)
    assert Path("cut/rows.jsonl").read_bytes() == whole
    answers(file, "--out", "other/rows.jsonl", *options[:2], "--batch-size", "10", *options[4:])
    assert Path("other/rows.jsonl").read_bytes() == whole

    # Once more there is nothing to do; another choice of the same samples loads no teacher.
    assert answers(file, "--out", "whole/rows.jsonl", *options)["skipped"]
    monkeypatch.setattr(teacher_answers, "load_teacher", None)
    shortest = (*options, "--keep", "shortest", "--keep-unended")
    with pytest.raises(UserError, match="keep: 'all' there, 'shortest' here"):
        answers(file, "--out", "whole/rows.jsonl", *shortest)
    again = answers(file, "--out", "whole/rows.jsonl", *shortest, "--force")
    assert again["kept"] == 10 and again["tokens_per_second"] is None
    # A row that changes is another row.
    asked([{**rows[0], "instruction": "Another question?"}, *rows[1:]])
    with pytest.raises(UserError, match=r"rows: '.*' there, '.*' here"):
        answers(file, "--out", "whole/rows.jsonl", *shortest)


CHAT = [
    {
        "talk": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What is a list?"},
            {"from": "gpt", "value": "A row of things."},
            {"from": "human", "value": "And a set?"},
            {"from": "gpt", "value": "Things without order.", "reasoning_content": "Hm."},
        ],
        "source": "a",
    },
    {
        "talk": [
            {"from": "human", "value": "What is a tuple?"},
            {"from": "gpt", "value": "A fixed list."},
            {"from": "human", "value": "Why?"},
        ],
        "source": "b",
    },
]
MAPPED = {
    "field_messages": "talk",
    "message_property_mappings": {"role": "from", "content": "value"},
}


@pytest.mark.parametrize(
    ("kind", "rows", "more", "put"),
    [
        (
            "chat_template",
            CHAT,
            MAPPED,
            lambda row, said: {
                **row,
                "talk": [
                    *[turn for turn in row["talk"] if turn.get("reasoning_content") is None],
                    {"from": "gpt", "value": said},
                ],
            },
        ),
        (
            {"field_instruction": "ask", "field_output": "reply", "format": "{instruction} => "},
            [{"ask": "What is a list?", "reply": "Things.", "n": 3}, {"ask": "A set?", "n": 4}],
            {},
            lambda row, said: {**row, "reply": said},
        ),
        (
            "alpaca_chat.load_qa",
            [{"question": "What is a list?", "answer": "Things.", "n": 3}],
            {},
            lambda row, said: {**row, "answer": said},
        ),
    ],
)
def test_rows_keep_their_shape_and_axolotl_reads_them(
    asked: Callable[..., Path], kind: Any, rows: Any, more: Any, put: Any, speaker: Path
) -> None:
    file = asked(rows, kind, data=more, chat_template="chatml")
    report = answers(file, "--out", "rows.jsonl", "--temperature", "0", "--keep-unended")
    found = read("rows.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(speaker)
    model = AutoModelForCausalLM.from_pretrained(speaker, dtype=torch.float32)
    prepared = trained_on(file, report)
    assert len(found) == len(rows) == len(prepared)
    for row, new, both in zip(rows, found, prepared, strict=True):
        ids, labels = both["teacher_input_ids"], both["teacher_labels"]
        begin = max(i for i, label in enumerate(labels) if label != -100 and labels[i - 1] == -100)
        # Greedy answers of the teacher itself behind just the prompt that it is trained behind.
        own = model.generate(
            torch.tensor([ids[:begin]]), max_new_tokens=24, do_sample=False, pad_token_id=0
        )[0, begin:].tolist()
        said = tokenizer.decode(own, skip_special_tokens=True).strip()
        assert new == put(row, said)
        assert tokenizer.decode(ids[begin:], skip_special_tokens=True).strip() == said


def test_held_out_rows_are_not_answered(asked: Callable[..., Path]) -> None:
    rows = [{**row, "number": number} for number, row in enumerate(ROWS[:12])]
    file = asked(rows, val_set_size=3)
    options = ("--temperature", "1", "--keep-unended", "--with-labels")
    report = answers(file, "--out", "rows.jsonl", *options)
    with open_rows(ReadRecipe.read(file, {})) as (_, (_, evaluation), _):
        held_out = sorted(evaluation["source_row"])
    apart = read("rows.held-out.jsonl")
    assert [row["number"] for row in apart] == held_out and len(held_out) == 3
    assert apart == [rows[number] for number in held_out]
    found = read("rows.jsonl")
    assert not {row["number"] for row in found} & set(held_out)
    # With labels: each row as it was, and then as it was answered.
    assert found[::2] == [row for row in rows if row["number"] not in held_out]
    assert [row["number"] for row in found[1::2]] == [row["number"] for row in found[::2]]
    recipe = ReadRecipe.read(file, {}).but(
        datasets=report["datasets"], test_datasets=report["test_datasets"], val_set_size=0
    )
    with open_rows(recipe) as (_, (train, evaluation), _):
        assert len(train) == 18 and len(evaluation) == 3


def test_what_is_kept_of_several_answers() -> None:
    tokenizer = SimpleNamespace(
        added_tokens_decoder={0: SimpleNamespace(special=True, content="<end>")}
    )
    prompts: Any = SimpleNamespace(
        tokenizer=tokenizer, longest=22, behind=2, found=[SimpleNamespace(ids=[1] * 10)]
    )
    said = [
        [Response(" long and likely ", 9, True, -0.1)],
        [Response("short", 3, True, -2.0)],
        [Response("<think>Hm.</think>\n\nthought", 8, True, -0.5)],
        [Response("", 1, True, -0.1)],
        [Response("cut off", 2, False, -0.1)],
        [Response("<think>for ever", 4, True, -0.1)],
        [Response("a <end> within", 4, True, -0.1)],
        [Response("half \ufffd", 4, True, -0.1)],
        [Response("does not fit", 11, True, -0.1)],
    ]

    def texts(keep: Any, unended: bool = False) -> list[str]:
        ((_, kept),), dropped = choose(prompts, said, keep, unended)
        assert dropped["not_text"] == 2 and dropped["empty"] == 1 and dropped["too_long"] == 1
        assert dropped["unended"] == (1 if unended else 2)
        return [answer.text for answer in kept]

    assert texts("all") == ["long and likely", "short", "thought"]
    assert texts("all", unended=True) == ["long and likely", "short", "thought", "cut off"]
    assert texts("shortest") == ["short"]
    assert texts("likeliest") == ["long and likely"]


def test_messages_take_another_answer_in_their_own_form() -> None:
    place = MessagesPlace(roles={"user": "user", "assistant": "assistant", "tool": "tool"})
    ask = {"role": "user", "content": "Why?"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(ToolCall):
        place.put({"messages": [ask, call]}, "So.")
    answered = place.put(
        {"messages": [ask, call, {"role": "tool", "content": "3", "name": None}]}, "So."
    )
    assert answered["messages"] == [
        ask,
        call,
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "So."},
    ]
    parts = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    (_, said) = place.put({"messages": [parts]}, "So.")["messages"]
    assert said["content"] == [{"type": "text", "text": "So."}]
    as_text = place.put({"messages": json.dumps([ask])}, "So.")["messages"]
    assert json.loads(as_text)[-1] == {"role": "assistant", "content": "So."}
    for empty in ([], [{"role": "system", "content": "Be brief."}], [{**ask, "content": " "}]):
        with pytest.raises(ValueError, match="nobody asks"):
            place.put({"messages": empty}, "So.")


def test_what_cannot_be_answered_is_said_first(
    asked: Callable[..., Path],
    recipe: Recipe,
    write: Write,
    tmp_path: Path,
    speaker: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_answers, "load_teacher", None)

    def message(file: Path, *options: str) -> str:
        with pytest.raises(UserError) as error:
            answers(file, *options)
        return str(error.value)

    assert "names no teacher" in message(write(recipe(None)))
    file = asked(ROWS[:3])
    for options, words in {
        ("--samples", "0"): "--samples 0: give a number from 1",
        ("--max-new-tokens", "9999"): "the teacher has 2048 positions",
        ("--temperature", "0", "-n", "2", "--keep", "shortest"): "the same each time",
        ("--top-p", "0"): "a top-p from 0.01 to 1",
        ("--seed", "-1"): "give a number from 0",
        ("--out", "rows.txt"): "ends in .jsonl",
        ("--out", str(tmp_path / "data.jsonl")): "is the recipe's own data",
        ("--out", "/proc/nowhere/rows.jsonl"): "cannot be written",
        ("--out", str(write_rows(tmp_path / "other.jsonl", ROWS[:1]))): "no other.answers.json",
        ("--teacher", "./missing"): "no such folder",
    }.items():
        assert words in message(file, *options), options
    nothing = {"instruction": "", "input": "", "output": "What?"}
    assert "Row 2 of" in (said := message(asked([ROWS[0], nothing])))
    assert "nothing to answer" in said
    unasked = {"messages": [{"role": "assistant", "content": "So."}]}
    assert "nobody asks anything" in message(asked([unasked], "chat_template"))
    segments = {"segments": [{"label": False, "text": "Why?"}, {"label": True, "text": "So."}]}
    said = message(asked([segments], "input_output"))
    assert "type: input_output" in said and "cannot be written back" in said
    chat = {"messages": [{"role": "user", "content": "Why?"}]}
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    said = message(asked([chat], "chat_template", teacher={"chat_template": endless}))
    assert "has no end of turn" in said
    long = {"instruction": "What? " * 300, "output": "That."}
    assert "1 too_long" in message(asked([long]))
    assert not list(tmp_path.glob("*answers*"))


@pytest.mark.slow
def test_train_answers_first_and_once(asked: Callable[..., Path], tmp_path: Path) -> None:
    file = asked(ROWS[:16], val_set_size=4)
    answers(file, "--keep-unended")  # of 24 tokens at most, beside OUTPUT_DIR
    command = [sys.executable, "-c", "from dwakd_cli.main import main; main()", "train", str(file)]

    def train(*options: str) -> dict[str, Any]:
        ran = subprocess.run(
            [*command, "--answers", "--json", *options], check=False, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        facts: dict[str, Any] = json.loads(ran.stdout)
        return facts

    out = tmp_path / "out-answers.jsonl"
    made = out.stat().st_mtime_ns
    facts = train()
    assert facts["datasets"] == [f"{out} (alpaca)"] and out.stat().st_mtime_ns == made
    log = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert any("loss" in line for line in log["log_history"])
    (tmp_path / "out").rename(tmp_path / "first")
    said = [row["output"] for row in read(out)]
    train("--with-labels")
    assert [row["output"] for row in read(out)[1::2]] == said  # the same samples, beside labels


def test_a_token_that_the_teacher_never_got_is_named(
    asked: Callable[..., Path], speaker: Path, tmp_path: Path
) -> None:
    """Added to its tokenizer alone, and written by the chat template: an IndexError otherwise."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(speaker)
    room = AutoConfig.from_pretrained(speaker).vocab_size - len(tokenizer)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(room)] + ["<|asks|>"])
    tokenizer.chat_template = "<|asks|>" + (tokenizer.chat_template or "")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    teacher = {"tokenizer": str(tmp_path / "tokenizer")}
    file = asked([{"messages": turns}], "chat_template", teacher=teacher)
    with pytest.raises(UserError, match=r"'<\|asks\|>'\), which was added to its tokenizer"):
        answers(file)
    assert not list(tmp_path.glob("*.answers.json"))
