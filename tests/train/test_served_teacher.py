"""Runs whose teacher is on a server: as with the same teacher here, and when the server dies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.served import MODEL, Behaviour, serving

FIGURES = ("loss", "student_kd", "ce", "grad_norm", "t2s_accuracy")


@pytest.fixture(scope="module")
def teacher_folder(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher without padding in its head, which no server tells of."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("served")
    tokenizer = AutoTokenizer.from_pretrained(lab / "teacher")
    model = AutoModelForCausalLM.from_pretrained(lab / "teacher", dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def server(teacher_folder: Path) -> Iterator[Behaviour]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    with serving(model, AutoTokenizer.from_pretrained(teacher_folder)) as behaviour:
        yield behaviour


def block(folder: Path, **teacher: Any) -> dict[str, Any]:
    return {"variant": "mapped", "teacher": {"base_model": str(folder), "top_k": 16, **teacher}}


def figures(log: list[dict[str, Any]]) -> list[list[float]]:
    found = [[line[name] for name in FIGURES if name in line] for line in log if "loss" in line]
    assert found and all(found)
    return found


@pytest.mark.slow
def test_a_run_is_that_of_the_same_teacher_here_and_ends_with_a_checkpoint_where_it_dies(
    server: Behaviour,
    teacher_folder: Path,
    recipe: Callable[..., dict[str, Any]],
    train: Callable[[dict[str, Any]], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"gradient_accumulation_steps": 2, "sample_packing": False, "val_set_size": 4}
    here = train(recipe(block(teacher_folder), **settings, output_dir=str(tmp_path / "here")))
    served = block(teacher_folder, server=server.address, model=MODEL, server_patience=60)
    there = train(recipe(served, **settings, output_dir=str(tmp_path / "there")))
    for one, other in zip(figures(here), figures(there), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert server.most_at_once > 1

    # So is one of the three that it is in a cache, on the server, and here.
    teachers = [
        {"name": "kept", "weight": 0.2, "cache": str(tmp_path / "kept")},
        {"name": "served", "weight": 0.5, "server": server.address, "model": MODEL},
        {"name": "live", "weight": 2.0},
    ]
    copies = [block(teacher_folder, **own)["teacher"] for own in teachers]
    mixed = {"variant": "mapped", "teachers": copies}
    log = train(recipe(mixed, **settings, output_dir=str(tmp_path / "mixed")))
    for one, other in zip(figures(here), figures(log), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-3)  # a cache rounds
    for name in ("kept", "served", "live"):
        assert log[0][f"{name}/student_kd"] == pytest.approx(log[0]["student_kd"], abs=1e-3)

    # It dies once the third step's rows are wanted, and nothing has been saved since the second.
    from dwakd_plugin.train import served_rows

    complete = served_rows.ServedRows._complete

    def dying(trainer: Any, batches: list[Any]) -> None:
        if trainer.state.global_step == 3 and server.always is None and not revived:
            server.always = (502, {})
            served_teacher = trainer.distillation.teacher.served
            served_teacher.server.patience = 1
            batches[0]["teacher_asked"] = torch.tensor([served_teacher.want(*row)])
        complete(trainer, batches)

    revived: list[bool] = []
    row = torch.arange(9), torch.arange(9)
    monkeypatch.setattr(served_rows.ServedRows, "_complete", dying)
    folder = tmp_path / "died"
    with pytest.raises(SystemExit):
        train(recipe(served, **settings, output_dir=str(folder)))
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    server.always = None
    revived.append(True)
    again = train(
        recipe(served, **settings, output_dir=str(folder), auto_resume_from_checkpoints=True)
    )
    assert figures(again) == [pytest.approx(each, rel=1e-4, abs=1e-5) for each in figures(there)]
