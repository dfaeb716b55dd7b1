"""Whole runs through axolotl with a tiny pair: what is trained, logged, saved and resumed."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd_plugin.evaluate.held_out import alpaca_prompt
from dwakd_plugin.models.folder import base_revision
from tests.conftest import ROWS
from tests.runs import TERMS, losses, weights

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]
FIGURES = {"t2s_accuracy", "gate", "teacher_ce", "attention_entropy", "band_share", "gamma"}


def test_a_run_distils_and_leaves_only_the_student(recipe: Recipe, train: Train, lab: Path) -> None:
    # The rows held out are one batch, whose loss is the mean over their tokens.
    settings = recipe({}, val_set_size=4, eval_steps=2)
    log = train(settings)

    # The plugin was truly active: axolotl trains plain SFT where one fails to import.
    trained = [line for line in log if "loss" in line]
    assert set(trained[0]) >= TERMS | FIGURES
    evaluated = [line for line in log if "eval_loss" in line]
    assert {f"eval_{name}" for name in TERMS} <= set(evaluated[-1])
    assert evaluated[-1]["eval_loss"] == pytest.approx(evaluated[-1]["eval_ce"], rel=1e-4)
    assert trained[0]["ppl"] == pytest.approx(math.exp(trained[0]["ce"]), rel=1e-3)
    assert [line["gamma"] for line in trained] == pytest.approx([2.0, 1.6, 1.2, 0.8])
    assert evaluated[-1]["eval_ce"] < evaluated[0]["eval_ce"]  # of the same rows

    out = Path(settings["output_dir"])
    for folder in (out, out / "checkpoint-4"):
        assert not [name for name in weights(folder) if "projector" in name or "dwakd" in name]
        projectors = load_file(folder / "dwakd" / "projectors.safetensors")
        assert set(projectors) == {
            f"{name}.{kind}"
            for name in ("query", "t2s", "s2t", "embed_t2s")
            for kind in ("weight", "bias")
        }
    student = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(lab / "student")
    assert student.state_dict().keys() == start.state_dict().keys()
    moved = [
        name
        for name, tensor in student.state_dict().items()
        if not torch.equal(tensor, start.state_dict()[name])
    ]
    assert moved


def test_lora_trains_the_adapter_and_the_projectors(recipe: Recipe, train: Train) -> None:
    lora = {
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
    }
    settings = recipe({}, revision_of_model="0123abc", **lora)  # of the base, on the hub
    log = train(settings)
    assert set(log[0]) >= TERMS | FIGURES
    out = Path(settings["output_dir"])
    assert base_revision(out) == base_revision(out / "checkpoint-2") == "0123abc"
    saved = weights(out)
    assert saved
    assert all("lora_" in name for name in saved)
    before = load_file(out / "checkpoint-2" / "dwakd" / "projectors.safetensors")
    after = load_file(out / "dwakd" / "projectors.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_resuming_gives_the_same_weights_bit_for_bit(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    settings = recipe({}, max_steps=6, dataloader_num_workers=0)
    train(settings)
    whole = Path(settings["output_dir"])
    for step in (2, 4):
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        # As a kill leaves it: the next checkpoint begun, and never finished.
        (resumed / f"checkpoint-{step + 2}").mkdir()
        train(settings | {"output_dir": str(resumed), "auto_resume_from_checkpoints": True})
        for file in ("model.safetensors", "dwakd/projectors.safetensors"):
            expected, found = load_file(whole / file), load_file(resumed / file)
            assert all(torch.equal(expected[name], found[name]) for name in expected), (step, file)


@pytest.mark.slow
def test_accumulation_does_not_change_the_update(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    results = []
    for micro_batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        out = tmp_path / f"{micro_batch}x{accumulation}"
        settings = recipe(
            {},
            micro_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            output_dir=str(out),
        )
        log = train(settings)
        results.append((losses(log), weights(out)))
    for other_losses, other_weights in results[1:]:
        assert other_losses == pytest.approx(results[0][0], rel=1e-5)
        for name, tensor in results[0][1].items():
            # Adam divides by the gradient's size, which blows up rounding where it is near zero.
            assert torch.allclose(other_weights[name], tensor, atol=1e-4), name


def test_without_distillation_weights_it_is_plain_sft(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    plain = losses(train(recipe(None, output_dir=str(tmp_path / "plain"))))
    off = {"loss": {"ce_weight": 1.0, "kd_weight": 0.0, "dtw_weight": 0.0}}
    through_plugin = losses(train(recipe(off, output_dir=str(tmp_path / "plugin"))))
    assert through_plugin == pytest.approx(plain, abs=1e-5)


@pytest.mark.skipif(
    tuple(map(int, version("axolotl").split(".")[:2])) < (0, 21),
    reason="axolotl 0.21 finds plugins",
)
def test_the_plugins_line_may_be_left_out(recipe: Recipe, train: Train) -> None:
    config = recipe({})
    del config["plugins"]
    assert any("t2s_ce" in line for line in train(config))


@pytest.mark.slow
def test_the_plugin_is_inert_without_the_switch(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    plain = recipe(None, output_dir=str(tmp_path / "plain"))
    listed = recipe(None, output_dir=str(tmp_path / "listed"), plugins=["dwakd_plugin.DWAKDPlugin"])
    assert losses(train(plain)) == losses(train(listed))
    assert not (tmp_path / "listed" / "dwakd").exists()
    for name, tensor in weights(tmp_path / "plain").items():
        assert torch.equal(tensor, weights(tmp_path / "listed")[name])


@pytest.mark.slow
def test_a_cached_teacher_teaches_the_same(
    recipe: Recipe, train: Train, tmp_path: Path, lab: Path
) -> None:
    live = losses(train(recipe({}, output_dir=str(tmp_path / "live"))))
    teacher = tmp_path / "teacher"
    shutil.copytree(lab / "teacher", teacher)
    cached = {"teacher": {"base_model": str(teacher), "cache": str(tmp_path / "states")}}
    first = losses(train(recipe(cached, output_dir=str(tmp_path / "first"))))
    assert first == pytest.approx(live, rel=1e-5)  # other batches in the teacher's forward
    again = losses(train(recipe(cached, output_dir=str(tmp_path / "again"))))
    assert again == first
    assert len(list((tmp_path / "states").glob("states-*.safetensors"))) == 1


def test_test_datasets_are_evaluated_with_the_teacher(
    recipe: Recipe, train: Train, lab: Path
) -> None:
    test_rows = [{"path": str(lab / "test.jsonl"), "type": "alpaca", "split": "train"}]
    log = train(recipe({}, test_datasets=test_rows, eval_steps=2))
    evaluated = [line for line in log if "eval_loss" in line]
    assert len(evaluated) >= 2
    assert "eval_student_kd" in evaluated[0]


def test_variants_switch_terms_off(recipe: Recipe, train: Train) -> None:
    log = train(recipe({"variant": "dskd"}, max_steps=2))
    assert "student_kd" in log[0]
    assert not {"hidden_dtw", "embed_dtw", "gamma", "band_share"} & set(log[0])


def test_a_non_finite_loss_stops_the_run_and_names_the_row(
    recipe: Recipe, train: Train, lab: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = tmp_path / "broken"
    shutil.copytree(lab / "teacher", teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    ids = [
        {*tokenizer(alpaca_prompt(row))["input_ids"], *tokenizer(row["output"])["input_ids"]}
        for row in ROWS
    ]
    poisoned = min(ids[8] - set().union(*(ids[i] for i in range(len(ROWS)) if i % 10 != 8)))
    with torch.no_grad():
        model.model.embed_tokens.weight[poisoned] = float("nan")
    model.save_pretrained(teacher)
    settings = recipe(
        {"teacher": {"base_model": str(teacher)}, "projectors": {"init": "random"}},
        max_steps=20,
        save_steps=1,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
    )
    with pytest.raises(SystemExit):
        train(settings)
    assert re.search(r"nan in row [123]?8 of \S+rows\.jsonl", caplog.text)
    out = Path(settings["output_dir"])
    checkpoints = list(out.glob("checkpoint-*"))
    assert checkpoints and all((each / "trainer_state.json").is_file() for each in checkpoints)
    steps = [int(each.name.split("-")[1]) for each in checkpoints]
    assert f"not finite at step {max(steps) + 1}:" in caplog.text


@pytest.mark.slow
def test_warm_up_trains_the_projectors_and_not_the_student(
    recipe: Recipe, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # With all rates at 0 afterwards, what differs at the end is the warm-up's doing.
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 1, "save_steps": 1}
    frozen = {"learning_rate": 1e-12}
    results = {}
    for steps in (0, 60):
        out = tmp_path / f"out-{steps}"
        projectors = {
            **frozen,
            "init": "random",
            "warmup_steps": steps,
            "warmup_learning_rate": 0.05,
        }
        log = train(recipe({"projectors": projectors}, output_dir=str(out), **still))
        results[steps] = log[0], weights(out), load_file(out / "dwakd" / "projectors.safetensors")
    cold, warm = results[0], results[60]
    assert warm[0]["t2s_ce"] < 0.9 * cold[0]["t2s_ce"]
    assert warm[0]["ce"] == cold[0]["ce"]
    assert all(torch.equal(warm[1][name], tensor) for name, tensor in cold[1].items())
    assert not torch.equal(warm[2]["query.weight"], cold[2]["query.weight"])
    assert torch.equal(warm[2]["s2t.weight"], cold[2]["s2t.weight"])
