"""Opening a run: what training would start from, with nothing of it in the output folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.train.open_run import _without_a_run, open_run

Recipe = Callable[..., dict[str, Any]]
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}


def test_an_open_run_leaves_no_trace(
    recipe: Recipe, lab: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = recipe({"projectors": {"warmup_steps": 500}}, val_set_size=0.2)
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)  # another run doesn't hinder
    capfd.readouterr()
    with open_run(ReadRecipe(settings)) as run:
        assert len(run.trainer.train_dataset) == 32
        assert len(run.trainer.eval_dataset) == 8
        assert run.distillation.teacher.hidden_size == 40
        batch = run.trainer.data_collator([run.trainer.train_dataset[0]])
        assert run.distillation.teacher.states(batch).hidden.shape[-1] == 40
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["checkpoint-2"]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "adapter", [pytest.param({}, marks=pytest.mark.slow), LORA], ids=["full", "lora"]
)
def test_a_checkpoint_takes_the_recipes_place(
    adapter: dict[str, Any], recipe: Recipe, train: Callable[..., Any], tmp_path: Path
) -> None:
    settings = recipe({}, max_steps=2, **adapter)
    train(settings)
    out = Path(settings["output_dir"])
    with open_run(ReadRecipe(settings), checkpoint=out / "checkpoint-2") as run:
        projectors = load_file(out / "checkpoint-2" / "dwakd" / "projectors.safetensors")
        for name, tensor in run.distillation.projectors.state_dict().items():
            assert torch.equal(tensor.cpu(), projectors[name])
        saved = load_file(next((out / "checkpoint-2").glob("*model.safetensors")))
        name = next(name for name in saved if "q_proj" in name)
        state = run.trainer.model.state_dict()
        found = state.get(name, state.get(name.replace(".weight", ".default.weight")))
        assert torch.equal(found, saved[name])


def test_mistakes_are_messages(recipe: Recipe, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="holds neither a student"),
        open_run(ReadRecipe(recipe({})), checkpoint=tmp_path),
    ):
        pass
    with (
        pytest.raises(UserError, match="learning_rate"),
        open_run(ReadRecipe(recipe({}, learning_rate="x"))),
    ):
        pass
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "no instruction"}\n')
    broken = recipe({}, datasets=[{"path": str(rows), "type": "alpaca"}])
    with pytest.raises(UserError, match="doesn't fit its type"), open_run(ReadRecipe(broken)):
        pass


def test_a_recipe_that_names_no_variant_is_opened_as_it_trains(recipe: Recipe) -> None:
    settings = recipe({})
    del settings["dwakd"]["variant"]
    assert ReadRecipe(settings).config.variant == "mapped"
    assert _without_a_run(ReadRecipe(settings), "folder").config.variant == "mapped"
    settings["dwakd"]["projectors"] = {"warmup_steps": 7}  # which only the paper's form has
    opened = _without_a_run(ReadRecipe(settings), "folder").config
    assert opened.variant == "paper" and opened.projectors.warmup_steps == 0
