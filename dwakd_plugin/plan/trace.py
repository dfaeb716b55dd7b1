"""What a step allocates, found by running it on tensors that have sizes and no content.

The models' and the loss's own code runs under torch's FakeTensorMode, forward and backward, and
every storage is noted as it comes and goes. So a plan follows the architecture, LoRA, gradient
checkpointing, the attention backend and the loss as they are, whatever they come to be.
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

from dwakd_plugin.loss import Head, ResponseStates, dwakd_loss
from dwakd_plugin.models.causal_lm import causal_lm
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.recipe.schema import LossConfig

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


class _Recorder(TorchDispatchMode):
    """Notes the storages that operations make, and when they are released."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.events: list[int] = []
        self._seen: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[id(storage)] = storage  # held on to, and so never released

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = operation(*args, **(kwargs or {}))
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


Prepare = Callable[[int], tuple[list[Tensor], Callable[[], Tensor]]]


def _record(
    prepare: Prepare, started: Callable[[_Recorder], None] = lambda recorder: None
) -> Events:
    """Runs forward, and backward where there is a graph, at two batch sizes.

    `prepare` takes the batch size; it returns the tensors that are there before, and forward.
    `started` hears of each run's recorder.
    """
    for first in FIRST_BATCHES:
        (few, count), (more, count_of_more) = (
            _run(prepare, batch, started) for batch in (first, first + 1)
        )
        if len(few) == len(more) and count == count_of_more:
            each = more - few
            return Events(few - first * each, each, count)
    raise TraceError("the operations depend on the batch size")


def _run(
    prepare: Prepare, batch: int, started: Callable[[_Recorder], None] = lambda recorder: None
) -> tuple[np.ndarray, int]:
    """All events for a batch, and how many of them are forward's."""
    known, forward = prepare(batch)
    with _Recorder(known) as recorder:
        started(recorder)
        result = forward()
        count = len(recorder.events)
        if result.requires_grad:
            result.backward(torch.ones_like(result))
        return np.array(recorder.events[:], dtype=np.float64), count


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
                parameter.register_post_accumulate_grad_hook(_forget_gradient)
        decoder = causal_lm(model).base_model
        recorders: list[_Recorder] = []
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
            events = _record(prepare, recorders.append)
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


def _forget_gradient(parameter: Tensor) -> None:
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


@dataclass(frozen=True)
class LossSizes:
    """What the loss's memory depends on; S and T are response tokens of one sample."""

    S: int
    T: int
    d: int
    D: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype


def trace_loss(sizes: LossSizes, loss: LossConfig) -> Events:
    """What the loss allocates for one sample beside logits and soft-DTW, which grow otherwise."""
    events: Events = _loss_events(_record, sizes, loss, student_rows=2, teacher_rows=2)
    return events


def vocabulary_tensors(
    sizes: LossSizes, loss: LossConfig
) -> tuple[tuple[float, float], tuple[float, float]]:
    """How many float32 tensors of a chunk's logits live at once: of the student's head, forward and
    backward, and of the teacher's.
    """
    tokens, rows = 4, 2**22  # so many rows that nothing else counts
    few = LossSizes(tokens, tokens, 1, 1, sizes.student_dtype, sizes.teacher_dtype)
    counts = []
    for student_rows, teacher_rows in ((rows, 2), (2, rows)):
        events, count = _loss_events(
            lambda prepare: _run(prepare, 1), few, loss, student_rows, teacher_rows
        )
        live = np.cumsum(events) / (4 * tokens * rows)
        peaks = live[:count].max(), live[count:].max()
        counts.append((round(2 * float(peaks[0])) / 2, round(2 * float(peaks[1])) / 2))
    return counts[0], counts[1]


def _loss_events(
    record: Callable[[Prepare], Any],
    sizes: LossSizes,
    loss: LossConfig,
    student_rows: int,
    teacher_rows: int,
) -> Any:
    S, T, d, D = sizes.S, sizes.T, sizes.d, sizes.D
    # Soft-DTW's kernels read their input; its memory is plain arithmetic (see `parts`).
    loss = loss.model_copy(update={"dtw_weight": 0.0, "chunk_size": 8 * max(S, T)})
    with FakeTensorMode(allow_non_fake_inputs=True):
        projectors = Projectors(d, D)
        for parameter in projectors.parameters():
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
        student_head = torch.zeros(student_rows, d, dtype=sizes.student_dtype, requires_grad=True)
        teacher_head = torch.zeros(teacher_rows, D, dtype=sizes.teacher_dtype)
        # The embeddings and the states are the loss's to hold, and not known before.
        known = [*projectors.parameters(), student_head, teacher_head]

        def prepare(batch: int) -> tuple[list[Tensor], Callable[[], Tensor]]:
            def states(length: int, width: int, dtype: torch.dtype, grad: bool) -> list[Tensor]:
                return [
                    torch.zeros(batch, length, width, dtype=dtype, requires_grad=grad and index > 0)
                    for index in range(3)
                ]

            def forward() -> Tensor:
                student = ResponseStates(
                    *states(S, d, sizes.student_dtype, True),
                    lengths=torch.full((batch,), S),
                    head=Head(student_head),
                    labels=torch.zeros(batch, S, dtype=torch.long),
                    index=torch.arange(batch * S),
                )
                teacher = ResponseStates(
                    *states(T, D, sizes.teacher_dtype, False),
                    lengths=torch.full((batch,), T),
                    head=Head(teacher_head),
                    index=torch.arange(batch * T),
                )
                return dwakd_loss(student, teacher, projectors, loss=loss, gamma=1.0).total(loss)

            return known, forward

        return record(prepare)
