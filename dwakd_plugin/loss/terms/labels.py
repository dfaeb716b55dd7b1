"""The labels' cross-entropy.

ce = Σ_i −log p_s,i(y_i)        over all of the student's tokens with a label

It needs no pass of its own: where another term goes through the student's head, it is read off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dwakd_plugin.loss.head_pass import Kernel
from dwakd_plugin.loss.matches import Match
from dwakd_plugin.loss.record import HeadPasses, Term
from dwakd_plugin.loss.states import required_labels


def label_statistics(
    student_logits: Tensor, other_logits: Tensor, labels: Tensor, targets: Tensor
) -> tuple[Tensor]:
    """−log p_s(y), with nothing beside it: (C, Vs) → (C,)."""
    return (F.cross_entropy(student_logits, labels, reduction="none"),)


LABELS_ALONE = Kernel(label_statistics, 1, alone=True)  # where no other term needs the pass


def _ce(passes: HeadPasses[Match]) -> dict[str, Tensor]:
    return {"ce": passes.student[0].sum()}


def _weights(passes: HeadPasses[Match]) -> tuple[Tensor]:
    labels = required_labels(passes.batch.student)
    return (torch.ones_like(labels, dtype=passes.batch.dtype),)


LABELS = Term("ce", "labels", _ce, per="student_tokens", weights=_weights, needs_states=False)
