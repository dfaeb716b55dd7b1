"""The three parts of a causal language model that the loss needs: embeddings, body and head.

Student and teacher are taken apart by the same rules. A model whose head is not a plain linear map
of the body's last hidden state is refused by name, before anything is trained.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import Head
from dwakd_plugin.models.multipliers import embedding_multiplier, logit_map


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model inside, with whatever adapters are injected into its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def body(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The decoder whose `last_hidden_state` the head reads, after the final norm."""
    lm = causal_lm(model)
    decoder = lm.base_model
    if decoder is lm:
        raise UserError(
            f"{type(lm).__name__} has no separate decoder (no base_model_prefix), so its hidden "
            "states come only with its logits. This architecture is not supported."
        )
    return decoder


def hidden_states(
    model: PreTrainedModel | PeftModel, input_ids: Tensor, mask: Tensor | None, **inputs: Tensor
) -> Tensor:
    """Final hidden states (B, L, d) for token ids and attention mask (B, L); no logits are made.

    Positions are counted from a row's first token, on whichever side it is padded. Without a mask
    every token counts, and position ids say where packed rows begin.
    """
    decoder = body(model)
    takes = inspect.signature(decoder.forward).parameters
    if mask is not None and "position_ids" not in inputs and "position_ids" in takes:
        # Learned positions (GPT-2) would count the padding on the left too.
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    output = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False, **inputs)
    return output.last_hidden_state


def check_positions(model: PreTrainedModel | PeftModel, sequence_len: int, key: str) -> None:
    """Raises UserError where a model has learned fewer positions than `sequence_len`, the `key`.

    The table itself is asked: axolotl raises the number in the config to the recipe's.
    """
    lm = causal_lm(model)
    text = lm.get_decoder()  # of a model that sees, without its eyes
    decoder = text if isinstance(text, PreTrainedModel) and text is not lm else body(model)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe")):
            count = module.num_embeddings - getattr(module, "offset", 0)  # OPT keeps two aside
            if sequence_len > count:
                raise UserError(
                    f"{key}: {sequence_len}, and {type(causal_lm(model)).__name__} has learned "
                    f"{count} positions. Set {key}: {count}, or less."
                )


def output_head(model: PreTrainedModel | PeftModel) -> Head:
    """The head as a linear map with the model's own scaling and soft cap (D9: all its rows).

    Raises UserError where the head is anything else.
    """
    lm = causal_lm(model)
    module = lm.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    if not isinstance(module, nn.Linear) or hasattr(module, "lora_A"):
        raise UserError(
            f"The output head of {type(lm).__name__} is a {type(module).__name__}, and the loss "
            "can use a plain linear head only. With LoRA, leave `lm_head` out of "
            "lora_target_modules; `lora_modules_to_save: [lm_head]` trains it whole."
        )
    hidden_size = lm.get_input_embeddings().weight.shape[1]
    if module.weight.shape[1] != hidden_size:
        raise UserError(
            f"{type(lm).__name__} has {hidden_size} features in its embeddings and "
            f"{module.weight.shape[1]} at its head. Models that project between the two are not "
            "supported."
        )
    found = logit_map(lm, body(model), module)
    return Head(module.weight, module.bias, found.scale, found.softcap)


