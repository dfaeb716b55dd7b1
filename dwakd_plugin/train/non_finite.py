"""Where a NaN comes from: which weight, or which term of which row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from dwakd_plugin.data.collator import TAUGHT_BY, split_batch
from dwakd_plugin.data.dual_tokenization import SOURCE_COLUMN
from dwakd_plugin.loss import ResponseStates, names_of
from dwakd_plugin.models.student import student_states
from dwakd_plugin.train.distillation import PROJECTORS, Distillation
from dwakd_plugin.train.parts import Part, Sides, sides_of


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the message names the term and the row."""


class LossWatch(TrainerCallback):
    """Ends a run whose loss is not finite, before the weights take a step by it.

    Reading a loss at once would keep the device idle until it is told what comes next. Each is read
    when the backward passes of its optimizer step have been asked for: they run while we wait for
    the forward passes. The batches stay for as long, to say which row it was; in an evaluation,
    until the next one's is read.

    at_once: whether weights change within the backward pass (`steps_in_backward`).
    """

    def __init__(self, explain: Callable[[dict[str, Any]], str], *, at_once: bool) -> None:
        self._explain, self._at_once = explain, at_once
        self._unread: list[tuple[Tensor, torch.cuda.Event | None, dict[str, Any]]] = []

    def hear(self, loss: Tensor, inputs: dict[str, Any], *, training: bool) -> None:
        """Keeps the loss () of a micro-batch for `look`."""
        if not training:
            self.look()
        finite, copied = loss.detach().isfinite(), None
        if finite.is_cuda:
            finite, copied = finite.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._unread.append((finite, copied, inputs))
        if self._at_once:
            self.look()

    def look(self) -> None:
        """Raises NonFiniteLoss for the first micro-batch whose loss is not finite."""
        unread, self._unread = self._unread, []
        for finite, copied, inputs in unread:
            if copied is not None:
                copied.synchronize()
            if not finite:
                raise NonFiniteLoss(self._explain(inputs))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.look()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.look()


def steps_in_backward(trainer: Any) -> bool:
    """Whether weights change within the backward pass, as DeepSpeed has it, and some optimizers."""
    optimizer = str(trainer.args.optim)
    return trainer.is_deepspeed_enabled or "lomo" in optimizer or "layerwise" in optimizer


@torch.no_grad()
def explain_non_finite(
    inputs: dict[str, Any],
    student: nn.Module,
    distillation: Distillation,
    parts_of: Callable[[list[Sides], list[list[int]] | None], list[Part]],
    decode: Callable[[Tensor], Any],
    *,
    sharded: bool,
) -> str:
    """Which weight, or which term of which row of a collated batch, is not finite.

    A rank that holds a part of the student cannot compute alone: it names all rows.
    """
    rows = distillation.rows
    if sharded:
        return "one of " + ", ".join(map(rows.locate, inputs[SOURCE_COLUMN].tolist()))
    if (parameter := non_finite_parameter(student)) is not None:
        return f"{parameter} is not finite: the last step made it so, or it was loaded so"
    batch, own = split_batch(inputs)
    states = student_states(student, batch, **own)
    sides, taught_by = sides_of(distillation, batch, states), batch.get(TAUGHT_BY)
    for index, source in enumerate(batch[SOURCE_COLUMN].tolist()):
        sample = [(one.sample(index), other and other.sample(index)) for one, other in sides]
        bad = [
            f"{part.whose}{name} = {getattr(part.terms, name).item()}"
            for part in parts_of(sample, taught_by and [taught_by[index]])
            for name in names_of()
            if not torch.isfinite(getattr(part.terms, name))
        ]
        if bad:
            place = rows.locate(source) if source >= 0 else f"row {index}"
            assert states.labels is not None
            labels = states.labels[index]
            text = decode(labels[labels != -100][:200])
            whose = "".join(_non_finite_states(other) for _, other in sample if other is not None)
            return f"{', '.join(bad)} in {place}: {text!r}{whose}"
    return "no single row by itself"


def non_finite_parameter(student: nn.Module) -> str | None:
    """The name of the first weight, projectors included, that has NaN or infinity on this rank."""
    for name, parameter in student.named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # Quantised weights do not train, and packed ones read as floats may be anything.
        if type(parameter).__module__.startswith("bitsandbytes") or own.dtype.itemsize == 1:
            continue
        if own.is_floating_point() and not own.isfinite().all():
            whose = "The projectors'" if f"{PROJECTORS}." in name else "The student's"
            return f"{whose} {name.removeprefix(f'{PROJECTORS}.')}"
    return None


def _non_finite_states(teacher: ResponseStates) -> str:
    """Says so where it is the teacher's side of a row that is not finite; else nothing."""
    length = int(teacher.lengths[0])  # padding may hold anything
    names = {
        "hidden states": teacher.hidden[0, :length],
        "embeddings": teacher.input_embeds[0, :length],
        "head": teacher.head.weight,
    }
    bad = [name for name, tensor in names.items() if not tensor.isfinite().all()]
    if not bad:
        return ""
    return f"\nThe teacher's {' and '.join(bad)} are not finite there: check its weights."


def how_to_go_on(output_dir: str) -> str:
    checkpoints = any(Path(output_dir).glob("checkpoint-*"))
    kept = f"Checkpoints are kept in {output_dir}." if checkpoints else ""
    return (
        f"Training stops here. {kept} Lower learning_rate or dwakd.projectors.learning_rate, "
        "set max_grad_norm, or remove the row; then resume from the last checkpoint."
    )
