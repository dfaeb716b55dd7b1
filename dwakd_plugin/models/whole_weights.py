"""A model's weights under the names that its checkpoint has, a LoRA's share in them.

For who holds a copy of a model that trains: nothing of the model changes, and what has to be made
for one name is let go before the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dwakd_plugin.models.causal_lm import causal_lm


def why_not_whole(model: PreTrainedModel | PeftModel) -> str | None:
    """What of a model `whole_weights` cannot give; None where it can give all."""
    if getattr(causal_lm(model), "is_quantized", False):
        return "its weights are quantised"
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            variant = type(module) is not lora.Linear or module.lora_variant
            if variant or any(module.lora_bias.values()):
                return f"{name} has an adapter that is no plain LoRA"
        elif isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(
            module, ModulesToSaveWrapper
        ):
            return f"{name} trains some of its rows alone"
    return None


def has_tied_head(lm: PreTrainedModel) -> bool:
    """Whether head and embeddings are one weight; with a LoRA in the head they no longer are."""
    head: Any = lm.get_output_embeddings()
    tied: bool = head.weight is lm.get_input_embeddings().weight
    return tied and not isinstance(head, BaseTunerLayer)


@torch.no_grad()
def whole_weights(
    model: PreTrainedModel | PeftModel, *, untied: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of all that a checkpoint of the model without adapters would have.

    In W + s·BA the dtypes are as torch adds them. Weights that are tied come once, or with `untied`
    under each name; one with a LoRA is tied to none. Where a checkpoint has them cut otherwise than
    the model (experts), all are made at once.
    """
    lm = causal_lm(model)
    of_a_run = set(lm._keys_to_ignore_on_save or ())
    found, seen = {}, set()
    for name, parameter, layer in _parameters(lm, ""):
        if name in of_a_run or not (untied or layer or id(parameter) not in seen):
            continue
        found[name] = parameter, layer
        if layer is None:
            seen.add(id(parameter))
    shapes = {name: parameter.to("meta") for name, (parameter, _) in found.items()}
    if revert_weight_conversion(lm, shapes).keys() == shapes.keys():
        for name, (parameter, layer) in found.items():
            yield name, _merged(parameter, layer)
    else:
        made = {name: _merged(*each) for name, each in found.items()}
        yield from revert_weight_conversion(lm, made).items()


def _parameters(
    module: nn.Module, prefix: str
) -> Iterator[tuple[str, nn.Parameter, lora.Linear | None]]:
    """(name without what adapters put between, parameter, LoRA that adds to it)."""
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    if isinstance(module, lora.Linear):
        for name, parameter in module.get_base_layer().named_parameters():
            yield prefix + name, parameter, module if name == "weight" else None
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter, None
    for name, child in module.named_children():
        yield from _parameters(child, f"{prefix}{name}.")


def _merged(parameter: Tensor, layer: lora.Linear | None) -> Tensor:
    weight = parameter.detach()
    for adapter in () if layer is None else layer.active_adapters:
        if adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter)
    return weight
