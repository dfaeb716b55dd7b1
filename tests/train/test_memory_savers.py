"""Two steps with each of the settings by which a student fits a card: whole runs of a tiny pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import TERMS, losses, weights

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}
PROJECTORS = Path("dwakd") / "projectors.safetensors"

pytestmark = pytest.mark.slow


def two_steps(settings: dict[str, Any], train: Train) -> tuple[list[float], dict[str, Any]]:
    """The losses, and what the student's folder holds; every term was there, and all has moved."""
    log = train(settings | {"max_steps": 2, "save_steps": 1})
    assert set(log[0]) >= TERMS and all(map(math.isfinite, losses(log)))
    out = Path(settings["output_dir"])
    first, last = out / "checkpoint-1", out / "checkpoint-2"
    for before, after in (
        (load_file(first / PROJECTORS), load_file(last / PROJECTORS)),
        (weights(first), weights(last)),
    ):
        assert after and any(not torch.equal(before[name], after[name]) for name in before)
    return losses(log), weights(last)


def test_gradient_checkpointing_changes_nothing(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    plain, expected = two_steps(recipe({}), train)
    for reentrant in (False, True):
        again = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            "output_dir": str(tmp_path / str(reentrant)),
        }
        found, after = two_steps(recipe({}, **again), train)
        assert found == pytest.approx(plain, rel=1e-6)
        for name in expected:
            torch.testing.assert_close(after[name], expected[name], rtol=0, atol=1e-6, msg=name)


def test_rows_grouped_by_length(recipe: Recipe, train: Train) -> None:
    two_steps(recipe({}, group_by_length=True), train)


def test_a_lora_with_modules_that_train_whole(recipe: Recipe, train: Train) -> None:
    whole = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
    _, saved = two_steps(recipe({}, **LORA, **whole), train)
    assert {name.split(".")[-2] for name in saved if "lora_" not in name} >= {"embed_tokens"}


def test_a_student_in_4_bit(recipe: Recipe, train: Train) -> None:
    _, saved = two_steps(recipe({}, **LORA | {"adapter": "qlora"}, load_in_4bit=True), train)
    assert all("lora_" in name for name in saved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate wants a GPU for it")
def test_half_precision_with_a_scaled_loss(recipe: Recipe, train: Train) -> None:
    two_steps(recipe({}, fp16=True), train)
