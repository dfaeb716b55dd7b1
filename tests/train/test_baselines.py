"""The baselines in whole runs: what they train, log and save, and what they leave out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import trained_projectors
from dwakd_plugin.models.projectors import HeadFollower
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.schema import parse_recipe
from dwakd_plugin.tokenizers.pair import shared_vocabulary
from dwakd_plugin.train.run_folder import check_output_folder

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


def test_settings_that_do_not_go_together(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="matching `order` has no projectors"):
        parse_recipe(recipe({"loss": {"matching": "order"}}))
    with pytest.raises(UserError, match="cosine_weight: it is for variant `mapped`"):
        parse_recipe(recipe({"variant": "paper", "loss": {"cosine_weight": 1.0}}))
    config = parse_recipe(recipe({"variant": "mapped", "loss": {"dtw_weight": 0.1}}))
    assert config is not None and trained_projectors(config.loss) == {"t2s", "embed_t2s"}
    config = parse_recipe(recipe({"variant": "dskdv2"}))
    assert config is not None
    assert trained_projectors(config.loss) == {"t2s"}


@pytest.mark.slow
def test_sft_through_the_plugin_is_plain_sft_on_the_same_rows(
    recipe: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(recipe(None, output_dir=str(tmp_path / "plain"), max_steps=2))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("dwakd_plugin.train.assembly.load_teacher", refuse)
    own = recipe({"variant": "sft"}, max_steps=2)
    log = train(own)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (log, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert not {"t2s_ce", "gate", "paired_share", "uld", "attention_entropy"} & set(log[0])
    assert not {"teacher_ce", "paired_ce"} & set(log[0])
    out = Path(own["output_dir"])
    assert (out / "dwakd" / "run.json").is_file()
    assert not (out / "dwakd" / "projectors.safetensors").exists()
    # A run without projectors resumes as well.
    shutil.rmtree(out / "checkpoint-2", ignore_errors=True)
    train(own | {"auto_resume_from_checkpoints": True, "max_steps": 4})


def test_uld_trains_and_logs_its_distance(recipe: Recipe, train: Train) -> None:
    log = train(recipe({"variant": "uld"}, max_steps=2, val_set_size=0.2, eval_steps=2))
    first = next(line for line in log if "loss" in line)
    assert 0 < first["uld"] < 2
    assert first["loss"] == pytest.approx(first["ce"] + 1.5 * first["uld"], rel=1e-3)
    assert not {"t2s_ce", "gate", "gamma", "attention_entropy", "teacher_ce"} & set(first)
    assert any("eval_uld" in line for line in log)


def test_mapped_trains_without_projectors_and_resumes(recipe: Recipe, train: Train) -> None:
    settings_ = recipe({"variant": "mapped"}, max_steps=3, save_steps=1, val_set_size=0.2)
    log = train(settings_ | {"eval_steps": 2})
    first = next(line for line in log if "loss" in line)
    expected = {"student_kd", "paired_share", "t2s_accuracy", "gate", "teacher_ce", "paired_ce"}
    assert expected <= set(first) and 0.3 < first["paired_share"] <= 1
    assert not {"t2s_ce", "teacher_kd", "hidden_dtw", "gamma", "uld", "attention_entropy"} & set(
        first
    )
    assert first["loss"] == pytest.approx(0.1 * first["ce"] + 0.9 * first["student_kd"], rel=1e-3)
    assert any("eval_student_kd" in line and "eval_t2s_ce" not in line for line in log)
    out = Path(settings_["output_dir"])
    assert not list(out.rglob("projectors.safetensors"))
    last = load_file(out / "model.safetensors")
    for folder in (out / "checkpoint-2", out / "checkpoint-3"):
        shutil.rmtree(folder, ignore_errors=True)
    train(settings_ | {"eval_steps": 2, "auto_resume_from_checkpoints": True})
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(resumed[name], last[name]) for name in last)


def test_mapped_learns_from_hidden_states_through_projectors(
    recipe: Recipe, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block = {
        "variant": "mapped",
        "loss": {"cosine_weight": 3.0, "dtw_weight": 0.2},
        "teacher": {"cache": str(tmp_path / "states")},
        "projectors": {"init": "random", "warmup_steps": 40, "warmup_learning_rate": 0.02},
    }
    settings_ = recipe(block, max_steps=3, save_steps=1, val_set_size=0.2, eval_steps=2)
    with caplog.at_level("INFO"):
        log = train(settings_)
    first = next(line for line in log if "loss" in line)
    hidden = 3 * first["hidden_cosine"] * first["paired_share"]  # no token is inside another here
    warped = 0.2 * (first["hidden_dtw"] + first["embed_dtw"])
    taught = 0.1 * first["ce"] + 0.9 * first["student_kd"]
    assert first["loss"] == pytest.approx(taught + hidden + warped, rel=1e-2)
    assert first["gamma"] == 2 and not {"t2s_ce", "teacher_kd"} & set(first)
    evaluated = next(line for line in log if "eval_loss" in line)
    assert 0 < evaluated["eval_hidden_cosine"] < 2
    said = re.search(r"distance of hidden states ([0-9.]+) to ([0-9.]+)", caplog.text)
    assert said is not None and float(said[2]) < float(said[1]) - 0.1
    assert "+ 3 hidden cosine; variant mapped" in caplog.text
    out = Path(settings_["output_dir"])
    saved = [load_file(out / f"checkpoint-{n}/dwakd/projectors.safetensors") for n in (1, 3)]
    moved = {name for name in saved[0] if not torch.equal(saved[0][name], saved[1][name])}
    assert moved == {"t2s.weight", "t2s.bias", "embed_t2s.weight", "embed_t2s.bias"}
    last = load_file(out / "model.safetensors")
    assert not any("projector" in name for name in last)
    shutil.rmtree(out / "checkpoint-3")
    train(settings_ | {"auto_resume_from_checkpoints": True})
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(resumed[name], last[name]) for name in last)
    for weights, others in (({}, "no projectors"), ({"cosine_weight": 3.0}, "the projectors t2s")):
        other = settings_ | {"auto_resume_from_checkpoints": True}
        other["dwakd"] = other["dwakd"] | {"loss": weights}
        began = "embed_t2s, t2s (kd_weight: 0.9, dtw_weight: 0.2, cosine_weight: 3)"
        said = f"trains the projectors {began}, and this recipe would go on with {others}."
        with pytest.raises(UserError, match=re.escape(said)):
            check_output_folder(ReadRecipe(other))


def test_the_cosine_goes_with_own_answers(recipe: Recipe, train: Train) -> None:
    block = {
        "variant": "mapped",
        "loss": {"cosine_weight": 3.0},
        "own_answers": {"share": 0.5, "max_new_tokens": 4, "start_after": 0},
    }
    log = [line for line in train(recipe(block, max_steps=2, save_steps=2)) if "loss" in line]
    assert [0 < line["hidden_cosine"] < 2 for line in log] == [True, True]
    assert log[1]["own_length"] > 0


@pytest.mark.slow
def test_dskdv2_pairs_tokens_and_its_s2t_follows_the_head(
    recipe: Recipe, train: Train, lab: Path
) -> None:
    settings_ = recipe({"variant": "dskdv2"}, max_steps=2, save_steps=1)
    log = train(settings_)
    first = log[0]
    assert 0.3 < first["paired_share"] <= 1
    assert {"t2s_ce", "student_kd", "teacher_kd", "t2s_accuracy", "gate"} <= set(first)
    assert {"teacher_ce", "paired_ce"} <= set(first)
    assert not {"hidden_dtw", "gamma", "attention_entropy", "uld"} & set(first)
    terms = first["student_kd"] + first["t2s_ce"]
    assert first["loss"] > 0.5 * (first["ce"] + terms) - 1e-3

    out = Path(settings_["output_dir"])
    projectors = [load_file(out / f"checkpoint-{n}/dwakd/projectors.safetensors") for n in (1, 2)]
    moved = {
        name for name in projectors[0] if not torch.equal(projectors[0][name], projectors[1][name])
    }
    assert moved == {"t2s.weight", "t2s.bias", "s2t.weight"}
    # The second step's map is that of the head after the first.
    teacher = load_file(lab / "teacher" / "model.safetensors")["lm_head.weight"]
    student = load_file(out / "checkpoint-1" / "model.safetensors")
    head = student.get("lm_head.weight", student["model.embed_tokens.weight"])
    sides = [AutoTokenizer.from_pretrained(lab / side) for side in ("teacher", "student")]
    expected = torch.nn.Linear(head.shape[1], teacher.shape[1])
    HeadFollower(shared_vocabulary(*sides), teacher).update(expected, head)
    torch.testing.assert_close(projectors[1]["s2t.weight"], expected.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dwakdv2_trains_packed_and_from_a_cache(
    recipe: Recipe, train: Train, tmp_path: Path, lab: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(lab / "teacher", teacher)
    block = {
        "variant": "dwakdv2",
        "teacher": {"base_model": str(teacher), "cache": str(tmp_path / "states")},
    }
    packed = {"sample_packing": True, "micro_batch_size": 1, "attn_implementation": "sdpa"}
    log = train(recipe(block, max_steps=2, **packed))
    assert {"hidden_dtw", "embed_dtw", "band_share", "gamma", "paired_share"} <= set(log[0])
    assert 0.3 < log[0]["paired_share"] <= 1
