"""Where a NaN comes from: which weight, or which term of which row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dwakd_plugin.loss import LossTerms, ResponseStates, names_of
from dwakd_plugin.train.distillation import PROJECTORS


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the message names the term and the row."""


def non_finite_row(
    student: ResponseStates,
    teacher: ResponseStates | None,
    terms_of: Callable[[ResponseStates, ResponseStates | None], LossTerms],
    place_of: Callable[[int], str],
    decode: Callable[[Tensor], Any],
) -> str:
    """Term, place and text of the first sample of a batch whose loss, by itself, is not finite."""
    for index in range(len(student.lengths)):
        own = None if teacher is None else teacher.sample(index)
        terms = terms_of(student.sample(index), own)
        bad = [
            f"{name} = {getattr(terms, name).item()}"
            for name in names_of()
            if not torch.isfinite(getattr(terms, name))
        ]
        if bad:
            assert student.labels is not None
            labels = student.labels[index]
            text = decode(labels[labels != -100][:200])
            whose = "" if own is None else _non_finite_states(own)
            return f"{', '.join(bad)} in {place_of(index)}: {text!r}{whose}"
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
