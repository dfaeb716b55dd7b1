"""The teacher as it is loaded: quantised, with an adapter, offloaded, with which attention."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.batches import teacher_batch
from dwakd_plugin.models.out_of_memory import explain_out_of_memory
from dwakd_plugin.models.teacher.attention import HUB_KERNEL, AttentionFacts, choose_attention
from dwakd_plugin.models.teacher.loaded import Teacher, load_teacher
from dwakd_plugin.models.teacher.quantisation import check_device, check_head, check_packages
from dwakd_plugin.recipe.schema import DWAKDConfig, TeacherConfig
from dwakd_plugin.train.preflight import check_teacher_recipe


def config(folder: Path, **keys: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"base_model": str(folder), **keys})


def batch() -> dict[str, torch.Tensor]:
    generator = torch.manual_seed(4)
    ids = [torch.randint(0, 300, (length,), generator=generator) for length in (9, 30, 21)]
    labels = [torch.cat([torch.full((5,), -100), row[5:]]) for row in ids]
    return teacher_batch(ids, labels)


def error_of(teacher: Teacher, exact: Teacher) -> float:
    """Relative error of the states at response positions."""
    index = batch()["teacher_index"]
    given, expected = (each.hidden(batch()).flatten(0, 1)[index] for each in (teacher, exact))
    return float((given - expected).norm() / expected.norm())


# Quantised ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "words", "layer", "largest"),
    [
        ("load_in_8bit", "8 bit", "Linear8bitLt", 0.1),
        ("load_in_4bit", "4 bit (nf4)", "Linear4bit", 0.6),
    ],
)
def test_a_quantised_teacher_keeps_head_and_embeddings(
    lab: Path, key: str, words: str, layer: str, largest: float
) -> None:
    exact = load_teacher(config(lab / "teacher"), "cpu")
    teacher = load_teacher(config(lab / "teacher", **{key: True}), "cpu")
    assert teacher.precision.startswith(words)
    assert "head and embeddings in float32" in teacher.precision
    kinds = {type(module).__name__ for module in teacher.model.model.modules()}  # type: ignore[union-attr]
    assert layer in kinds and "Linear" not in kinds
    assert torch.equal(teacher.head.weight, exact.head.weight)
    assert torch.equal(teacher.embeddings.weight, exact.embeddings.weight)
    assert teacher.parameters == exact.parameters
    # Coarse, as the tiny teacher's random weights are larger than a trained one's.
    assert 1e-4 < error_of(teacher, exact) < largest


def test_a_checkpoint_that_is_quantised_loads_as_it_is(lab: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    model = AutoModelForCausalLM.from_pretrained(
        lab / "teacher",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
    )
    model.save_pretrained(folder)
    teacher = load_teacher(config(folder, load_in_4bit=True), "cpu")
    assert teacher.precision.startswith("bitsandbytes, 8 bit, float32 (the checkpoint's own")
    assert "load_in_4bit left out" in teacher.precision
    in_8bit = load_teacher(config(lab / "teacher", load_in_8bit=True), "cpu")
    assert error_of(teacher, in_8bit) < 1e-5


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"gptq, 4 bit\).*pip install gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4}, r"awq, 4 bit\).*pip install gptqmodel"),
        ({"load_in_8bit": True}, r"bitsandbytes, 8 bit\).*pip install bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_before_a_model_is_loaded(
    lab: Path, tmp_path: Path, own: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(lab / "teacher", folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": own}))
    monkeypatch.setattr(
        "dwakd_plugin.models.teacher.quantisation._is_installed", lambda module: False
    )
    with pytest.raises(UserError, match=message):
        check_teacher_recipe(DWAKDConfig(teacher=config(folder)))
    with pytest.raises(UserError, match=message):
        load_teacher(config(folder), "cpu")


def test_bitsandbytes_and_what_it_cannot() -> None:
    in_8bit = TeacherConfig(base_model="big", load_in_8bit=True)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"load_in_8bit needs.*pip install bitsandbytes"):
        check_packages(in_8bit, None, lambda module: False)
    check_device(in_8bit, "cuda", (8, 0), {"cuda", "cpu"})
    with pytest.raises(UserError, match=r"cannot quantise on `tpu` \(it can on cpu, cuda\)"):
        check_device(in_8bit, "tpu", None, {"cuda", "cpu"})
    with pytest.raises(UserError, match=r"needs compute capability 7.5, and the GPU has 7.0"):
        check_device(in_8bit, "cuda", (7, 0), {"cuda"})
    spread = in_8bit.model_copy(update={"device": "offload"})
    with pytest.raises(UserError, match="do not go together"):
        check_device(spread, "cuda", (8, 0), {"cuda"})
    with pytest.raises(UserError, match="output head of the teacher big is quantised"):
        check_head("big", torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, 2))


@pytest.mark.parametrize("key", [None, "load_in_8bit"])
def test_an_adapter_is_merged_or_attached(lab: Path, tmp_path: Path, key: str | None) -> None:
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(lab / "teacher")
    lora = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "adapter")
    keys = {"adapter": str(tmp_path / "adapter")} | ({key: True} if key else {})
    teacher = load_teacher(config(lab / "teacher", **keys), "cpu")
    assert isinstance(teacher.model, PeftModel) == (key is not None)
    assert ("attached" if key else "merged") in teacher.precision
    exact = replace(load_teacher(config(lab / "teacher"), "cpu"), model=lora.eval())
    plain = load_teacher(config(lab / "teacher"), "cpu")
    assert error_of(plain, exact) > 0.2
    assert error_of(teacher, exact) < (0.1 if key else 1e-5)


# Elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [{"cpu": "160KB"}, {"cpu": "1GiB"}, "offload", "cpu"])
def test_an_offloaded_teacher_has_the_same_states(lab: Path, device: Any) -> None:
    exact = load_teacher(config(lab / "teacher"), "cpu")
    teacher = load_teacher(config(lab / "teacher", device=device), "cpu")
    on_disk = [p for p in teacher.model.parameters() if p.device.type == "meta"]  # type: ignore[union-attr]
    assert bool(on_disk) == (device == {"cpu": "160KB"})
    assert ("disk:" in teacher.precision) == bool(on_disk)
    assert torch.equal(teacher.hidden(batch()), exact.hidden(batch()))
    assert torch.equal(teacher.head.weight, exact.head.weight)
    assert torch.equal(teacher.embeddings.weight, exact.embeddings.weight)


def test_a_gpu_that_is_not_there_is_named(lab: Path) -> None:
    with pytest.raises(UserError, match="cuda:7, and this machine has no GPUs"):
        check_teacher_recipe(DWAKDConfig(teacher=config(lab / "teacher", device="cuda:7")))


# Attention -----------------------------------------------------------------------------------

HOPPER = AttentionFacts(
    device="cuda",
    capability=(9, 0),
    dtype="bfloat16",
    architecture="LlamaForCausalLM",
    head_size=128,
    flash=True,
    sdpa=True,
    installed=frozenset({"flash_attention_2", "flash_attention_3"}),
)
KERNELS = frozenset({"kernels"})


@pytest.mark.parametrize(
    ("facts", "chosen", "why"),
    [
        (HOPPER, "flash_attention_3", "installed"),
        (replace(HOPPER, capability=(8, 0)), "flash_attention_2", "installed"),
        (replace(HOPPER, installed=KERNELS), HUB_KERNEL, "installed"),
        (replace(HOPPER, installed=KERNELS, hub_problem="no network"), "sdpa", "no network"),
        (replace(HOPPER, installed=frozenset()), "sdpa", "kernels is not installed"),
        (replace(HOPPER, capability=(7, 5)), "sdpa", "needs compute capability 8.0"),
        (replace(HOPPER, device="CPU", capability=None), "sdpa", "on the CPU"),
        (replace(HOPPER, dtype="float32"), "sdpa", "held in float32"),
        (replace(HOPPER, flash=False), "sdpa", "LlamaForCausalLM has no flash attention"),
        (replace(HOPPER, flash=False, sdpa=False), "eager", "no flash attention"),
        (replace(HOPPER, soft_capped=True), "flash_attention_3", "installed"),
        (replace(HOPPER, soft_capped=True, dtype="float32"), "eager", "leaves out its soft-cap"),
        (replace(HOPPER, head_size=512), "sdpa", "the teacher's have 512"),
        (replace(HOPPER, compatible=("owner/mla",), installed=KERNELS), "owner/mla", "installed"),
    ],
)
def test_auto_takes_the_fastest_that_works(facts: AttentionFacts, chosen: str, why: str) -> None:
    assert choose_attention("auto", facts)[0] == chosen
    assert why in choose_attention("auto", facts)[1]


@pytest.mark.parametrize(
    ("asked", "facts", "message"),
    [
        ("flash_attention_2", replace(HOPPER, device="CPU"), "on the CPU. Write sdpa"),
        (
            "flash_attention_3",
            replace(HOPPER, capability=(8, 6)),
            "9.0, and the GPU has 8.6. Write",
        ),
        ("flash_attention_2", replace(HOPPER, dtype="float32"), "dwakd.teacher.dtype: bfloat16"),
        (
            "flash_attention_2",
            replace(HOPPER, installed=frozenset()),
            "Run `pip install flash-attn`",
        ),
        (HUB_KERNEL, replace(HOPPER, installed=frozenset()), "Run `pip install kernels`"),
        ("flash_atention_2", HOPPER, "does not know it. Write flash_attention_2"),
        ("sdpa", replace(HOPPER, sdpa=False), "has no sdpa attention. Write eager"),
    ],
)
def test_a_choice_that_cannot_work_is_refused(
    asked: str, facts: AttentionFacts, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        choose_attention(asked, facts)


def test_a_choice_is_kept_where_it_works(lab: Path) -> None:
    assert choose_attention("flash_attention_2", HOPPER)[0] == "flash_attention_2"
    # transformers takes the hub's kernel for it.
    kernels = replace(HOPPER, installed=KERNELS)
    assert choose_attention("flash_attention_2", kernels)[0] == "flash_attention_2"
    assert load_teacher(config(lab / "teacher"), "cpu").attention == (
        "sdpa (no flash attention: it needs an NVIDIA GPU, and the teacher is on the CPU)"
    )
    eager = load_teacher(config(lab / "teacher", attn_implementation="eager"), "cpu")
    assert eager.model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="flash_attention_2 cannot be used"):
        check_teacher_recipe(
            DWAKDConfig(teacher=config(lab / "teacher", attn_implementation="flash_attention_2"))
        )


# Memory --------------------------------------------------------------------------------------


def test_out_of_memory_says_where_and_what_to_do(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(config(lab / "teacher"), "cpu")

    def too_much(*_: Any, **__: Any) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("dwakd_plugin.models.teacher.loaded.hidden_states", too_much)
    with pytest.raises(UserError, match="Out of memory in the teacher's forward") as raised:
        teacher.hidden(batch())
    assert all(f"  {number}. " in str(raised.value) for number in (1, 2, 3))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_much)
    with pytest.raises(UserError, match=r"loading the teacher[\s\S]*load_in_4bit"):
        load_teacher(config(lab / "teacher"), "cpu")

    with pytest.raises(UserError, match="student's step: CUDA out of memory"):  # noqa: SIM117
        with explain_out_of_memory("the student's step"):
            raise torch.OutOfMemoryError("CUDA out of memory\nwith details")
    with pytest.raises(RuntimeError, match="shapes"):  # noqa: SIM117
        with explain_out_of_memory("the student's step"):
            raise RuntimeError("shapes do not match")


def test_an_8_bit_teacher_without_outliers_is_causal(lab: Path) -> None:
    """At bitsandbytes' own threshold a token's states depend on what comes after it."""
    ids = torch.arange(3, 27)[None]
    settings = {"load_in_8bit": True, "int8_threshold": 0.0}
    teacher = load_teacher(config(lab / "teacher", **settings), "cpu")
    assert "threshold 0" in teacher.precision
    assert teacher.model is not None
    layers = [m for m in teacher.model.modules() if type(m).__name__ == "Linear8bitLt"]
    assert layers
    assert {layer.state.threshold for layer in layers} == {0.0}
    whole, start = (
        teacher.model(input_ids=given, output_hidden_states=True).hidden_states[-1]
        for given in (ids, ids[:, :-6])
    )
    torch.testing.assert_close(whole[:, :-6], start, rtol=0, atol=1e-5)


def test_an_8_bit_teacher_beyond_float16_is_refused(lab: Path, tmp_path: Path) -> None:
    """bitsandbytes computes 8-bit layers in float16, whatever the teacher's dtype is."""
    folder = tmp_path / "large"
    shutil.copytree(lab / "teacher", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e7
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for fitting in ({}, {"load_in_4bit": True}):
        assert load_teacher(config(folder, **fitting), "cpu").hidden(batch()).isfinite().all()
    with pytest.raises(UserError, match=r"8-bit teacher .* not finite.*float16"):
        load_teacher(config(folder, load_in_8bit=True), "cpu")


def test_a_threshold_is_for_8_bit_alone(lab: Path) -> None:
    with pytest.raises(ValueError, match=r"int8_threshold: it is for .*load_in_8bit"):
        config(lab / "teacher", int8_threshold=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_students_autocast_is_not_the_teachers(lab: Path, dtype: torch.dtype) -> None:
    """Live states are then those that a cache holds, bit for bit."""
    teacher = load_teacher(config(lab / "teacher"), "cpu")
    plain = teacher.hidden(batch())
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(teacher.hidden(batch()), plain)
