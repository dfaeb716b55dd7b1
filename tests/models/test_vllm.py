"""vLLM as it is asked, by a stand-in of its shape; and the weights that it is handed."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.models.sampling import Sampling, with_transformers
from dwakd_plugin.models.vllm import with_vllm
from dwakd_plugin.models.whole_weights import has_tied_head, whole_weights, why_not_whole
from dwakd_plugin.recipe.blocks import OwnAnswersConfig
from dwakd_plugin.train import own_sampling
from dwakd_plugin.train.distillation import attach
from dwakd_plugin.train.own_sampling import FromCopy, backend_of
from tests.runs import weights
from tests.vllm_stand_in import LLM, install

PROMPTS = [[5, 6, 7], [8], [9, 10]]
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    return install(monkeypatch)


def llama(*, tied: bool = False) -> Any:
    torch.manual_seed(2)
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied, max_position_embeddings=64)
    return LlamaForCausalLM(config).eval()


def with_lora(model: Any, **settings: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear"} | settings))
    stir(adapted)
    return adapted.eval()


@torch.no_grad()
def stir(model: Any) -> None:
    """Another model: all that trains in it moves."""
    numbers = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * torch.randn(parameter.shape, generator=numbers)


def own(**settings: Any) -> OwnAnswersConfig:
    return OwnAnswersConfig(**{"start_after": 0, "temperature": 0.0} | settings)


# To answer ------------------------------------------------------------------------------------


def test_it_is_asked_in_its_own_words(
    llm: type[LLM], lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LoraConfig(r=24).save_pretrained(tmp_path)
    generate = with_vllm(
        "teacher", "its-tokenizer", tmp_path, Sampling(0.7, 0.9, 4), [2, 3], 99, scored=True,
        load_in_8bit=False, load_in_4bit=True, dtype="auto", revision=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(lab / "student").eval()
    monkeypatch.setattr(llm, "model", model, raising=False)
    samples = generate([[1, 1], [1], [1]], [(1, 0), (1, 1), (2, 0)], 4)
    assert llm.seen["llm"] == {
        "model": "teacher", "tokenizer": "its-tokenizer", "quantization": "bitsandbytes",
        "max_model_len": 99, "enable_lora": True, "max_lora_rank": 32,
        "dtype": "auto", "revision": None,
    }  # fmt: skip
    assert llm.seen["lora"] == ("adapter", 1, str(tmp_path))
    assert llm.seen["prompts"][0] == {"prompt_token_ids": [1, 1]}
    first, second, third = llm.seen["parameters"]
    assert (first.temperature, first.top_p, first.max_tokens) == (0.7, 0.9, 4)
    assert first.stop_token_ids == [2, 3] and first.logprobs == 1
    assert len({first.seed, second.seed, third.seed}) == 3
    assert all(1 <= len(sample.tokens) <= 4 for sample in samples)
    assert all(sample.log_probability < 0 for sample in samples)


def test_what_it_cannot_hold_is_refused(llm: type[LLM], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="8 bit"):
        with_vllm("teacher", "t", None, Sampling(), [2], 9, load_in_8bit=True)
    LoraConfig(r=8, rank_pattern={"q_proj": 513}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"rank 512 at most, and .* has 513"):
        with_vllm("teacher", "t", tmp_path, Sampling(), [2], 9, load_in_8bit=False)
    IA3Config(target_modules=["k_proj"], feedforward_modules=[]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"takes a LoRA, and .* is IA3"):
        with_vllm("teacher", "t", tmp_path, Sampling(), [2], 9, load_in_8bit=False)


# The student's copy ---------------------------------------------------------------------------


def taken(copy: FromCopy, student: Any, step: int) -> list[list[int]]:
    with copy.generator(student, [0], step) as generate:
        return [one.tokens for one in generate(PROMPTS, [(1, row) for row in range(3)], 10)]


def wanted(student: Any) -> list[list[int]]:
    generate = with_transformers(student.eval(), Sampling(0.0), [0])
    return [one.tokens for one in generate(PROMPTS, [(1, row) for row in range(3)], 10)]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_is_as_old_as_the_recipe_lets_it_be(llm: type[LLM], lora: bool, tied: bool) -> None:
    settings = own(start_after=10, refresh_every=3)
    student = with_lora(llama(tied=tied)) if lora else llama(tied=tied)

    def run(student: Any, steps: range) -> tuple[list[Any], list[Any]]:
        """What is sampled in each step, and what transformers would have."""
        copy, seen, fresh = FromCopy(settings, student, torch.float32, 32, 1), [], []
        for step in steps:
            seen.append(taken(copy, student, step))
            fresh.append(wanted(student))
            stir(student)
            if step == 14:
                copy.saved()
                saved.append(deepcopy(student))
        return seen, fresh

    saved: list[Any] = []
    seen, fresh = run(student, range(10, 18))
    assert len({str(each) for each in fresh}) == 8
    #                             10, 11, 12, 13, 14; saved: 15, 16, 17
    assert seen == [fresh[at] for at in (0, 0, 0, 3, 3, 5, 6, 6)]
    (resumed,) = saved
    assert run(resumed, range(15, 18)) == (seen[5:], fresh[5:])


def test_every_step_by_default(llm: type[LLM]) -> None:
    student = llama()
    copy = FromCopy(own(), student, torch.float32, 32, 1)
    for step in range(3):
        assert taken(copy, student, step) == wanted(student)
        stir(student)
    assert len(llm.seen["handed"]) == 4  # the start's, which was looked at, among them


def test_the_copy_is_of_the_student_as_it_is(llm: type[LLM]) -> None:
    student = llama(tied=True)
    student.resize_token_embeddings(47)
    copy = FromCopy(own(vllm_memory=0.2), student, torch.float32, 32, 2)
    asked = llm.seen["llm"]
    assert llm.seen["config"].vocab_size == 47
    assert (asked["max_model_len"], asked["gpu_memory_utilization"]) == (32, 0.2)
    assert (asked["dtype"], asked["distributed_executor_backend"]) == (
        "float32",
        "external_launcher",
    )
    # On a CPU a tied head is one of its own, which is handed over beside the embeddings.
    assert not llm.seen["config"].tie_word_embeddings and student.config.tie_word_embeddings
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(llm.seen["handed"][0])
    assert taken(copy, student, 0) == wanted(student)


def test_a_head_that_trains_apart_is_handed_over(llm: type[LLM]) -> None:
    student = with_lora(llama(), modules_to_save=["lm_head"])
    copy = FromCopy(own(), student, torch.float32, 32, 1)
    assert taken(copy, student, 0) == wanted(student)


def test_its_start_moves_nobodys_random_numbers(llm: type[LLM]) -> None:
    student = llama()
    torch.manual_seed(3)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    FromCopy(own(), student, torch.float32, 32, 1)
    assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


def test_a_copy_that_is_another_model_is_refused(
    llm: type[LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"cannot hold LlamaForCausalLM: max_model_len .*vllm_memory"
    ):
        FromCopy(own(), llama(), torch.float32, 65, 1)
    monkeypatch.setattr(llm, "collective_rpc", lambda *_, **__: [None])
    with pytest.raises(UserError, match=r"other probabilities .*backend: transformers"):
        FromCopy(own(), llama(), torch.float32, 32, 1)


# What samples -----------------------------------------------------------------------------------


def test_what_samples_and_why_not_vllm(llm: type[LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    student, dora = llama(), with_lora(llama(), use_dora=True)
    assert backend_of(own(), student) == "transformers"  # on a CPU
    assert backend_of(own(backend="vllm"), student) == "vllm"
    assert backend_of(own(backend="transformers"), student) == "transformers"
    with pytest.raises(UserError, match=r"refresh_every is 4.*on a CPU. Set it to 1, or"):
        backend_of(own(refresh_every=4), student)
    with pytest.raises(UserError, match=r"vllm cannot hold .* no plain LoRA. Remove the key"):
        backend_of(own(backend="vllm"), dora)
    monkeypatch.setattr(LlamaForCausalLM, "device", torch.device("cuda", 0))
    assert backend_of(own(), student) == "vllm"
    assert backend_of(own(), dora) == "transformers"
    monkeypatch.setattr(own_sampling, "is_installed", lambda: False)
    assert backend_of(own(), student) == "transformers"
    with pytest.raises(UserError, match=r"as vLLM isn't installed. Remove the key"):
        backend_of(own(backend="vllm"), student)


# The weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_checkpoint(tied: bool, tmp_path: Path) -> None:
    student = llama(tied=tied)
    attach(Projectors(16, 8), student)
    found = dict(whole_weights(student))
    student.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    both = dict(whole_weights(student, untied=True))
    assert both.keys() == expected.keys() | {"lm_head.weight"}
    assert both["lm_head.weight"].data_ptr() == student.lm_head.weight.data_ptr()


def test_experts_are_cut_as_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(1)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    student = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts))
    student.save_pretrained(tmp_path)
    expected, found = load_file(tmp_path / "model.safetensors"), dict(whole_weights(student))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "lora_alpha": 32},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
)
def test_a_lora_is_in_them_as_peft_merges_it(settings: dict[str, Any]) -> None:
    student = with_lora(llama(), **settings)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = {name: tensor.clone() for name, tensor in whole_weights(student)}
    after = student.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    expected = dict(student.merge_and_unload().named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tied_head_with_a_lora_has_weights_of_its_own(llm: type[LLM]) -> None:
    assert has_tied_head(llama(tied=True)) and not has_tied_head(llama())
    student = with_lora(llama(tied=True), target_modules=["q_proj", "lm_head"])
    assert not has_tied_head(student.get_base_model())
    apart = llama()
    apart.load_state_dict(dict(whole_weights(student)))
    ids = torch.arange(9)[None]
    torch.testing.assert_close(apart(ids).logits, student(ids).logits)
    copy = FromCopy(own(), student, torch.float32, 32, 1)
    stir(student)
    assert taken(copy, student, 0) == wanted(student)


def test_a_layer_that_is_stored_across_merges_too() -> None:
    torch.manual_seed(4)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    student = with_lora(model, target_modules=["c_attn"], fan_in_fan_out=True)
    found = {name: tensor.clone() for name, tensor in whole_weights(student)}
    expected = dict(student.merge_and_unload().named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_has_no_whole_weights_is_named() -> None:
    assert why_not_whole(llama()) is None
    assert why_not_whole(with_lora(llama(), modules_to_save=["lm_head"])) is None
    for settings, message in (
        ({"use_dora": True}, r"q_proj has an adapter that is no plain LoRA"),
        ({"trainable_token_indices": [1, 2]}, r"embed_tokens trains some of its rows alone"),
    ):
        found = why_not_whole(with_lora(llama(), **settings))
        assert found is not None and re.search(message, found)
    quantised = llama()
    quantised.is_quantized = True
    assert why_not_whole(quantised) == "its weights are quantised"


# A run ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_resumes_exactly_from_between_two_hand_overs(
    llm: type[LLM],
    recipe: Callable[..., dict[str, Any]],
    train: Callable[[dict[str, Any]], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    settings = {"share": 0.75, "max_new_tokens": 2, "start_after": 1, "refresh_every": 4}
    keys = recipe({"own_answers": settings | {"backend": "vllm"}}, max_steps=6, save_steps=3)
    log = [line for line in train(keys) if "loss" in line]
    assert all(1 <= line["own_length"] <= 2 for line in log[1:])
    assert len(llm.seen["handed"]) == 4  # at the start, in steps 1 and 5, and after the checkpoint
    whole, resumed = Path(keys["output_dir"]), tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    train(keys | {"output_dir": str(resumed), "auto_resume_from_checkpoints": True})
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
