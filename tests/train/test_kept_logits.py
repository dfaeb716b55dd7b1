"""What a run keeps of its student's logits, against what is loaded from it later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dwakd_plugin.errors import UserError
from dwakd_plugin.export.export import export
from dwakd_plugin.recipe import Recipe as RecipeOfRun
from dwakd_plugin.recipe.checks import check_recipe
from dwakd_plugin.train.kept_logits import LOGITS_FILE, read_logits

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}


def change(folder: Path, by: float) -> None:
    """Moves the weights of a model's folder between its embeddings and its head."""
    file = next(folder.glob("model.safetensors"))
    weights = {name: each + by * ("mlp" in name) for name, each in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


@pytest.mark.slow
def test_an_export_is_the_student_that_was_trained(
    recipe: Recipe, train: Train, lab: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(lab / "student", base)
    settings = recipe({}, base_model=str(base), learning_rate=0.05, **LORA)
    train(settings)
    run = Path(settings["output_dir"])
    kept = read_logits(run)
    assert kept is not None and kept.held == "float32" and len(kept.ids) == 8
    assert (run / "checkpoint-4" / LOGITS_FILE).is_file()
    trained = export(run, tmp_path / "good")["trained"]
    assert trained["relative_logit_difference"] < 1e-4
    assert trained["exported_bits_per_byte"] == pytest.approx(kept.bits_per_byte, rel=1e-4)
    # Of what was computed apart from all this: the merged model's own loss.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "good", dtype=torch.float32)
    nats = sum(
        float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)
        * sum(label != -100 for label in labels[1:])
        for ids, labels in zip(kept.ids, kept.labels, strict=True)
    )
    assert nats == pytest.approx(kept.nats, rel=1e-4)

    change(base, 0.03)  # the adapter's base is another model now
    with pytest.raises(UserError, match="not the one that was trained: its logits differ by"):
        export(run, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()

    # A base that was quantised in training may differ: how much is said.
    with safe_open(run / LOGITS_FILE, framework="pt") as stored:
        facts = json.loads(stored.metadata()["facts"]) | {"held": "4 bit"}
        logits = {"logits": stored.get_tensor("logits")}
    save_file(logits, run / LOGITS_FILE, {"facts": json.dumps(facts)})
    said = export(run, tmp_path / "quantised")["trained"]
    assert said["held"] == "4 bit" and said["relative_logit_difference"] > 1e-3
    assert said["exported_bits_per_byte"] != pytest.approx(said["bits_per_byte"], rel=1e-3)


@pytest.mark.slow
def test_a_checkpoint_on_another_base_is_not_resumed(
    recipe: Recipe, train: Train, lab: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base"
    shutil.copytree(lab / "student", base)
    settings = recipe({}, base_model=str(base), **LORA)
    train(settings)
    again = settings | {"auto_resume_from_checkpoints": True, "max_steps": 6}
    change(base, 0.03)
    with pytest.raises(SystemExit):
        train(again)
    assert "is not the one that was trained" in caplog.text
    change(base, -0.03)
    train(again)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_a_lora_that_changes_its_base_is_refused(init: str, recipe: Recipe, tmp_path: Path) -> None:
    keys = recipe({}, **LORA)
    with pytest.raises(UserError, match=f"peft_init_lora_weights: {init} — it changes the base"):
        check_recipe(RecipeOfRun(keys | {"peft_init_lora_weights": init}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"init_lora_weights": init}))
    with pytest.raises(UserError, match=r"lora_model_dir: .* begun with init_lora_weights"):
        check_recipe(RecipeOfRun(keys | {"lora_model_dir": str(tmp_path)}))


def test_other_beginnings_of_a_lora_are_fine(recipe: Recipe) -> None:
    for init in ("gaussian", "eva", "orthogonal", "mica", True):
        check_recipe(RecipeOfRun(recipe({}, **LORA, peft_init_lora_weights=init)))
    with pytest.raises(UserError, match=r"peft\.loftq_config: it changes"):
        keys = recipe({}, **LORA, peft={"loftq_config": {"loftq_bits": 4}})
        check_recipe(RecipeOfRun(keys))
