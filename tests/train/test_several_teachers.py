"""Runs by several teachers: one in the list, two copies, rows of one's own, a cache, resuming."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import dwakd_plugin.models.teacher.cached as cached
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.train.assembly import _say_if_same
from tests.conftest import ROWS, write_rows
from tests.runs import losses, weights

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.mark.slow
def test_one_in_the_list_and_two_copies_are_the_one_teacher(
    recipe: Recipe, train: Train, lab: Path, tmp_path: Path
) -> None:
    teacher = {"base_model": str(lab / "teacher")}
    half = teacher | {"weight": 0.5}
    blocks: dict[str, dict[str, Any]] = {
        "one": {"teacher": teacher},
        "listed": {"teachers": [teacher | {"name": "maths"}]},
        "copies": {"teachers": [half | {"name": "maths"}, half | {"name": "code"}]},
    }
    settings = recipe({"variant": "mapped"}, max_steps=3)
    logs = {}
    for name, block in blocks.items():
        out = str(tmp_path / name)
        logs[name] = train(settings | {"dwakd": block, "output_dir": out})
    of_time = ("runtime", "second", "per_sec", "memory", "grad_norm")
    lines = {
        name: [
            {key: line[key] for key in line if not any(word in key for word in of_time)}
            for line in log
        ]
        for name, log in logs.items()
    }
    assert lines["listed"] == lines["one"]
    student = {name: weights(tmp_path / name) for name in blocks}
    assert all(torch.equal(student["listed"][key], value) for key, value in student["one"].items())
    for key, value in student["one"].items():
        # Adam makes a step of any gradient, be it a sum's rounding.
        assert (student["copies"][key] - value).norm() < 1e-3 * value.norm(), key
    for own, line in zip(lines["one"], lines["copies"], strict=True):
        assert {key: line[key] for key in own} == pytest.approx(own, rel=1e-4)
    assert lines["copies"][0]["maths/student_kd"] == lines["copies"][0]["code/student_kd"]


@pytest.mark.slow
def test_live_and_cached_teachers_of_their_own_rows_resume(
    recipe: Recipe,
    train: Train,
    lab: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bodies: list[Any] = []
    load = cached.load_teacher

    def watched(*arguments: Any) -> Teacher:
        gc.disable()  # nothing else may collect what is to be gone
        assert not [1 for body in bodies if body() is not None], "one after another"
        teacher = load(*arguments)
        bodies.append(weakref.ref(teacher.model))
        return teacher

    monkeypatch.setattr(cached, "load_teacher", watched)
    files = [str(write_rows(tmp_path / f"{name}.jsonl", ROWS[:20])) for name in "abc"]
    teacher = {"base_model": str(lab / "teacher")}
    teachers = [
        teacher | {"name": "live", "weight": 0.3, "datasets": files[:2]},
        *(
            teacher | {"name": name, "datasets": [file], "cache": str(tmp_path / f"states-{name}")}
            for name, file in (("maths", files[1]), ("code", files[2]))
        ),
    ]
    settings = recipe({"variant": "mapped"}, max_steps=4, val_set_size=6, eval_steps=2)
    settings["datasets"] = [{"path": file, "type": "alpaca"} for file in files]
    settings["dwakd"] = {"teachers": teachers}
    try:
        log = train(settings)
    finally:
        gc.enable()
    assert len(bodies) == 2
    said = {"live": ("weight 0.3, of", "; 40 kept"), "maths": ("from the cache", "; 20 kept")}
    for name, words in said.items():
        (line,) = {each for each in caplog.text.splitlines() if f"  teacher {name} " in each}
        assert all(each in line for each in words)
    trained = [line for line in log if "loss" in line]
    assert {"live/student_kd", "student_kd", "ce"} <= set(trained[0])
    (record,) = [json.loads((Path(settings["output_dir"]) / "dwakd" / "run.json").read_text())]
    assert [one["name"] for one in record["settings"]["teachers"]] == ["live", "maths", "code"]

    whole, resumed = Path(settings["output_dir"]), tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    again = settings | {"output_dir": str(resumed), "auto_resume_from_checkpoints": True}
    assert losses(train(again))[-2:] == losses(log)[-2:]
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_teacher_of_the_students_own_tokenizer_is_told_of(
    lab: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = (AutoTokenizer.from_pretrained(lab / side) for side in ("student", "teacher"))
    with caplog.at_level("INFO"):
        _say_if_same("big", other, own)
        assert not caplog.text
        _say_if_same("big", own, own)
    assert "big has the student's own tokenizer. That works; plain distillation" in caplog.text
