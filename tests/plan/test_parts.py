"""What a plan counts, part by part, against real models, real memory and real steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from benchmarks import plan_allocated
from benchmarks.plan import LIMIT
from dwakd_plugin.loss.terms.warp import normalised_soft_dtw
from dwakd_plugin.plan.loss_trace import LossSizes, trace_heads
from dwakd_plugin.plan.model_sizes import (
    Layer,
    Model,
    lora_settings,
    measure_model,
    optimizer_bytes,
    quantisation_scratch,
    weight_bytes,
)
from dwakd_plugin.plan.soft_dtw import matrices, shapes, soft_dtw_bytes
from dwakd_plugin.plan.trace import Recorder, trace_body
from dwakd_plugin.recipe.schema import VARIANTS, LossConfig

Recipe = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_weights_are_counted_exactly(lab: Path, side: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab / side)
    counted = measure_model(str(lab / side), model.config)
    assert counted.parameters == model.num_parameters()
    assert counted.trained == counted.parameters


def test_lora_is_counted_exactly(lab: Path, recipe: Recipe) -> None:
    from peft import LoraConfig, get_peft_model

    settings = recipe(None, adapter="lora", lora_r=4, lora_target_linear=True)
    lora = lora_settings(settings)
    counted = measure_model("", AutoConfig.from_pretrained(lab / "student"), lora)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(lab / "student"),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    assert counted.trained == model.get_nb_trainable_parameters()[0]
    assert counted.parameters == AutoModelForCausalLM.from_config(model.config).num_parameters()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            vocab_size=500,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        GPT2Config(vocab_size=500, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1),
    ],
    ids=["llama", "gpt2"],
)
def test_quantised_weights_take_what_bitsandbytes_makes_of_them(
    tmp_path: Path, config: Any, bits: int
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    quantisation = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    real = 0
    for parameter in model.parameters():
        real += parameter.numel() * parameter.element_size()
        if isinstance(parameter, bitsandbytes.nn.Int8Params):
            assert parameter.SCB is not None
            real += parameter.SCB.numel() * 4
        elif isinstance(parameter, bitsandbytes.nn.Params4bit):
            state = parameter.quant_state
            for tensor in (state.absmax, state.code, state.state2.absmax, state.state2.code):
                real += tensor.numel() * tensor.element_size()
            real += 4  # the offset
    counted = measure_model(str(tmp_path), config)
    assert weight_bytes(counted, lambda _: torch.bfloat16, bits) == real


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adamw_torch", 2 * 4),
        ("adamw_torch_fused", 2 * 4),
        ("adamw_bnb_8bit", 2 * (1 + 4 / 256)),
        ("paged_adamw_8bit", 2 * (1 + 4 / 256)),
        ("lion_8bit", 1 + 4 / 256),
        ("lion_pytorch", 4),
        ("sgd", 0),
        ("adafactor", 4 * 2 / 100),
    ],
)
def test_optimizer_state(optimizer: str, expected: float) -> None:
    size, assumed = optimizer_bytes(optimizer, Layer("w", 100, 100), 4)
    assert size / 100**2 == pytest.approx(expected)
    assert assumed is None
    assert optimizer_bytes("new", Layer("w", 9, 9), 4)[1] is not None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_trace_holds_what_a_real_forward_pass_keeps(checkpointing: bool, batch: int) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    trace = trace_body(
        AutoModelForCausalLM.from_config, config, 48, training=True, checkpointing=checkpointing
    )
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 64, (batch, 48))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # the trace is of a batch with some padding
        output = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    if checkpointing:  # what is kept are the layers' inputs, which aren't saved tensors
        real = 5 * output.last_hidden_state.untyped_storage().nbytes()
        assert real <= trace.at(batch)[0] <= 2.2 * real
    else:
        assert trace.at(batch)[0] == pytest.approx(sum(kept.values()), rel=0.05)


def test_quantised_layers_are_unpacked_one_at_a_time() -> None:
    model = Model("", (Layer("a", 30, 20, quantised=True), Layer("b", 90, 90)), 0, 0, 1)
    assert quantisation_scratch(model, 4, 2, 7) == (2 * 600, 2 * 600)
    assert quantisation_scratch(model, 8, 2, 7) == (4 * 7 * 30, 2 * 600)
    assert quantisation_scratch(model, 0, 2, 7) == (0, 0)


def test_what_the_teacher_spells_holds_no_more_logits_than_the_rest() -> None:
    """On a GPU: each place has what its own kind of spelling asks for, and no table of both."""
    half = torch.bfloat16
    sizes = LossSizes(0, 0, 0, 1, half, half, half, head_trained=False)
    loss = LossConfig.model_validate(VARIANTS["mapped"]["loss"])
    alone, spelt = (
        trace_heads(sizes, loss, (49_152, 151_936), spelt=spelt, compiled=False)
        for spelt in (False, True)
    )
    assert max(spelt.both) <= 1.01 * max(alone.both)
    further = zip(spelt.products, alone.products, strict=True)
    assert all(own == pytest.approx(rest * 3) for own, rest in further)


@pytest.mark.parametrize("S", [40, 130])
def test_soft_dtw_takes_what_it_is_counted_for(S: int) -> None:
    B, T, d = 2, 100, 48
    lengths = torch.full((B,), S), torch.full((B,), T)
    known = [torch.randn(B, length, d, requires_grad=True) for length in (S, T, S, T)]
    penalty = torch.zeros(B, S, T)
    with Recorder([*known, penalty, *lengths]) as recorder:
        # The teacher's sides are made for it.
        pairs = [(known[0], known[1] * 1.0), (known[2], known[3] * 1.0)]
        values = normalised_soft_dtw(pairs, *lengths, penalty, 1.0, 1.0)
        at_work, forward = recorder.most(), len(recorder.events)
        del pairs
        kept = sum(recorder.events)
        torch.stack(values).sum().backward()
    held = sum(recorder.events[:forward])
    counted = soft_dtw_bytes("cpu", B, S, T, d, 0, band=False)
    assert at_work == pytest.approx(counted[0], rel=0.03)
    assert kept == pytest.approx(counted[1], rel=0.03) and held > kept
    assert recorder.most() <= 1.03 * max(counted)


def test_a_gpu_keeps_the_weights_of_small_matrices_and_not_of_large_ones() -> None:
    S, T = 512, 600
    cells = B_S_T = 4 * 4 * (S * T + S * S + T * T)
    assert 2 * B_S_T < 4 * matrices(shapes(2, S, T), "cuda") < 8 * cells
    large = matrices(shapes(2, 4096, 4096), "cuda") / (2 * 4096**2)
    assert 4 < large < 8  # one launch a matrix: cost and skewed cost, twice a strip, and before


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mapped",
        "mapped, LoRA, checkpointing",
        "paper",
        "mapped, hidden states",
        "mapped, two teachers",
    ],
)
def test_what_two_real_steps_allocate_is_planned(name: str, tmp_path: Path) -> None:
    for model, config in plan_allocated.models().items():
        config.save_pretrained(tmp_path / model)
    recipe = plan_allocated.recipe_of(
        tmp_path, plan_allocated.configurations()[name], rows := 2, length := 96
    )
    real = plan_allocated.allocated(recipe, rows, length)
    assert plan_allocated.planned(recipe) == pytest.approx(real, rel=LIMIT)
