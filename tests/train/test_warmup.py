"""`dwakd warmup`: what it trains, what it leaves alone, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import dwakd_plugin.train.warmup as warmup_module
from dwakd_cli.main import app
from dwakd_plugin.errors import UserError
from dwakd_plugin.models.projectors import Projectors, head_signature, load_projectors
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.train.open_run import open_run
from dwakd_plugin.train.warmup_file import inputs_fingerprint
from tests.conftest import ROWS, write_rows

Recipe = Callable[..., dict[str, Any]]
Write = Callable[[dict[str, Any]], Path]


def warmup(file: Path, *options: str) -> dict[str, Any]:
    arguments = ["warmup", str(file), "--json", *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_warmup_trains_the_projectors_alone_and_once(
    recipe: Recipe, write: Write, lab: Path, tmp_path: Path
) -> None:
    # A recipe without a teacher, as `dwakd train` takes it.
    plain = recipe(None) | {"dwakd": {"projectors": {"warmup_learning_rate": 0.03}}}
    file = write(plain)
    models = {side: contents(lab / side) for side in ("student", "teacher")}
    options = ["--teacher", str(lab / "teacher"), "--epochs", "3", "--plot", "course.png"]
    report = warmup(file, *options)

    assert report["rows"] == {
        "train": 32,
        "held_out": 8,
        "held_out_from": "split from the training rows",
    }
    before, after = report["before"], report["after"]
    assert set(before) == {"t2s_ce", "t2s_accuracy", "s2t_kl", "hidden_dtw", "embed_dtw"}
    assert after["t2s_ce"] < before["t2s_ce"] - 0.5
    assert after["t2s_accuracy"] > before["t2s_accuracy"]
    assert [line["epoch"] for line in report["history"]] == [1, 2, 3]
    best = report["history"][report["best_epoch"] - 1]
    assert best["t2s_ce"] == min(line["t2s_ce"] for line in report["history"])
    assert after["t2s_ce"] == pytest.approx(best["t2s_ce"])
    assert models == {side: contents(lab / side) for side in ("student", "teacher")}
    assert (tmp_path / "course.png").read_bytes()[:4] == b"\x89PNG"
    # Beside the output folder, which does not look like a run; and no unfinished business.
    made = tmp_path / "out-projectors.safetensors"
    assert report["output"] == str(made)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))

    written = made.stat().st_mtime_ns
    again = warmup(file, *options)
    assert again["unchanged"] and not report["unchanged"]
    assert {**again, "unchanged": False} == report
    assert made.stat().st_mtime_ns == written
    shown = CliRunner().invoke(app, ["warmup", str(file), *options])
    assert "Nothing to do" in shown.stdout
    assert f"path: {made}" in shown.stdout

    # Training starts from the file.
    with open_run(ReadRecipe(recipe({"projectors": {"path": str(made)}}))) as run:
        for name, tensor in run.distillation.projectors.state_dict().items():
            assert torch.equal(tensor, load_file(made)[name])


@pytest.mark.slow
def test_what_is_interrupted_goes_on_to_the_same_end(
    recipe: Recipe, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe({"projectors": {"init": "random"}}, val_set_size=0.2)
    file = write(settings)
    options = ["--epochs", "4", "--teacher-space"]
    whole = warmup(file, *options, "--output", "whole.safetensors")
    assert whole["after"]["s2t_kl"] < whole["before"]["s2t_kl"]
    assert whole["rows"]["held_out_from"] == "the recipe's evaluation rows"

    # Stopped in the third epoch.
    real_step, steps = warmup_module._step, 0

    def stopping_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2 * 8 + 3:
            raise KeyboardInterrupt
        return real_step(*args, **kwargs)

    monkeypatch.setattr(warmup_module, "_step", stopping_step)
    arguments = ["warmup", str(file), *options, "--output", "cut.safetensors"]
    stopped = CliRunner().invoke(app, arguments)
    assert stopped.exit_code == 130
    assert "The same command goes on" in stopped.output.replace("\n", " ")
    assert not (tmp_path / "cut.safetensors").exists()

    monkeypatch.setattr(warmup_module, "_step", real_step)
    student_forwards = []
    real_fill = warmup_module.FrozenPair.fill

    def fill(self: Any, datasets: Any, progress: Any) -> None:
        real_fill(self, datasets, lambda done, total: student_forwards.append(done))

    monkeypatch.setattr(warmup_module.FrozenPair, "fill", fill)
    resumed = warmup(file, *options, "--output", "cut.safetensors")
    assert student_forwards == [0]  # its states were kept too
    assert resumed["history"] == whole["history"]
    first, second = load_file("whole.safetensors"), load_file("cut.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
def test_early_stopping_keeps_the_best(recipe: Recipe, write: Write) -> None:
    file = write(recipe({"projectors": {"warmup_learning_rate": 10.0}}))  # it can but get worse
    report = warmup(file, "--patience", "1")
    assert len(report["history"]) == 1
    assert report["best_epoch"] == 0
    assert report["after"] == pytest.approx(report["before"])


def test_the_file_refuses_another_pair(
    recipe: Recipe, write: Write, lab: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out-projectors.safetensors"
    warmup(write(recipe({})), "--epochs", "1")
    heads = {
        f"{side}_head": load_file(lab / side / "model.safetensors")[name]
        for side, name in (("student", "model.embed_tokens.weight"), ("teacher", "lm_head.weight"))
    }
    same = {name: head_signature(head) for name, head in heads.items()}
    half = {name: head_signature(head.to(torch.bfloat16)) for name, head in heads.items()}
    projectors = Projectors(24, 40)
    # The same models at another place, or in another precision.
    for pair in (same, half):
        load_projectors(projectors, file, {"student": "moved", "teacher": "moved"} | pair)
    other = torch.randn_like(heads["teacher_head"])
    with pytest.raises(UserError, match="another pair of models:\n  teacher_head"):
        load_projectors(projectors, file, same | {"teacher_head": head_signature(other)})
    with pytest.raises(UserError, match="student_head"):
        taller = torch.cat([heads["student_head"], heads["student_head"][:1]])
        load_projectors(projectors, file, same | {"student_head": head_signature(taller)})


def test_inputs_are_settings_and_contents(recipe: Recipe, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "own.jsonl", ROWS)
    datasets = [{"path": str(rows), "type": "alpaca"}]
    settings = recipe({}, datasets=datasets)
    first = inputs_fingerprint(ReadRecipe(settings), {"epochs": 3})
    assert first == inputs_fingerprint(
        ReadRecipe(settings | {"output_dir": "elsewhere"}), {"epochs": 3}
    )
    cached = recipe({"teacher": {"cache": "states"}}, datasets=datasets)
    assert first == inputs_fingerprint(ReadRecipe(cached), {"epochs": 3})
    assert first != inputs_fingerprint(ReadRecipe(settings), {"epochs": 4})
    assert first != inputs_fingerprint(ReadRecipe(settings | {"sequence_len": 128}), {"epochs": 3})
    write_rows(rows, ROWS[1:])
    assert first != inputs_fingerprint(ReadRecipe(settings), {"epochs": 3})


def test_mistakes_are_messages(recipe: Recipe, write: Write, tmp_path: Path) -> None:
    def error_of(file: Path, *options: str) -> str:
        with pytest.raises(UserError) as error:
            CliRunner().invoke(app, ["warmup", str(file), *options], catch_exceptions=False)
        return str(error.value)

    assert "`none.yml` does not exist" in error_of(Path("none.yml"))
    assert "names no teacher" in error_of(write(recipe(None)))
    typo = write(recipe({"projectors": {"warmup_rate": 1}}))
    assert "dwakd.projectors.warmup_rate: unknown key; did you mean" in error_of(typo)
    assert "kd_weight is 0" in error_of(write(recipe({"loss": {"kd_weight": 0}})))
    file = write(recipe({}))
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"text")
    assert "--force replaces the file" in error_of(file, "--output", str(other))
    assert "is a folder" in error_of(file, "--output", str(tmp_path))
    few = write_rows(tmp_path / "few.jsonl", ROWS[:10])
    few_rows = recipe({}, datasets=[{"path": str(few), "type": "alpaca"}])
    assert "too few to hold 8 out" in error_of(write(few_rows))
