"""`dwakd check`: its report, pictures, exit codes and messages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from dwakd_cli.main import app
from dwakd_cli.token_picture import terminal_rows
from dwakd_plugin.errors import UserError
from dwakd_plugin.tokenizers.figures import vocabulary_figures
from dwakd_plugin.tokenizers.loading import load_and_name
from dwakd_plugin.tokenizers.pair import ByteCutter, cut_both
from tests.conftest import write_rows
from tests.tokenizers.small_tokenizers import byte_level, sentencepiece


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    teacher, student = byte_level(), sentencepiece(own_tokens=False)
    teacher.save_pretrained(folder / "teacher")
    student.save_pretrained(folder / "student")
    (folder / "teacher" / "config.json").write_text(json.dumps({"vocab_size": len(teacher) + 8}))
    return str(folder / "teacher"), str(folder / "student")


def check(*arguments: str | Path, **environment: str) -> Result:
    # Rich asks for these when it is asked to print.
    return CliRunner().invoke(app, ["check", *map(str, arguments)], env=environment)


def test_json_has_the_keys_that_scripts_rely_on(folders: tuple[str, str], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("The bakery opens at 6.\n\nThe first loaves: größte 🎉\r\n", encoding="utf-8")
    result = check(*folders, "--texts", texts, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    teacher, student = map(AutoTokenizer.from_pretrained, folders)
    assert report["teacher_vocab_size"] == len(teacher)
    assert report["student_vocab_size"] == len(student)
    assert report["teacher_head_rows"] == len(teacher) + 8
    assert report["student_head_rows"] is None
    assert report["shared_tokens_exact"] == len(teacher.get_vocab().keys() & student.get_vocab())
    assert report["shared_tokens_bytes"] > 0
    assert report["texts"] == report["texts_compared"] == 2
    assert report["length_ratio"].keys() >= {"mean", "p5", "p95"}
    for share in ("boundary_agreement_student", "boundary_agreement_teacher"):
        assert 0 < report[share] <= 1
    assert 0 < report["identical_span_share"] <= report["boundary_agreement_student"]
    assert report["verdict"] in ("good", "workable", "poor")
    assert {"code", "severity", "message"} == report["findings"][0].keys()
    assert "teacher_head_padded" in {finding["code"] for finding in report["findings"]}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a bakery"},
        {"instruction": "a", "input": None, "output": "bakery"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
    ids=["text", "instruction", "messages"],
)
def test_rows_of_several_forms(folders: tuple[str, str], tmp_path: Path, row: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}", encoding="utf-8")
    assert json.loads(check(*folders, "--texts", file, "--json").stdout)["texts"] == 2


def test_a_plain_file_may_hold_json(folders: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "code.txt"
    file.write_text('{"loaves": 120}\nfor x in y:\n', encoding="utf-8")
    assert json.loads(check(*folders, "--texts", file, "--json").stdout)["texts"] == 2


def test_terminal_png_and_html(folders: tuple[str, str], tmp_path: Path) -> None:
    png, html = tmp_path / "pair.png", tmp_path / "pair.html"
    shown = "<b>&größte 🎉 数学</b> $x_1$\n  1234\x00\u200d"
    # A process of its own: a training within this one changes what the terminal is taken for.
    loaded = "lambda: print(*(name for name, it in sys.modules.items() if it), file=sys.stderr)"
    code = f"import atexit, sys; atexit.register({loaded}); from dwakd_cli.main import main; main()"
    command = [sys.executable, "-c", code, "check", *folders]
    options = ["--png", str(png), "--html", str(html), "--show", shown.replace("\x00", "")]
    result = subprocess.run(
        [*command, *options],
        env={**os.environ, "COLUMNS": "50", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    # Seconds each, and neither a pair of tokenizers nor any command's help needs them.
    imported = set(result.stderr.split())
    assert {"dwakd_cli.train", "transformers.models.auto.tokenization_auto"} <= imported
    assert not imported & {"torch", "sklearn", "axolotl", "transformers.generation.utils"}
    assert "\x1b[3" not in result.stdout and "\x1b[4" not in result.stdout  # no colour
    assert [line for line in result.stdout.splitlines() if len(line) > 50] == []
    assert "Verdict: " in result.stdout and "teacher_head_padded" in result.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text(encoding="utf-8")
    assert "<b>&größte" not in page and "&lt;</span>" in page and "&amp;</span>" in page
    assert "http" not in page and "<script" not in page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pair.html", "pair.png"]


def test_terminal_rows_mark_every_token() -> None:
    teacher, student = byte_level(), sentencepiece()
    (pair,) = cut_both(
        ByteCutter(teacher, "teacher"), ByteCutter(student, "student"), ["1 größte 🎉数\u0301 end"]
    )
    assert pair is not None
    for width in (20, 40, 200):
        lines = [line for line in terminal_rows(pair, width) if line.plain]
        assert all(line.cell_len <= width for line in lines)
        for side, cut in (("teacher", pair.teacher), ("student", pair.student)):
            row = "".join(line.plain for line in lines if line.plain.startswith(side))
            assert row.count("│") + row.count("┆") == len(cut.ends)


def test_exit_codes(folders: tuple[str, str], tmp_path: Path) -> None:
    teacher, _ = folders
    byte_level(normalizer=normalizers.Lowercase()).save_pretrained(tmp_path)
    result = check(teacher, tmp_path, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["verdict"], report["verdict_reasons"]) == ("poor", ["student_loses_text"])
    assert check(teacher, tmp_path, "--strict", "--json").exit_code == 3
    assert check(teacher, teacher, "--strict").exit_code == 0


def fails(*arguments: str | Path) -> str:
    result = check(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_tokenizers_that_cannot_be_loaded(folders: tuple[str, str], tmp_path: Path) -> None:
    teacher, student = folders
    assert "student's folder ./nope does not exist" in fails(teacher, "./nope")
    assert "no tokenizer" in fails(tmp_path, student)
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    assert "is a file" in fails(teacher, file)
    assert "cannot be loaded" in fails(tmp_path, student)
    file.unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    assert "CanineTokenizer) is a slow one" in fails(tmp_path, student)
    message = fails("no-such-organisation/no-such-model", student)
    assert "cannot be loaded" in message and "\n" in message
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}'
    )
    assert "--trust-remote-code" in fails(tmp_path, student)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b"one\ncaf\xe9\n", "not UTF-8: byte 0xe9 in line 2"),
        (b'{"text": "a"}\n{"label": 1}\n', "Line 2 .* has no text"),
        (b'{"text": "a"}\n\n{"text": 3}\n', "Line 3 .* has no text"),
        (b'{"text": "a"}\n{"text"\n', "Line 2 .* is not JSON"),
        (b'{"text": "\\ud800"}\n', "Line 1 .* surrogate"),
        (b'{"text": ""}\n', "all of its rows are empty"),
    ],
)
def test_texts_that_cannot_be_read(
    folders: tuple[str, str], tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(content)
    assert re.search(message, fails(*folders, "--texts", file))


def test_files_that_cannot_be_read_or_written(folders: tuple[str, str], tmp_path: Path) -> None:
    assert "cannot be read" in fails(*folders, "--texts", tmp_path / "none.txt")
    assert "cannot be read" in fails(*folders, "--texts", tmp_path)
    assert "cannot be written" in fails(*folders, "--html", tmp_path / "none" / "pair.html")
    assert "surrogate" in fails(*folders, "--show", "caf\udce9")  # an argument that was not UTF-8
    assert "no text to draw" in fails(*folders, "--show", "", "--png", tmp_path / "pair.png")


def test_the_rows_of_a_recipe_side_by_side(
    lab: Path, tmp_path: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    """A teacher's template that leaves reasoning out: three kinds of rows, told apart."""
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content.split('</think>')[-1].strip() }}<|im_end|>\n{% endfor %}"
    )
    rows = [
        [("user", "What is two and two?"), ("assistant", answer)]
        for answer in (
            "It is four.",
            "It is four. ",
            "<think>two and two are four</think>It is four.",
            "<think>add them</think>It is 4.",
        )
    ]
    messages = [
        {"messages": [{"role": role, "content": content} for role, content in row]} for row in rows
    ]
    messages[1]["messages"][1]["reasoning_content"] = "two and two"
    keys = recipe(
        {"teacher": {"chat_template": template}},
        datasets=[
            {
                "path": str(write_rows(tmp_path / "chat.jsonl", messages)),
                "type": "chat_template",
                "field_messages": "messages",
            }
        ],
        chat_template="chatml",
        special_tokens={"eos_token": "<|im_end|>"},
    )
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    result = check("--data", file, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["teacher"] == str(lab / "teacher") and report["student"] == str(lab / "student")
    found = report["rows"]
    assert found["counts"] == {
        "kept": 2,
        "kept for its labels only: the teacher's side has another answer": 2,
    }
    assert found["answers"]["different in their reasoning"] == 2
    unread = found["unread"]["reasoning (`reasoning_content`)"]
    assert unread["rows"] == 1 and unread["text"] == "two and two"
    assert unread["row"].startswith("row 1 of")
    example = found["examples"]["different in their reasoning"]
    assert example["row"].startswith("row 2 of")
    assert "two and two are four" in example["student_rendering"]
    assert "two and two are four" not in example["teacher_rendering"]
    assert example["teacher_rendering"].count("It is four.") == 1

    shown = check("--data", file)
    assert shown.exit_code == 0 and "Answers different in their reasoning: row 2 of" in shown.output
    assert "Neither side reads reasoning (`reasoning_content`): row 1 of" in shown.output
    assert check().exit_code == 1


def test_a_tokenizer_that_is_both_sides_is_loaded_once(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, _ = folders
    copy = shutil.copytree(teacher, tmp_path / "copy")
    apart = json.loads(check(teacher, copy, "--json").stdout)
    loaded: list[str] = []

    def counted(name: str, *others: Any, **options: Any) -> Any:
        loaded.append(name)
        return load_and_name(name, *others, **options)

    monkeypatch.setattr("dwakd_plugin.tokenizers.side.load_and_name", counted)
    result = check(teacher, teacher, "--json")
    assert loaded == [teacher]
    assert json.loads(result.stdout) == apart | {"student": teacher}
    assert "same_tokenizer" in {finding["code"] for finding in apart["findings"]}


def test_tokens_that_the_student_never_reads_are_counted_apart() -> None:
    teacher, student = byte_level(), byte_level()
    read = ByteCutter(teacher, "teacher")
    every = vocabulary_figures(read, ByteCutter(student, "student"))
    assert every["shared_tokens_read"] == every["shared_tokens_bytes"]
    # Without the merge that makes it, a token stays in the vocabulary and no cut arrives at it.
    rules = json.loads(student.backend_tokenizer.to_str())
    rules["model"]["merges"] = rules["model"]["merges"][:-5]
    student.backend_tokenizer.model = Tokenizer.from_str(json.dumps(rules)).model
    fewer = vocabulary_figures(read, ByteCutter(student, "student"))
    assert fewer["shared_tokens_bytes"] == every["shared_tokens_bytes"]
    assert fewer["shared_tokens_read"] == every["shared_tokens_read"] - 5
