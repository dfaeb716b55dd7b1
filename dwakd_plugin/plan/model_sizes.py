"""What a model weighs, from its config alone: it is built without memory (torch's meta device)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwakd_plugin.errors import UserError, first_line

FLOAT = 4  # bytes

# bitsandbytes: a scale in float32 per row of an 8-bit layer; nf4 with double quantisation has a
# byte per 64 weights, a float32 per 256 of those, and two code books and an offset per layer.
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
NF4_PER_LAYER = 4 * (256 + 16 + 1)
ADAM_8BIT_BLOCK, ADAM_8BIT_LEAST = 256, 4096  # a float32 per block; smaller tensors stay float32


def model_config(name: str, place: str, **options: Any) -> Any:
    """A model's transformers config. Raises UserError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The model `{name}` has no config to plan with: {first_line(error)}\n"
            f"{place} takes a folder with a config.json, or a hub id."
        ) from error


@dataclass(frozen=True)
class Layer:
    """One weight of a model, as a number of rows and columns (1 where it is a vector)."""

    name: str
    rows: int
    columns: int
    quantised: bool = False  # where the model is loaded in 8 or 4 bit
    embedding: bool = False  # an input embedding or a head
    norm: bool = False
    trained: bool = True
    adapter: bool = False

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Model:
    """What the plan needs to know of a model."""

    name: str
    weights: tuple[Layer, ...]
    hidden_size: int
    head_rows: int
    layers: int

    @property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights if not weight.adapter)

    @property
    def body_parameters(self) -> int:
        """Those that a token is multiplied with, head left out."""
        return sum(weight.numel for weight in self.weights if not weight.embedding)

    @property
    def trained(self) -> int:
        return sum(weight.numel for weight in self.weights if weight.trained)


def measure_model(name: str, config: Any, adapter: dict[str, Any] | None = None) -> Model:
    """Counts a model's weights; with `adapter` (LoraConfig's settings) also those of the LoRA.

    Raises UserError where the architecture cannot be built or the LoRA fits nothing in it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"The model `{name}` ({config.model_type}) cannot be built from its config: "
            f"{first_line(error)}"
        ) from error
    kept = get_keys_to_not_convert(model)
    tables = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    from transformers.pytorch_utils import Conv1D

    linear, turned = set(), set()
    for place, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, Conv1D):
            if not any(key in place for key in kept):
                linear.add(id(module.weight))
            if isinstance(module, Conv1D):  # its weight is (in, out)
                turned.add(id(module.weight))
    if adapter is not None:
        model = with_lora(model, adapter)
    weights = tuple(
        Layer(
            place,
            *_rows_and_columns(parameter, turned=id(parameter) in turned),
            quantised=id(parameter) in linear,
            embedding=id(parameter) in tables,
            norm="norm" in place,
            trained=parameter.requires_grad,
            adapter="lora_" in place or "modules_to_save" in place,
        )
        for place, parameter in model.named_parameters()
    )
    text = config.get_text_config()
    return Model(
        name,
        weights,
        int(text.hidden_size),
        int(text.vocab_size),
        int(text.num_hidden_layers),
    )


def _rows_and_columns(parameter: torch.Tensor, *, turned: bool) -> tuple[int, int]:
    shape = tuple(parameter.shape) or (1,)
    if len(shape) == 1:
        return shape[0], 1
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return (columns, rows) if turned else (rows, columns)


def lora_settings(recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The recipe's LoRA as LoraConfig's settings; None for full fine-tuning."""
    if not recipe.get("adapter"):
        return None
    return {
        "r": recipe.get("lora_r") or 8,
        "lora_alpha": recipe.get("lora_alpha") or 16,
        "lora_dropout": recipe.get("lora_dropout") or 0.0,
        "target_modules": recipe.get("lora_target_modules") or [],
        "all_linear": bool(recipe.get("lora_target_linear")),
        "modules_to_save": recipe.get("lora_modules_to_save") or None,
    }


def with_lora(model: Any, settings: dict[str, Any]) -> Any:
    """The model with a LoRA on it, as axolotl builds it. Raises UserError where it fits nothing."""
    from peft import LoraConfig, get_peft_model

    settings = dict(settings)
    targets = settings["target_modules"]
    if settings.pop("all_linear"):
        targets = [targets] if isinstance(targets, str) else list(targets)
        head = model.get_output_embeddings()
        targets += [
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        targets = sorted(set(targets))
    try:
        return get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", **settings | {"target_modules": targets})
        )
    except ValueError as error:
        raise UserError(
            f"The recipe's LoRA cannot be put on the student: {first_line(error)}\n"
            "Name its layers in lora_target_modules, or set lora_target_linear: true."
        ) from error


def weight_bytes(
    model: Model, dtype: Callable[[Layer], torch.dtype], bits: int | None = None
) -> int:
    """All weights: in their dtype, or in 8 or 4 bits by bitsandbytes where they are linear."""

    def of(weight: Layer) -> int:
        if bits == 8 and weight.quantised:
            return weight.numel + FLOAT * weight.rows
        if bits == 4 and weight.quantised:
            blocks = math.ceil(weight.numel / NF4_BLOCK)
            scales = FLOAT * math.ceil(blocks / NF4_NESTED_BLOCK) + NF4_PER_LAYER
            return math.ceil(weight.numel / 2) + blocks + scales
        return weight.numel * dtype(weight).itemsize

    return sum(map(of, model.weights))


def quantisation_scratch(
    model: Model, bits: int, itemsize: int, tokens: int
) -> tuple[float, float]:
    """Of bitsandbytes, forward and backward: in 4 bit a layer's weight is unpacked before it is
    multiplied, in 8 bit before it is in backward; forward sums in 32 bits beside the result."""
    layers = [weight for weight in model.weights if weight.quantised]
    if not bits or not layers:
        return 0, 0
    unpacked = itemsize * max(layer.numel for layer in layers)
    summed = 4 * tokens * max(layer.rows for layer in layers)
    return (summed if bits == 8 else unpacked), unpacked


def optimizer_bytes(name: str, weight: Layer, itemsize: int) -> tuple[float, str | None]:
    """State of one trained weight, and what had to be assumed."""
    name = name.lower()
    if "8bit" in name or "4bit" in name:
        moments = 1 if "lion" in name or "sgd" in name else 2
        if weight.numel < ADAM_8BIT_LEAST:
            return moments * FLOAT * weight.numel, None
        each = 0.5 if "4bit" in name else 1.0
        return moments * (each + FLOAT / ADAM_8BIT_BLOCK) * weight.numel, None
    if "adafactor" in name:  # a row's and a column's second moments
        return FLOAT * (weight.rows + weight.columns if weight.columns > 1 else weight.rows), None
    if "lion" in name or "muon" in name:
        return itemsize * weight.numel, None
    if name == "sgd":
        return 0, None
    if "lomo" in name or "galore" in name:
        return 0, f"optimizer {name}: no state is counted"
    known = "adam" in name
    return 2 * itemsize * weight.numel, (
        None if known else f"optimizer {name}: two moments a parameter, as Adam has, are assumed"
    )
