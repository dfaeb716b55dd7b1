"""Universal Logit Distillation: probabilities compared by rank (ULD, arXiv 2402.12030).

    uld = Σ_i Σ_r |p_s,i(r) − p_t,i(r)|     r ranks both models' probabilities, at temperature τ

Over pairs of positions, which weigh alike and sum to the sample's length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.divergence import softmax
from dwakd_plugin.loss.head_pass import Kernel
from dwakd_plugin.loss.matches import Match
from dwakd_plugin.loss.record import HeadPasses, Term
from dwakd_plugin.loss.terms.student_space import PAIRED
from dwakd_plugin.loss.token_weights import normalise_per_sample


def sorted_distance(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Σ_r |p_s(r) − p_t(r)| over ranks r, both sorted from the largest.

    The smaller vocabulary is filled up with zeros. Between 0 and 2; the gradient reaches
    student_logits only.

    Shapes: (C, Vs) and (C, Vt) → (C,).
    """
    student = softmax(student_logits, temperature).sort(dim=-1, descending=True).values
    teacher = softmax(teacher_logits.detach(), temperature).sort(dim=-1, descending=True).values
    common = min(student.shape[-1], teacher.shape[-1])
    distance = (student[:, :common] - teacher[:, :common]).abs().sum(-1)
    # What one side has more of stands against zeros.
    return distance + student[:, common:].sum(-1) + teacher[:, common:].sum(-1)


def _statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return (
        F.cross_entropy(student_logits, labels, reduction="none"),
        sorted_distance(student_logits, teacher_logits, temperature),
    )


def _kernel(batch: Batch) -> Kernel:
    return Kernel(_statistics, 2, {"temperature": batch.loss.temperature})


def _weights(passes: HeadPasses[Match]) -> tuple[Tensor, Tensor]:
    compared, batch = passes.match.compared, passes.batch
    alike = compared.to(batch.dtype)
    weights = normalise_per_sample(alike, compared, batch.student_side.lengths)
    return torch.zeros_like(weights), weights


def _uld(passes: HeadPasses[Match]) -> dict[str, Tensor]:
    _, distance = passes.student
    compared = passes.match.compared
    return {
        "uld": (_weights(passes)[1] * distance.where(compared, 0.0)).sum(),
        "paired_tokens": compared.sum(),
    }


SORTED = Term("uld", "teach", _uld, kernel=_kernel, weights=_weights, figures=PAIRED[:1])
