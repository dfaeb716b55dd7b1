"""`dwakd evaluate`: its report, what goes on after Ctrl-C, and messages."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dwakd_cli.main import app, main
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate import work
from dwakd_plugin.evaluate.figures import rouge_l
from dwakd_plugin.evaluate.held_out import held_out_bits_per_byte
from dwakd_plugin.evaluate.subjects import short_names
from dwakd_plugin.tokenizers.template_date import template_date
from tests.conftest import CHAT_TEMPLATE, ROWS, write_rows


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["a/sft", "a/dwakd/", "gpt2"]) == ["sft", "dwakd", "gpt2"]
    assert short_names(["a/checkpoint-5", "b/checkpoint-5"]) == [
        "a/checkpoint-5",
        "b/checkpoint-5",
    ]


@pytest.fixture(scope="module")
def worse(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with other weights."""
    folder = tmp_path_factory.mktemp("models") / "worse"
    shutil.copytree(lab / "student", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def arguments(lab: Path, output: Path, *more: str) -> list[str]:
    return [
        *("evaluate", str(lab / "student"), str(lab / "test.jsonl"), "--output", str(output)),
        *("--max-new-tokens", "8", "--seeds", "10,20", *more),
    ]


def test_the_report_is_one_json_object(lab: Path, tmp_path: Path, worse: Path) -> None:
    more = ["--against", str(worse), "--teacher", str(lab / "teacher"), "--json"]
    result = CliRunner().invoke(app, arguments(lab, tmp_path / "out", *more))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert report["rows"] == 6 and report["rows_left_out"] == 0
    assert report["prompt_template"]["kind"] == "alpaca"
    assert report["first_prompt"].startswith("Below is an instruction")
    assert "Below is an instruction" in result.stderr
    student, other, teacher = report["models"]
    assert [one["role"] for one in report["models"]] == ["model", "against", "teacher"]
    for one in (student, other):
        per_seed = one["rouge_l"]["per_seed"]
        assert list(per_seed) == ["10", "20"]
        assert one["rouge_l"]["mean"] == pytest.approx(sum(per_seed.values()) / 2)
        assert one["rouge_l"]["std"] == pytest.approx(np.std(list(per_seed.values()), ddof=1))
        low, high = one["bits_per_byte"]["interval"]
        assert low < one["bits_per_byte"]["value"] < high
        near = one["to_teacher"]
        assert near["rows_compared"] == 6
        assert 0 <= near["next_byte_agreement"]["value"] <= 1
        assert 0 < near["next_byte_divergence_bits"]["value"] < 1
        assert near["structure_cosine"]["q1"] <= near["structure_cosine"]["q3"]
        assert near["structure_inner_product"]["median"] > 0
        assert near["teacher_bits_per_byte_of_samples"]["value"] > 0
    assert "rouge_l" not in teacher and teacher["bits_per_byte"]["value"] > 0
    assert [pair["metric"] for pair in report["paired"]] == ["rouge_l", "bits_per_byte"]
    difference = student["bits_per_byte"]["value"] - other["bits_per_byte"]["value"]
    assert report["paired"][1]["difference"] == pytest.approx(difference)
    assert len(list((tmp_path / "out").glob("responses-*.jsonl"))) == 2


def test_figures_are_those_of_the_files(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is for people; ROUGE-L is what the kept answers have."""
    # Where Rich reads it: a library may have put another mapping in the place of os.environ.
    monkeypatch.setattr(Console, "_environ", {"COLUMNS": "60"})
    result = CliRunner().invoke(app, arguments(lab, tmp_path))
    assert result.exit_code == 0, result.output
    assert "ROUGE-L, 2 seeds" in result.stdout and "First prompt (alpaca" in result.stdout
    wide = [line for line in result.stdout.splitlines() if len(line) > 60]
    assert [line for line in wide if "figures" not in line] == []
    (file,) = tmp_path.glob("responses-student-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    scores = [rouge_l([line["text"]], [(str(ROWS[line["row"]]["output"]),)])[0] for line in lines]
    report = json.loads((tmp_path / "report.json").read_text())
    (one,) = report["models"]
    assert len(lines) == 12
    assert one["rouge_l"]["mean"] == pytest.approx(np.mean(scores))
    assert one["responses"]["mean_tokens"] == np.mean([line["tokens"] for line in lines])


def test_ctrl_c_exits_with_130_and_the_same_command_goes_on(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dwakd(output: str, *more: str) -> Any:
        call = arguments(lab, tmp_path / output, "--json", "--batch-size", "2", *more)
        monkeypatch.setattr(sys, "argv", ["dwakd", *call])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    assert dwakd("whole")[0] == 0
    original = work.with_transformers
    calls: list[Any] = []

    def stopping(*given: Any) -> Any:
        generate = original(*given)

        def some(*batch: Any) -> Any:
            if len(calls) == 4:
                raise KeyboardInterrupt
            calls.append(batch)
            return generate(*batch)

        return some

    monkeypatch.setattr(work, "with_transformers", stopping)
    code, said = dwakd("cut")
    assert code == 130 and said.out == "" and "goes on" in said.err
    monkeypatch.setattr(work, "with_transformers", original)
    code, said = dwakd("cut")
    assert code == 0
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert json.loads(said.out)["models"] == whole["models"]
    # Other sampling is not mixed in, unless the user says so.
    code, said = dwakd("cut", "--top-p", "0.5")
    assert code == 1 and "top_p: 1.0 there, 0.5 here" in said.err
    assert dwakd("cut", "--top-p", "0.5", "--force")[0] == 0


def test_the_next_day_goes_on_with_its_own_answers(lab: Path, tmp_path: Path) -> None:
    """A template that prints today's date: the run's day, then that of the first evaluation."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(lab / "student", run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.chat_template = f"Today is {{{{ strftime_now('%Y-%m-%d') }}}}. {CHAT_TEMPLATE}"
    tokenizer.save_pretrained(run)
    (run / "dwakd").mkdir()
    record = {"identity": {"student": "small"}, "template_date": "2024-02-29"}
    (run / "dwakd" / "run.json").write_text(json.dumps(record))

    def prompt(folder: Path, output: Path, day: date) -> str:
        command = arguments(lab, output, "--prompt-template", "chat", "--json")
        command[1] = str(folder)
        with template_date(day):
            result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)["first_prompt"])

    first, second = date(2026, 11, 28), date(2026, 11, 29)
    assert prompt(run, out, first).startswith("Today is 2024-02-29.")
    plain = tmp_path / "plain"  # no run: nobody says which day it was trained on
    shutil.copytree(run, plain)
    shutil.rmtree(plain / "dwakd")
    assert prompt(plain, tmp_path / "its", first).startswith("Today is 2026-11-28.")
    assert prompt(plain, tmp_path / "its", second).startswith("Today is 2026-11-28.")
    assert prompt(plain, tmp_path / "other", second).startswith("Today is 2026-11-29.")


