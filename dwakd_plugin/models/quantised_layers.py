"""bitsandbytes' layers in a model, by their names: the package need not be installed."""

from __future__ import annotations

import logging

from torch import nn

_BITS = {"Linear4bit": 4, "Linear8bitLt": 8}


def bits_of_layers(model: nn.Module) -> int | None:
    """4 or 8, by the first quantised layer of the model; None where none is."""
    kinds = (_BITS.get(type(module).__name__) for module in model.modules())
    return next((bits for bits in kinds if bits is not None), None)


def keep_as_stored(model: nn.Module) -> None:
    """Has each 4-bit layer of the model compute from its weights as they were quantised.

    On a CPU with AVX512-BF16, bitsandbytes (0.50.2) packs a layer's weights anew for good at its
    first forward in evaluation. From then on the layer computes in bfloat16, whatever its compute
    dtype is, and passes no gradient to its input: a QLoRA that was evaluated once, or has sampled
    once, would hardly learn any more, without a word. Widths that aren't multiples of 32 raise.
    """
    for module in model.modules():
        if _BITS.get(type(module).__name__) == 4:
            module.support_avx512bf16_for_cpu = False


def expect_half_precision() -> None:
    """Silences what an 8-bit layer says in each forward: that it computes in half precision."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
