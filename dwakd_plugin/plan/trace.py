"""What a step allocates, found by running it on tensors that have sizes and no content.

The models' own code runs under torch's FakeTensorMode, forward and backward, and every storage is
noted as it comes and goes. So a plan follows the architecture, LoRA, gradient checkpointing and the
attention backend as they are, whatever they come to be. `loss_trace` has the loss's.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dwakd_plugin.loss.linear import ONEDNN
from dwakd_plugin.models.causal_lm import causal_lm

# Two batch sizes are traced, this and one more, and others are on the line through these. The next
# is tried where torch chooses other operations for the two.
FIRST_BATCHES = (2, 4, 1)


@dataclass(frozen=True)
class Events:
    """Storages as they came (+bytes) and went (−bytes): bytes = fixed + batch · each.

    What does not grow with the batch are the gradients of weights.
    """

    fixed: np.ndarray
    each: np.ndarray
    forward: int  # so many events are forward's, the others backward's

    def at(self, batch: int) -> tuple[float, float, float]:
        """What `batch` samples hold after forward, and the peaks of forward and of backward."""
        course = np.cumsum([0, *(self.fixed + batch * self.each)])
        end = self.forward
        return float(course[end]), float(course[: end + 1].max()), float(course[end:].max())


class Recorder(TorchDispatchMode):
    """Notes the storages that operations make, and when they are released."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.events: list[int] = []
        self.multiplications = 0  # of products of two matrices
        self._seen: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[id(storage)] = storage  # held on to, and so never released

    def most(self) -> int:
        """Bytes of all that was noted and not yet released, at most."""
        return int(np.cumsum([0, *self.events]).max())

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = operation(*args, **(kwargs or {}))
        if operation.overloadpacket in _PRODUCTS:
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        elif operation.name() == ONEDNN:
            self.multiplications += args[0].numel() * args[1].shape[0]
        tree_map_only(Tensor, self._note, results)
        return results

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def released(_: Any) -> None:
            self.events.append(-size)
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, released)
        self.events.append(size)


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)

Prepare = Callable[[int], tuple[list[Tensor], Callable[[], Tensor]]]


def record(prepare: Prepare, started: Callable[[Recorder], None] = lambda recorder: None) -> Events:
    """Runs forward, and backward where there is a graph, at two batch sizes.

    `prepare` takes the batch size; it returns the tensors that are there before, and forward.
    `started` hears of each run's recorder.
    """
    for first in FIRST_BATCHES:
        (few, count, _), (more, count_of_more, _) = (
            run(prepare, batch, started) for batch in (first, first + 1)
        )
        if len(few) == len(more) and count == count_of_more:
            each = more - few
            return Events(few - first * each, each, count)
    raise TraceError("the operations depend on the batch size")


def run(
    prepare: Prepare, batch: int, started: Callable[[Recorder], None] = lambda recorder: None
) -> tuple[np.ndarray, int, int]:
    """All events for a batch, how many of them are forward's, and the products' multiplications."""
    known, forward = prepare(batch)
    with Recorder(known) as recorder:
        started(recorder)
        result = forward()
        count = len(recorder.events)
        if result.requires_grad:
            result.backward(torch.ones_like(result))
        return np.array(recorder.events[:], dtype=np.float64), count, recorder.multiplications


class TraceError(Exception):
    """The code cannot be followed without values."""


LAYERS = 2  # traced; the others are like the last


@dataclass(frozen=True)
class BodyTrace:
    """A model's body (no head) for samples of so many tokens."""

    events: Events
    ends: tuple[int, ...]  # how many events each traced layer had seen at its end
    layers: int

    def at(self, batch: int) -> tuple[float, float, float]:
        """What forward leaves for backward, forward's peak, and what backward needs beside that.

        The gradients of weights count while they are made, one by one, and not after.
        """
        held, peak, backward = self.events.at(batch)
        before, after = (replace(self.events, forward=end).at(batch)[0] for end in self.ends)
        more = (after - before) * (self.layers - LAYERS)
        return held + more, peak + more, backward - held


def trace_body(
    build: Callable[[Any], nn.Module],
    config: Any,
    length: int,
    *,
    training: bool,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
) -> BodyTrace:
    """Traces the body of what `build` makes of a shortened copy of `config` (transformers); it may
    be on the meta device. Rows are full, and an attention mask is there, as where one row is not.

    training: with a graph and a backward pass; else without. autocast: mixed precision, if any.
    Raises TraceError where the architecture's code needs values.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    try:
        events, ends = _trace(build, config, length, training, checkpointing, autocast)
    except TraceError:
        raise
    except Exception as error:  # what models of all kinds do with tensors that hold nothing
        raise TraceError(f"{type(error).__name__}: {error}") from error
    return BodyTrace(events, ends, layers)


def _trace(
    build: Callable[[Any], nn.Module],
    config: Any,
    length: int,
    training: bool,
    checkpointing: bool,
    autocast: torch.dtype | None,
) -> tuple[Events, tuple[int, ...]]:
    model = build(_shortened(config, LAYERS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        model.train(training)
        if checkpointing:
            causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():  # their gradients are counted elsewhere
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(forget_gradient)
        decoder = causal_lm(model).base_model
        recorders: list[Recorder] = []
        ends: list[int] = []
        for layer in _layers(decoder):
            layer.register_forward_hook(lambda *_: ends.append(len(recorders[-1].events)))

        def prepare(batch: int) -> tuple[list[Tensor], Callable[[], Tensor]]:
            ids = torch.zeros(batch, length, dtype=torch.long)
            mask = torch.ones(batch, length, dtype=torch.long)

            def forward() -> Tensor:
                ends.clear()
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    output = decoder(input_ids=ids, attention_mask=mask, use_cache=False)
                states: Tensor = output.last_hidden_state
                return states

            return [*model.parameters(), *model.buffers(), ids, mask], forward

        with torch.set_grad_enabled(training):
            events = record(prepare, recorders.append)
    # Checkpointed layers run again in backward.
    return events, tuple(ends[:LAYERS])


def _layers(decoder: nn.Module) -> nn.ModuleList:
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == LAYERS:
            return module
    raise TraceError(f"{type(decoder).__name__} has no list of layers")


def _make_fake(model: nn.Module) -> None:
    """Puts fake tensors on the CPU in the place of the model's own, shared ones staying shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                tensors[name] = made[id(tensor)]  # type: ignore[index]


def forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _shortened(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    text.vocab_size = 64  # the embeddings' gradient is counted elsewhere
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[:layers])
    return config