def test_a_recipe_is_data(lab: Path, tmp_path: Path, recipe: Callable[..., dict[str, Any]]) -> None:
    settings = recipe(
        None, test_datasets=[{"path": str(lab / "test.jsonl"), "type": "alpaca", "split": "train"}]
    )
    file = tmp_path / "sft.yml"
    file.write_text(yaml.safe_dump(settings))
    call = arguments(lab, tmp_path / "out", "--metrics", "bits_per_byte", "--json")
    call[2] = str(file)
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prompt_template"]["kind"] == "recipe" and report["rows"] == 6
    assert report["models"][0]["bits_per_byte"]["value"] == pytest.approx(
        held_out_bits_per_byte(lab / "student", ROWS[:6]), rel=1e-5
    )
    assert not list((tmp_path / "out").glob("responses-*"))


def test_rows_beyond_a_models_positions_are_left_out(lab: Path, tmp_path: Path) -> None:
    long = {"instruction": "Why?", "input": "", "output": "word " * 600}
    data = write_rows(tmp_path / "long.jsonl", [ROWS[0], long])
    call = arguments(lab, tmp_path / "out", "--metrics", "bits_per_byte", "--json")
    call[2] = str(data)
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["rows"], report["rows_left_out"]) == (1, 1)
    assert "1 of 2 rows are left out" in result.stderr
    call[2] = str(write_rows(tmp_path / "none.jsonl", [long]))
    assert "No row fits into the 512 positions" in str(CliRunner().invoke(app, call).exception)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere/at/all"}, "cannot be loaded: no such folder"),
        ({"model": "{lab}"}, "without a model's config.json|holds neither a model"),
        ({"model": "{bare}"}, "has no tokenizer"),
        ({"data": "nothing.jsonl"}, "does not exist"),
        ({"rows": ""}, "is empty"),
        ({"rows": "not json\n"}, "Row 1 of .* is not JSON"),
        ({"rows": '{"instruction": "a", "output": " "}\n'}, "Row 1 of .* has an empty response"),
        ({"rows": '{"instruction": "a"}\n'}, "has no reference"),
        ({"rows": '{"output": "a"}\n'}, "has no `instruction`"),
        ({"rows": '{"messages": [{"role": "user", "content": "a"}]}\n'}, "has no answer"),
        ({"more": ["--teacher", "{lab}/student"]}, "is given twice, as the teacher"),
        ({"more": ["--metrics", "rouge"]}, "choose from rouge_l"),
        ({"more": ["--metrics", "structure"]}, "Name it with --teacher"),
        ({"more": ["--seeds", "1,1"]}, "different whole numbers"),
        ({"more": ["--batch-size", "0"]}, "give auto or a number"),
        ({"more": ["--limit", "0"]}, "give a number from 1"),
        ({"more": ["--top-p", "0"]}, "a top-p from 0.01 to 1"),
        ({"more": ["--device", "cuda:7"]}, "has no such GPU"),
        ({"more": ["--backend", "vllm"]}, "needs vLLM"),
    ],
)
def test_mistakes_are_named(
    lab: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    bare = tmp_path / "models" / "bare"
    bare.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(lab / "student" / name, bare)

    def place(text: str) -> str:
        return text.format(lab=lab, bare=bare)

    data = tmp_path / "rows.jsonl"
    data.write_text(change.get("rows", json.dumps(ROWS[0]) + "\n"))
    call = arguments(lab, tmp_path / "out", *map(place, change.get("more", [])))
    call[1] = place(change.get("model", call[1]))
    call[2] = change.get("data", str(data))
    result = CliRunner().invoke(app, call)
    assert isinstance(result.exception, UserError), result.output
    assert re.search(message, str(result.exception)), str(result.exception)
