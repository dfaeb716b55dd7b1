"""A LoRA's folder where a model's is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.batches import check_ids
from dwakd_plugin.models.teacher.loaded import load_teacher
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.checks import check_recipe
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


def changed(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_what_the_adapters_config_says_of_its_base(
    lora: Path, lab: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    changed(lora, revision="0123abc")
    assert TeacherConfig.model_validate(str(lora)).revision == "0123abc"
    given = TeacherConfig.model_validate({"base_model": str(lora), "revision": "main"})
    assert given.revision == "main"
    changed(lora, init_lora_weights="pissa_niter_4")
    with pytest.raises(UserError, match=r"dwakd\.teacher\.base_model: .* begun with init_lora_wei"):
        check_recipe(Recipe(recipe({"teacher": {"base_model": str(lora)}})))
    changed(lora, base_model_name_or_path="./none")
    with pytest.raises(UserError, match=r"a LoRA on \./none\) — its base model: no such folder"):
        check_files(Recipe(recipe({"teacher": {"base_model": str(lora)}})))
    changed(lora, base_model_name_or_path=str(lora))
    with pytest.raises(ValidationError, match="which is a LoRA itself; merge that one"):
        TeacherConfig.model_validate(str(lora))


@torch.no_grad()
def test_tokens_that_were_added_to_a_lora_are_its_models_too(lab: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab / "teacher")
    rows = model.config.vocab_size + 3
    model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    teacher = load_teacher(TeacherConfig.model_validate(str(tmp_path)), "cpu")
    assert teacher.head.weight.shape[0] == teacher.embeddings.weight.shape[0] == rows
    assert torch.equal(teacher.embeddings.weight, model.get_input_embeddings().weight)


def test_learnt_prompts_are_refused(lab: Path, tmp_path: Path) -> None:
    """Nothing reads them but peft's own forward: the teacher would be its base, unsaid."""
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(lab / "teacher"), prompts).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"learnt prompts \(PROMPT_TUNING\)"):
        load_teacher(TeacherConfig.model_validate(str(tmp_path)), "cpu")


def test_a_token_beyond_the_teachers_embeddings_is_named(lab: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lab / "teacher")
    rows = [torch.tensor([1, 2]), torch.tensor([3, len(tokenizer) - 1]), torch.tensor([])]
    check_ids(rows, len(tokenizer), "big", tokenizer)
    last = re.escape(repr(tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)))
    with pytest.raises(UserError, match=f"The teacher big has embeddings of .*{last}"):
        check_ids(rows, len(tokenizer) - 1, "big", tokenizer)


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
