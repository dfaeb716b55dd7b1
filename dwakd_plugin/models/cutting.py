"""A model without the decoder layers that matter least, measured on tokens of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.causal_lm import body, output_head


class Shape(NamedTuple):
    """Where a family keeps its layers and its last norm, and the config's name for their number."""

    layers: str
    norm: str
    count: str


_LLAMA = Shape("layers", "norm", "num_hidden_layers")
SHAPES = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA
) | {"gpt2": Shape("h", "ln_f", "n_layer")}


def shape_of(config: Any) -> Shape:
    """The shape of a model by its config. Raises UserError for one whose layers cannot be cut."""
    if config.model_type not in SHAPES:
        raise UserError(
            f"A model of the kind `{config.model_type}` cannot be cut. Kinds that can: "
            f"{', '.join(SHAPES)}."
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            "This model divides its attention by the number of the layer "
            "(scale_attn_by_inverse_layer_idx), which another number of layers would change. It "
            "cannot be cut."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError("This model is stored quantised, and cutting needs its whole weights.")
    return SHAPES[config.model_type]


def layer_count(config: Any) -> int:
    """How many decoder layers a model has. Raises UserError as `shape_of`."""
    return int(getattr(config, shape_of(config).count))


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Leaves a model with these of its layers, in order, in place; its config is cut along."""
    config, shape = model.config, shape_of(model.config)
    decoder = body(model)
    layers = getattr(decoder, shape.layers)
    setattr(decoder, shape.layers, nn.ModuleList([layers[index] for index in kept]))
    if getattr(config, "max_window_layers", None) is not None:  # Qwen: the first ones have none
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    setattr(config, shape.count, len(kept))
    for place, layer in enumerate(getattr(decoder, shape.layers)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in the cache of keys and values
                module.layer_idx = place


# Which matter least ---------------------------------------------------------------------------


class Reader:
    """A model that reads given tokens with any of its layers.

    What a layer is told beside the hidden states (masks, positions) is the same with any other
    layers before it, so it is kept from one whole reading.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        """ids (B, L), without padding: each row a text or a part of one."""
        decoder, shape = body(model), shape_of(model.config)
        self._layers = getattr(decoder, shape.layers)
        self._norm = getattr(decoder, shape.norm)
        self._head = output_head(model)
        self._targets = ids[:, 1:]
        self.tokens = self._targets.numel()
        self._told: list[tuple[Any, dict[str, Any]]] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, options: self._told.append((args, options)), with_kwargs=True
            )
            for layer in self._layers
        ]
        try:
            with torch.no_grad():
                decoder(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self.embedded: Tensor = self._told[0][0][0]
        self._told = [(args[1:], options) for args, options in self._told]

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states (B, L, d) after a layer of the whole model."""
        args, options = self._told[index]
        output = self._layers[index](hidden, *args, **options)
        return output[0] if isinstance(output, tuple) else output

    def nats(self, hidden: Tensor) -> float:
        """−Σ ln p of the tokens that follow, from what the last layer gives (B, L, d)."""
        states = self._norm(hidden)[:, :-1]
        return sum(
            F.cross_entropy(self._head.logits(row), targets, reduction="sum").item()
            for row, targets in zip(states, self._targets, strict=True)
        )


def change(before: Tensor, after: Tensor) -> float:
    """How much a layer changes its input: Σ over tokens of 1 − cos(before, after); (B, L, d) both.

    The "block influence" of ShortGPT (arXiv 2403.03853).
    """
    return float((1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).sum())


@torch.no_grad()
def influences(reader: Reader, kept: Sequence[int]) -> list[float]:
    """How much each of the kept layers changes its input, over the tokens read."""
    hidden, found = reader.embedded, []
    for index in kept:
        after = reader.layer(index, hidden)
        found.append(change(hidden, after))
        hidden = after
    return found


@torch.no_grad()
def loss(reader: Reader, kept: Sequence[int]) -> float:
    """−Σ ln p of the tokens read by these layers alone."""
    hidden = reader.embedded
    for index in kept:
        hidden = reader.layer(index, hidden)
    return reader.nats(hidden)


class Choice(NamedTuple):
    """One way to choose: its name, the layers left out, in that order, and nats a token without."""

    way: str
    left_out: list[int]
    loss: float


def choices(
    readers: Sequence[Reader],
    layers: int,
    wanted: int,
    on_reading: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[Choice]]:
    """1 − cos a token of each layer, and what two ways leave out until `wanted` are left.

    "at once" takes the layers that change their input least; "one by one" takes the least, and
    measures the others again without it. Neither is the better one always, so both are tried.
    `on_reading` is called `readings(layers, wanted)` times for each reader.
    """
    tokens = sum(reader.embedded[..., 0].numel() for reader in readers)
    targets = sum(reader.tokens for reader in readers)

    def over_all(measured: Callable[[Reader], list[float]], count: int) -> list[float]:
        sums = []
        for reader in readers:
            sums.append(measured(reader))
            on_reading()
        return [sum(each) / count for each in zip(*sums, strict=True)]

    first = influence = over_all(lambda reader: influences(reader, range(layers)), tokens)
    at_once = sorted(range(layers), key=first.__getitem__)[: layers - wanted]
    kept, one_by_one = list(range(layers)), []
    while len(kept) > wanted:
        if one_by_one:
            influence = over_all(lambda reader: influences(reader, kept), tokens)
        one_by_one.append(kept.pop(influence.index(min(influence))))
    ways = {"at once": at_once, "one by one": one_by_one}
    return first, [
        Choice(way, out, over_all(lambda r, out=out: [loss(r, _without(out, layers))], targets)[0])
        for way, out in ways.items()
    ]


def readings(layers: int, wanted: int) -> int:
    """How often `choices` reads the texts."""
    return layers - wanted + 2


def _without(left_out: Sequence[int], layers: int) -> list[int]:
    return [index for index in range(layers) if index not in left_out]
