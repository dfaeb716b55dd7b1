"""A LoRA's folder where a model's is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.teacher.loaded import load_teacher
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.places import check_files
from dwakd_plugin.recipe.schema import TeacherConfig


@pytest.fixture
def lora(lab: Path, tmp_path: Path) -> Path:
    """What a run with `adapter: lora` leaves: adapter, tokenizer, and the base model's config."""
    torch.manual_seed(5)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(lab / "teacher"),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    model.get_base_model().config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(lab / "teacher").save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_a_teacher_that_is_a_lora(lora: Path, lab: Path) -> None:
    config = TeacherConfig.model_validate(str(lora))
    assert (config.base_model, config.adapter) == (str(lab / "teacher"), str(lora))
    assert config.tokenizer == str(lora)
    ids = torch.arange(4, 20)[None]
    given = load_teacher(config, "cpu").model(input_ids=ids).logits
    plain = AutoModelForCausalLM.from_pretrained(lab / "teacher")
    assert not torch.allclose(given, plain(input_ids=ids).logits, atol=0.1)
    expected = PeftModel.from_pretrained(plain, lora).eval()(input_ids=ids).logits
    assert torch.allclose(given, expected, rtol=1e-4, atol=1e-4)


def test_a_whole_model_with_an_adapters_config_is_a_model(lora: Path, lab: Path) -> None:
    (lora / "model.safetensors").write_bytes((lab / "teacher" / "model.safetensors").read_bytes())
    assert TeacherConfig.model_validate(str(lora)).adapter is None


def test_a_student_that_is_a_lora_is_refused(
    lora: Path, lab: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(UserError) as problem:
        check_files(Recipe(recipe({}, base_model=str(lora))))
    assert f"`base_model: {lab / 'teacher'}` and `lora_model_dir: {lora}`" in str(problem.value)
    settings = json.loads((lora / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(lab / "teacher")
