"""The models and the loss of a recipe, counted and traced once for all plans of a process.

A plan is made for many micro-batches and changes of a recipe; most of what it asks for is the same.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

from dwakd_plugin.errors import UserError
from dwakd_plugin.plan.loss_trace import HeadTrace, LossSizes, trace_heads, trace_loss
from dwakd_plugin.plan.model_sizes import Model, measure_model, model_config, with_lora
from dwakd_plugin.plan.trace import BodyTrace, Events, trace_body
from dwakd_plugin.recipe.schema import LossConfig
from dwakd_plugin.tokenizers.loading import load_tokenizer
from dwakd_plugin.tokenizers.pair import shared_vocabulary


@functools.cache
def config_of(place: str, name: str, revision: str | None, trust: bool) -> Any:
    return model_config(name, place, revision=revision, trust_remote_code=trust)


@functools.cache
def model_of(place: str, name: str, revision: str | None, trust: bool, lora: str | None) -> Model:
    config = config_of(place, name, revision, trust)
    return measure_model(name, config, json.loads(lora) if lora else None)


@functools.lru_cache(maxsize=64)
def body_trace(
    name: str,
    revision: str | None,
    trust: bool,
    lora: str | None,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    attention: str,
    fused_dropout: bool,
    training: bool,
    checkpointing: bool,
) -> BodyTrace:
    from transformers import AutoModelForCausalLM

    config = config_of("base_model", name, revision, trust)

    def build(config: Any) -> Any:
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        if fused_dropout:  # of attention weights: a GPU's kernels do not keep it, a CPU's cannot
            for name in ("attention_dropout", "attn_pdrop"):
                if hasattr(config, name):
                    setattr(config, name, 0.0)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust
            )
        return with_lora(model, json.loads(lora)) if lora else model

    return trace_body(
        build,
        config,
        length,
        training=training,
        checkpointing=checkpointing,
        autocast=autocast,
    )


@functools.lru_cache(maxsize=64)
def loss_trace(sizes: LossSizes, loss: str, compiled: bool) -> Events:
    return trace_loss(sizes, LossConfig.model_validate_json(loss), compiled=compiled)


@functools.lru_cache(maxsize=64)
def head_trace(
    sizes: LossSizes, loss: str, rows: tuple[int, int], spelt: bool, compiled: bool
) -> HeadTrace:
    config = LossConfig.model_validate_json(loss)
    return trace_heads(sizes, config, rows, spelt=spelt, compiled=compiled)


@functools.cache
def shared_tokens(student: str, teacher: str) -> int | None:
    """How many tokens both vocabularies have; None where a tokenizer is not at hand."""
    try:
        tokenizers = [load_tokenizer(name, name) for name in (teacher, student)]
    except UserError:
        return None
    return len(shared_vocabulary(*tokenizers))


def like_a_llama(
    model: Model, length: int, itemsize: int, batch: int, training: bool, checkpointing: bool
) -> tuple[float, float, float]:
    """Activations by rule of thumb: a layer keeps about 34 numbers a feature and token."""
    state = batch * length * model.hidden_size * itemsize
    layer = 34 * state
    if not training:
        return state, layer, 0
    if checkpointing:
        return model.layers * state, model.layers * state + layer, 1.5 * layer
    return model.layers * layer, model.layers * layer, 0.5 * layer
