"""vLLM itself, where it is installed: `make test-vllm`. It answers, and samples in runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.small_student import create_student
from dwakd_plugin.errors import UserError
from dwakd_plugin.models.sampling import Sample, Sampling, with_transformers
from dwakd_plugin.models.vllm import HeldByVLLM, is_installed, with_vllm
from dwakd_plugin.models.whole_weights import whole_weights
from dwakd_plugin.recipe.blocks import OwnAnswersConfig
from dwakd_plugin.train.own_sampling import FromCopy
from tests.conftest import ROWS
from tests.runs import weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="`make test-vllm` installs vLLM"),
]
GREEDY, LONGEST, NEW = Sampling(0.0), 128, 16
MEMORY = 0.05  # of the machine's


@pytest.fixture(scope="module")
def folder(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose heads are wide enough for vLLM's attention, with weights that say things."""
    folder = tmp_path_factory.mktemp("student")
    tokenizer = AutoTokenizer.from_pretrained(lab / "student")
    create_student(
        folder, tokenizer, hidden_size=128, layers=2, heads=2, intermediate_size=96, seed=1
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    stir(model, 0.1)
    model.generation_config.eos_token_id = tokenizer("e")["input_ids"]
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def stir(model: Any, scale: float) -> None:
    numbers = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            parameter += scale * torch.randn(parameter.shape, generator=numbers)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(row["instruction"])["input_ids"] for row in ROWS[:20]]


def said(generate: Any, prompts: list[list[int]], seed: int = 1) -> list[Sample]:
    found: list[Sample] = generate(prompts, [(seed, row) for row in range(len(prompts))], NEW)
    return found


def expected(model: Any, prompts: list[list[int]], stop: list[int]) -> list[Sample]:
    model.generation_config.repetition_penalty = None
    return said(with_transformers(model.eval(), GREEDY, stop, scored=True), prompts)


def same(found: list[Sample], wanted: list[Sample]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert [one.log_probability for one in found] == pytest.approx(
        [one.log_probability for one in wanted], abs=1e-3
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_it_answers_as_transformers_does(
    folder: Path, prompts: list[list[int]], tmp_path: Path, adapted: bool
) -> None:
    model, adapter = AutoModelForCausalLM.from_pretrained(folder), None
    if adapted:
        adapter = tmp_path / "adapter"
        tuned = get_peft_model(model, LoraConfig(r=24, target_modules="all-linear"))
        stir(tuned, 0.1)
        tuned.save_pretrained(adapter)
        model = tuned.merge_and_unload()
    first = said(with_transformers(model.eval(), GREEDY, [0]), prompts)
    # Tokens that do come up: the model's own end of sequence isn't among them.
    stop = sorted({one.tokens[5] for one in first[:4]})
    generate = with_vllm(
        str(folder), str(folder), adapter, GREEDY, stop, LONGEST,
        load_in_8bit=False, scored=True, dtype="float32", gpu_memory_utilization=MEMORY,
    )  # fmt: skip
    found = said(generate, prompts)
    same(found, expected(model, prompts, stop))
    assert any(len(one.tokens) < NEW for one in found)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_copy_follows_the_student_when_it_is_handed_its_weights(
    folder: Path, prompts: list[list[int]], adapted: bool
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(3)
    numbers = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    own = OwnAnswersConfig(temperature=0.0, start_after=0, refresh_every=2, vllm_memory=MEMORY)
    copy = FromCopy(own, model, torch.float32, LONGEST, 1)
    assert (random.getstate(), str(np.random.get_state())) == numbers[:2]
    assert torch.equal(torch.get_rng_state(), numbers[2])

    def at(step: int) -> list[list[int]]:
        with copy.generator(model, [0], step) as generate:
            return [one.tokens for one in said(generate, prompts)]

    def wanted() -> list[list[int]]:
        return [one.tokens for one in said(with_transformers(model.eval(), GREEDY, [0]), prompts)]

    first = wanted()
    assert at(4) == first
    stir(model, 0.1)
    second = wanted()
    assert second != first
    assert at(5) == first
    assert at(6) == second
    stir(model, 0.1)
    copy.saved()
    assert at(7) == wanted() != second


def test_what_it_draws_hangs_on_seed_and_row_alone(folder: Path, prompts: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    held = HeldByVLLM(model, torch.float32, LONGEST, MEMORY, 1)
    held.hand_over(whole_weights(model, untied=held.unties))
    generate = held.generator(Sampling(1.0), [0])
    whole = said(generate, prompts)
    assert said(generate, prompts) == whole
    keys = [(1, row) for row in range(len(prompts))][::-1]
    assert generate(prompts[::-1], keys, NEW)[::-1] == whole
    assert said(generate, prompts, seed=2) != whole


def test_weights_that_went_astray_are_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    own = OwnAnswersConfig(vllm_memory=MEMORY)
    monkeypatch.setattr(HeldByVLLM, "hand_over", lambda *_: None)
    with pytest.raises(UserError, match="other probabilities than the student"):
        FromCopy(own, model, torch.float32, LONGEST, 1)
    with pytest.raises(UserError, match="vLLM cannot hold LlamaForCausalLM: "):
        HeldByVLLM(model, torch.float32, 10**6, MEMORY, 1)


# Runs, each in a process of its own: when one ends, so does the group that vLLM has made there.


def trained(keys: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """The log of a run, or what it said where it broke."""
    out = Path(keys["output_dir"])
    out.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [sys.executable, *(command if processes > 1 else []), "-m", "axolotl.cli.train", str(file)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    log: list[dict[str, Any]] = json.loads(
        (out / f"checkpoint-{keys['max_steps']}" / "trainer_state.json").read_text()
    )["log_history"]
    return [line for line in log if "loss" in line]


LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True} | {
    f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")
}


@pytest.mark.parametrize(("settings", "processes"), [({}, 1), (LORA, 1), ({}, 2)])
def test_a_run_samples_with_it_and_resumes_exactly(
    recipe: Callable[..., dict[str, Any]],
    folder: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    processes: int,
) -> None:
    own = {"share": 0.75, "max_new_tokens": 4, "start_after": 1, "refresh_every": 4}
    own |= {"backend": "vllm", "vllm_memory": MEMORY}
    keys = recipe({"own_answers": own}, base_model=str(folder), max_steps=6, save_steps=3)
    keys |= settings
    log = trained(keys, processes)
    assert not [name for name in log[0] if name.startswith("own_")]
    assert all(1 <= line["own_length"] <= 4 for line in log[1:])
    assert any("own_divergence" in line for line in log)
    # That vLLM has started changes nothing of a step without its answers.
    by_transformers = own | {"backend": "transformers", "refresh_every": 1}
    keys_there = recipe({"own_answers": by_transformers}, base_model=str(folder), max_steps=1)
    (other,) = trained(keys_there | settings | {"output_dir": str(tmp_path / "other")}, processes)
    assert other["loss"] == log[0]["loss"]

    whole, resumed = Path(keys["output_dir"]), tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    trained(keys | {"output_dir": str(resumed), "auto_resume_from_checkpoints": True}, processes)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
