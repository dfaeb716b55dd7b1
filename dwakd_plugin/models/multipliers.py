"""What a model multiplies its embeddings and its logits by, found by watching its own forward.

Architectures name such factors as they like (Granite divides by `logits_scaling`, HyperCLOVAX
multiplies by it), so no name is looked up: the parts around them are replaced by known numbers for
one forward. That needs no weights, and finds what a sharded or quantised model does as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from dwakd_plugin.errors import UserError, first_line

# Powers of two, which no dtype rounds: a factor is read off the small ones, a cap off the largest.
_GRID = torch.tensor([sign * 2.0**power for power in (-20, -4, 0, 2, 4, 6, 20) for sign in (1, -1)])
_EXACT = 1e-5  # float32


@dataclass(frozen=True)
class LogitMap:
    """Last hidden state to logits: softcap(scale · head)."""

    scale: float
    softcap: float | None


@dataclass
class _Given(BaseModelOutput):
    """A decoder's output with nothing but its last hidden state."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _FirstLayerError(Exception):
    """Carries what the first layer is given, and ends the forward there."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


_LOGITS: WeakKeyDictionary[nn.Module, LogitMap] = WeakKeyDictionary()
_EMBEDDINGS: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def logit_map(lm: Any, decoder: nn.Module, head: nn.Linear) -> LogitMap:
    """How a causal LM makes its logits of its decoder's last hidden state; watched once a model.

    Raises UserError where it does anything but multiply and cap what its linear head gives.
    """
    if lm not in _LOGITS:
        _LOGITS[lm] = _watch_logits(lm, decoder, head)
    return _LOGITS[lm]


def embedding_multiplier(lm: Any, decoder: nn.Module, embeddings: nn.Module) -> float:
    """What a decoder multiplies its embeddings' output by, before its first layer.

    1 where there is no such factor, as behind a norm of the embeddings or a projection of them.
    """
    if lm not in _EMBEDDINGS:
        _EMBEDDINGS[lm] = _watch_embeddings(lm, decoder, embeddings)
    return _EMBEDDINGS[lm]


def _watch_logits(lm: Any, decoder: nn.Module, head: nn.Linear) -> LogitMap:
    name = type(lm).__name__
    refusal = f"dwakd needs the logits of {name} to be a linear map of its last hidden states"
    if type(head).forward is not nn.Linear.forward:
        raise UserError(f"{refusal}, and its head is a {type(head).__name__}. It isn't supported.")
    device, count = head.weight.device, len(_GRID)
    if device.type == "meta":
        device = torch.device("cpu")
    hidden = _GRID.to(device)[None, :, None].expand(1, count, head.in_features)
    plain = _GRID.to(device)[None, :, None].expand(1, count, head.out_features)
    seen: list[Tensor] = []

    def linear(states: Tensor) -> Tensor:
        seen.append(states)
        return plain.clone()

    replaced: dict[nn.Module, Callable[..., Any]] = {head: linear}
    for module in (decoder, lm.get_decoder()):  # OPT goes straight to the one inside the other
        if module is not None and module not in (lm, head):
            replaced[module] = lambda *_, **__: _Given(last_hidden_state=hidden.clone())
    try:
        with _quiet(lm), _forwards(replaced):
            logits = lm(input_ids=torch.zeros(1, count, dtype=torch.long, device=device)).logits
    except UserError:
        raise
    except Exception as error:  # its code is not ours, and may be anybody's
        raise UserError(
            f"{refusal}, and its forward stops where its decoder's output is watched: "
            f"{first_line(error)}. It isn't supported."
        ) from error
    if len(seen) != 1 or seen[0].shape != hidden.shape:
        raise UserError(
            f"{refusal} through `get_output_embeddings()`, and its forward makes them otherwise. "
            "It isn't supported."
        )
    before = _ratio(seen[0].float(), hidden)
    if before is None or (before != 1.0 and head.bias is not None):
        raise UserError(
            f"{refusal}, and it does more to them before its head than multiply. It isn't "
            "supported."
        )
    if logits.shape != plain.shape:
        raise UserError(
            f"{refusal}: its head has {head.out_features:,} rows, and it returns logits of the "
            f"shape {tuple(logits.shape)} where {tuple(plain.shape)} were due. It isn't supported."
        )
    fitted = _capped(logits.float(), plain)
    if fitted is None:
        raise UserError(
            f"{refusal}, and it does more to what its head gives than multiply it and cap it by a "
            "tanh. It isn't supported."
        )
    return LogitMap(fitted.scale * before, fitted.softcap)


def _capped(found: Tensor, given: Tensor) -> LogitMap | None:
    """The map softcap(scale · given) that gave `found`; None where there is none."""
    scale = _ratio(found[:, :2], given[:, :2])  # too small for a cap to show
    if scale is None:
        return None
    if _close(found, scale * given):
        return LogitMap(scale, None)
    cap = found[0, -2, 0].item()  # too large for anything but the cap
    if cap > 0 and _close(found, (scale * given / cap).tanh() * cap):
        return LogitMap(scale, cap)
    return None


def _ratio(found: Tensor, given: Tensor) -> float | None:
    """The one factor between two tensors of the same shape; None where there is none."""
    factors = found / given
    factor = factors.flatten()[0].item()
    same = bool(factors.isfinite().all()) and factor > 0 and _close(factors, torch.tensor(factor))
    return factor if same else None


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected.to(found.device), rtol=_EXACT, atol=1e-12)


def _watch_embeddings(lm: Any, decoder: nn.Module, embeddings: nn.Module) -> float:
    weight = embeddings.weight
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    count, width = 4, int(weight.shape[1])
    generator = torch.Generator().manual_seed(0)
    given = 2.0 ** torch.randint(-2, 3, (1, count, width), generator=generator).to(device)
    given[..., ::2] *= -1
    found = []
    for factor in (1.0, 2.0):  # the difference has no positions in it
        first = _first_layer_input(lm, decoder, embeddings, factor * given)
        if first is None or first.shape != given.shape:
            return _declared(lm)
        found.append(first.float())
    difference = found[1] - found[0]
    multiplier = (difference / given).median().item()
    fits = (difference - multiplier * given).norm() <= 1e-3 * difference.norm()
    # Not proportional: a norm or a projection follows, and no factor says what it makes of them.
    return multiplier if multiplier > 0 and bool(fits) else 1.0


def _declared(lm: Any) -> float:
    """The factor by its usual name, where the forward doesn't get as far as the first layer."""
    return float(getattr(lm.config.get_text_config(), "embedding_multiplier", None) or 1.0)


