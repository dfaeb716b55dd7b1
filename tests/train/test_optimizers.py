"""The projectors beside any optimizer and schedule of the student, and in its checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.utils.optimizers.adamc import AdamC
from safetensors.torch import load_file

from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.train.projector_optimizer import give_their_rate, schedule_their_rate
from tests.runs import losses, weights

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]
COMPILED = """
import sys, torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
do_train(load_cfg(sys.argv[1]), TrainerCliArgs())
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
"""
PROJECTORS = Path("dwakd") / "projectors.safetensors"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_one_cycle_peaks_at_the_projectors_own_rate() -> None:
    model = torch.nn.ModuleDict({"student": torch.nn.Linear(3, 3), "own": Projectors(3, 5)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    give_their_rate(optimizer, model["own"], 0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=20)
    schedule_their_rate(scheduler, model["own"], 0.02)
    seen = []
    for _ in range(20):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if len(seen) < 20:
            scheduler.step()
    student, own = map(list, zip(*seen, strict=True))
    assert max(student) == pytest.approx(1e-3)
    assert own == pytest.approx([20 * rate for rate in student])


def test_what_an_optimizer_made_of_the_students_rate_goes_with_the_projectors_own() -> None:
    """AdamC's decay is w · lr² / max_lr: with the student's max_lr it would be 20 times that."""
    model = torch.nn.ModuleDict({"student": torch.nn.Linear(3, 3), "own": Projectors(3, 5)})
    plain, own = (
        AdamC(model["own"].parameters(), lr=0.02, weight_decay=0.5),
        AdamC(model.parameters(), lr=1e-3, weight_decay=0.5),
    )
    give_their_rate(own, model["own"], 0.02)
    same_rate = [group for group in own.param_groups if group["lr"] == 0.02]
    assert {group["max_lr"] for group in same_rate} == {plain.param_groups[0]["max_lr"]} == {0.02}
    assert {group["max_lr"] for group in own.param_groups if group["lr"] != 0.02} == {1e-3}


def test_projectors_that_no_group_holds_are_added() -> None:
    """Q-GaLore's groups are made of the student before the projectors are attached to it."""
    student, projectors = torch.nn.Linear(3, 3), Projectors(3, 5)
    projectors.query.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    give_their_rate(optimizer, projectors, 0.02)
    _, own = optimizer.param_groups
    assert own["lr"] == 0.02
    trained = [each for each in projectors.parameters() if each.requires_grad]
    assert list(map(id, own["params"])) == list(map(id, trained))


@pytest.mark.slow
def test_the_best_model_is_student_and_projectors_of_one_checkpoint(
    recipe: Recipe, train: Train
) -> None:
    settings = recipe(
        {},
        val_set_size=4,
        eval_steps=1,
        save_steps=1,
        max_steps=3,
        learning_rate=0.5,  # each step makes it worse
        lr_scheduler="constant",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    train(settings)
    out = Path(settings["output_dir"])
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    best, last = Path(state["best_model_checkpoint"]), out / "checkpoint-3"
    assert best.name != last.name
    assert same(weights(out), weights(best)) and not same(weights(out), weights(last))
    assert same(load_file(out / PROJECTORS), load_file(best / PROJECTORS))
    assert not same(load_file(out / PROJECTORS), load_file(last / PROJECTORS))


@pytest.mark.slow
def test_a_checkpoint_without_optimizer_is_not_resumed(
    recipe: Recipe, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    settings = recipe({}, save_only_model=True)
    train(settings)
    with pytest.raises(SystemExit):
        train(settings | {"auto_resume_from_checkpoints": True, "max_steps": 6})
    assert "checkpoint-4 cannot be resumed: it holds no optimizer state" in caplog.text


@pytest.mark.slow
def test_muon_trains_the_student_and_adamw_the_projectors(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    settings = recipe({}, optimizer="muon")
    with torch.compiler.set_stance("force_eager"):  # it compiles a product of matrices
        train(settings)
        whole, resumed = Path(settings["output_dir"]), tmp_path / "resumed"
        shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
        train(settings | {"output_dir": str(resumed), "auto_resume_from_checkpoints": True})
    two, four = (load_file(whole / f"checkpoint-{n}" / PROJECTORS) for n in (2, 4))
    moved = [name for name in two if not torch.equal(two[name], four[name])]
    assert {"query.bias", "t2s.bias", "embed_t2s.bias", "t2s.weight"} <= set(moved)
    # AdamW's step is the rate at most, where Muon's would be many times that.
    largest = max(float((two[name] - four[name]).abs().max()) for name in moved)
    assert largest < 2.5 * 1e-3
    assert same(load_file(whole / PROJECTORS), load_file(resumed / PROJECTORS))
    assert same(weights(whole), weights(resumed))


@pytest.mark.slow
def test_a_compiled_student_learns_the_same(
    recipe: Recipe, train: Train, write: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """Its decoder is compiled; the loss stays outside, which no graph can hold.

    In a process of its own: what Dynamo leaves behind, numba's compiler fails on.
    """
    plain = losses(train(recipe({})))
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    file = write(recipe({}, output_dir=str(tmp_path / "compiled"), **compiled))
    subprocess.run([sys.executable, "-c", COMPILED, str(file)], check=True)
    state = json.loads((tmp_path / "compiled/checkpoint-4/trainer_state.json").read_text())
    assert losses(state["log_history"]) == pytest.approx(plain, rel=1e-5)
