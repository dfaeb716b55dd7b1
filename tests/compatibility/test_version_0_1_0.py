"""What version 0.1.0 wrote is read as it was meant: nothing of a user's goes stale by an upgrade.

`version_0_1_0/` holds what that version made, by these commands within the folder:

    dwakd warmup recipe.yml --output projectors.safetensors   (its `projectors` line left out)
    dwakd cache recipe.yml
    dwakd train recipe.yml
    dwakd evaluate run test.jsonl --against student --teacher teacher --seeds 1 \
        --max-new-tokens 8 --output evaluated --json > evaluate.json

and of the run its first checkpoint (step 2 of 4) and its end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

from dwakd_cli.main import app

WRITTEN = Path(__file__).parent / "version_0_1_0"
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that is the current folder: all paths in it are relative."""
    copy = tmp_path / "old"
    shutil.copytree(WRITTEN, copy)
    monkeypatch.chdir(copy)
    return copy


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "lock"}


def test_a_run_resumes_to_the_same_student(folder: Path, train: Train) -> None:
    """With its checkpoint, its projectors and its cache, which must hold every row as it is."""
    cached = content(folder / "cache")
    student = load_file(folder / "run" / "model.safetensors")
    projectors = load_file(folder / "run" / "dwakd" / "projectors.safetensors")
    for file in (folder / "run" / "model.safetensors", folder / "run" / "dwakd" / "run.json"):
        assert file.is_file()
    shutil.rmtree(folder / "run" / "dwakd" / "projectors.safetensors", ignore_errors=True)
    recipe = yaml.safe_load((folder / "recipe.yml").read_text())
    log = train(recipe | {"auto_resume_from_checkpoints": True})
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    assert content(folder / "cache") == cached
    # The last bits are those of a processor's sums.
    assert_close(load_file(folder / "run" / "model.safetensors"), student, rtol=0, atol=1e-6)
    resumed = load_file(folder / "run" / "dwakd" / "projectors.safetensors")
    assert_close(resumed, projectors, rtol=0, atol=1e-6)


def test_warmed_up_projectors_start_a_run(folder: Path, train: Train) -> None:
    recipe = yaml.safe_load((folder / "recipe.yml").read_text())
    old = json.loads((folder / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    log = train(recipe | {"output_dir": "new", "save_steps": 1, "max_steps": 1})
    assert log[0]["t2s_ce"] == pytest.approx(old["log_history"][0]["t2s_ce"], rel=1e-4)


def test_an_evaluation_goes_on_with_its_answers(folder: Path) -> None:
    answers = content(folder / "evaluated")
    options = ["--seeds", "1", "--max-new-tokens", "8", "--output", "evaluated", "--json"]
    models = ["run", "test.jsonl", "--against", "student", "--teacher", "teacher"]
    result = CliRunner().invoke(app, ["evaluate", *models, *options])
    assert result.exit_code == 0, result.output
    now = content(folder / "evaluated")
    assert {name: now[name] for name in answers} == answers
    figures = json.loads((folder / "evaluated" / "report.json").read_text())
    assert_same(figures, json.loads((folder / "evaluate.json").read_text()))


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """Equal, numbers to the last digits; what the old one did not say is not asked."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys(), place
        for key, value in expected.items():
            if key != "seconds":
                assert_same(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{place}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), place
    else:
        assert found == expected, place