def _first_layer_input(
    lm: Any, decoder: nn.Module, embeddings: nn.Module, given: Tensor
) -> Tensor | None:
    """What the first layer is given where the embeddings are `given` (1, L, d); None if unknown."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        raise _FirstLayerError(kwargs.get("hidden_states", tensors[0] if tensors else given[:0]))

    replaced: dict[nn.Module, Callable[..., Any]] = {embeddings: lambda *_, **__: given.clone()}
    hooks = []
    for module in decoder.modules():
        if isinstance(module, nn.Embedding) and module is not embeddings:
            empty = given.new_zeros(1, given.shape[1], module.embedding_dim)
            replaced[module] = lambda *_, empty=empty, **__: empty.clone()
        if isinstance(module, nn.ModuleList) and len(module):
            hooks.append(module[0].register_forward_pre_hook(stop, with_kwargs=True))
    ids = torch.zeros(1, given.shape[1], dtype=torch.long, device=given.device)
    try:
        with _quiet(lm), _forwards(replaced):
            decoder(input_ids=ids)
    except _FirstLayerError as reached:
        return reached.hidden
    except Exception:  # weights that are sharded, or code that is not ours
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return None


@contextlib.contextmanager
def _quiet(lm: nn.Module) -> Iterator[None]:
    """Evaluation mode, without a graph; then the mode of before, module by module."""
    modes = {module: module.training for module in lm.modules()}
    lm.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _forwards(replaced: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """These modules compute as they are told, for a while."""
    own = {module: vars(module).get("forward") for module in replaced}
    for module, forward in replaced.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del vars(module)["forward"]
            else:  # accelerate's, of an offloaded module
                vars(module)["forward"] = forward
