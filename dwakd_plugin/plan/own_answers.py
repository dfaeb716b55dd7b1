"""What sampling the student's own answers takes: `train.own_sampling`, tensor by tensor.

Keys and values of all layers for each token of prompt and answer, those of one layer twice (each
token's are appended to a copy); the prompt's forward pass; and of each answer's next token the
logits, twice more as they are masked, and in float64 the scaled ones, probabilities, and sums, with
`top_p` sorted as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dwakd_plugin.models.vllm import is_installed
from dwakd_plugin.recipe.blocks import OwnAnswersConfig
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train.own_sampling import AT_ONCE

_NOT_WHOLE = ("peft_use_dora", "peft_trainable_token_indices")  # keys of axolotl's recipes
DRAWING, SORTING = 3 * 4 + 3 * 8, 4 * 8  # bytes of a token's logit


def samples_with_vllm(
    own: OwnAnswersConfig, kind: str, recipe: Mapping[str, Any], *, bits: int
) -> bool:
    """Whether vLLM has its share of a device of that kind; `bits` of a quantised student, else 0.

    With `backend: auto` it is taken to be installed there where it is here; a student that cannot
    be handed to it (`models.whole_weights.why_not_whole`) is known by its recipe.
    """
    whole = not bits and not any(recipe.get(key) for key in _NOT_WHOLE)
    able = kind == "cuda" and whole and is_installed()
    return own.backend == "vllm" or (own.backend == "auto" and able)


def answers_at_once(own: OwnAnswersConfig, rows: int) -> int:
    """Of a step's rows, those that are sampled together."""
    return min(AT_ONCE, math.ceil(own.share * rows))


def read_in_a_step(
    config: DWAKDConfig, cached: bool, batch: int, accumulation: int
) -> tuple[float, int]:
    """The share of a step's rows that the teacher reads in it, and how many rows of a micro-batch
    at most, as all of a step's own answers may be in one."""
    own = config.sampled_answers
    share = 1.0 if not cached else 0.0 if own is None else own.share
    return share, min(batch, math.ceil(share * batch * accumulation))


def key_value_bytes(config: Any, answers: int, tokens: int, itemsize: int) -> int:
    """Of a transformers config's model, for so many answers of so many tokens, prompts included."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layer: int = 2 * answers * tokens * heads * width * itemsize
    return layer * (int(text.num_hidden_layers) + 1)


def drawing_bytes(own: OwnAnswersConfig, answers: int, rows: int) -> int:
    """rows: of the student's head."""
    return answers * rows * (DRAWING + (SORTING if own.top_p < 1 else 0))