@torch.no_grad()
def check_logits(
    model: PreTrainedModel | PeftModel,
    name: str,
    head: Head | None = None,
    device: torch.device | None = None,
) -> bool:
    """Raises UserError where hidden states and head don't give the model's own logits, or the first
    tokens' states hang on those that follow, so that a teacher would have read the answer.

    Gives whether these are finite. `name` is the model's in the message. Of a model whose weights
    are elsewhere between forwards, `head` is its head with values, and `device` takes the tokens.
    The mode is left as it was.
    """
    lm = causal_lm(model)
    generator = torch.Generator().manual_seed(0)
    weight = lm.get_input_embeddings().weight
    ids = torch.randint(weight.shape[0], (2, 8), generator=generator)
    ids[1, :4] = ids[0, :4]  # two texts that begin alike
    ids = ids.to(device or weight.device)
    was_training = model.training
    model.eval()
    try:
        own = model(input_ids=ids).logits
        states = hidden_states(model, ids, torch.ones_like(ids))
    finally:
        model.train(was_training)
    hidden = states.flatten(0, 1)
    head = head or output_head(model)
    given = head.logits(hidden.to(head.weight.device)).view(own.shape).to(own.device)
    error = ((given - own).norm() / own.float().norm()).item()
    whole = all(each.dtype == torch.float32 for each in (own, hidden))
    if error > (1e-3 if whole else 0.05):  # half precision rounds in another order
        raise UserError(
            f"{name}: the logits that {type(lm).__name__} gives differ from those of its hidden "
            f"states and its head by {error:.1%}, so that the loss would teach another model. This "
            "architecture isn't supported."
        )
    # Rounding that sends one token to another expert, or an 8-bit layer's neighbours, move some.
    one, other = states[:, :4].float()
    moved = ((one - other).norm(dim=-1) / one.norm(dim=-1)).median().item()
    if moved > (1e-3 if whole and not getattr(lm, "is_quantized", False) else 0.1):
        raise UserError(
            f"{name}: the states that {type(lm).__name__} gives of a text's first tokens differ by "
            f"{moved:.1%} with the tokens that follow, so that it has read what it is to predict. "
            "Another attention may not: attn_implementation: eager (for the teacher, in its block)."
        )
    return math.isfinite(error)


@dataclass(frozen=True)
class EmbeddingTable:
    """A model's input embeddings as a table: weight (V, d) and the model's own scaling of it."""

    weight: Tensor
    scale: float = 1.0

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids (…) to embeddings (…, d). No dropout and no training noise: a lookup."""
        rows = F.embedding(ids, self.weight)
        return rows if self.scale == 1.0 else rows * self.scale


def embedding_table(model: PreTrainedModel | PeftModel) -> EmbeddingTable:
    """The input embeddings of a model. Raises UserError where an adapter sits on them."""
    lm = causal_lm(model)
    module = lm.get_input_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    if hasattr(module, "lora_embedding_A") and len(module.lora_embedding_A):
        raise UserError(
            "A LoRA on the input embeddings is not supported. Leave the embeddings out of "
            "lora_target_modules; `lora_modules_to_save: [embed_tokens]` trains them whole."
        )
    # Gemma scales, in the weight's dtype; the plain number, as a GPU's buffer has to be waited for.
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    scale = float(torch.tensor(scale, dtype=module.weight.dtype))
    outside = embedding_multiplier(lm, body(model), lm.get_input_embeddings())  # Granite
    return EmbeddingTable(module.weight, scale * outside)


def gather_positions(sequences: Tensor, positions: Tensor) -> Tensor:
    """What sequences (sequences, L, …) hold at places (B, S) in all their tokens: (B, S, …)."""
    return sequences.flatten(0, 1)[positions]


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; 4-bit and partitioned weights count as what they stand for."""
    if isinstance(model, PreTrainedModel) and not any(
        hasattr(parameter, "ds_numel") for parameter in model.parameters()
    ):
        return int(model.num_parameters())
    return sum(map(size, model.parameters()))


def size(parameter: Tensor) -> int:
    """Numbers in a parameter, of which ZeRO-3 may leave none here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def weights_dtype(asked: str, model_config: Any, device: str) -> torch.dtype:
    """The dtype of unquantised weights: as asked; for `auto` the checkpoint's, float32 on a CPU."""
    if asked != "auto":
        return getattr(torch, asked)
    if torch.device(device).type == "cpu":
        return torch.float32  # half precision is slow on CPUs
    dtype = getattr(model_config, "dtype", None) or model_config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
