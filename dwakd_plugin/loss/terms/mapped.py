"""The teacher's own probabilities, summed by the student's tokens.

    p_map,i(s) = Σ_{v: token_map(v) = s} p_t,j(v) / Σ_{v: token_map(v) ≥ 0} p_t,j(v)
    student_kd = Σ w_i D(p_map,i ‖ p_s,i) over pairs (i, j) + Σ −log p_s,i(y_i) over the rest

The weights of a sample's pairs sum to their number, so that each token weighs as much as any other:
where the teacher says nothing, the label stands in for it. With the labels left to λ_CE alone,
tokens that only one tokenizer cuts off would be taught less, and unlearnt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.divergence import DIVERGENCES, log_softmax, nll, softmax
from dwakd_plugin.loss.head_pass import Kernel
from dwakd_plugin.loss.matches import Match
from dwakd_plugin.loss.record import HeadPasses, Term
from dwakd_plugin.loss.terms.student_space import PAIRED, StudentStatistics, paired_sums
from dwakd_plugin.loss.terms.teacher_space import TEACHER
from dwakd_plugin.loss.token_weights import entropy, student_token_weights
from dwakd_plugin.recipe.schema import Divergence


def mapped_statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    token_map: Tensor,
    divergence: Divergence,
    temperature: float,
) -> StudentStatistics:
    """`student_statistics` with p_map for p_t2s, a constant: its `t2s_ce` takes no gradient.

    Shapes: student_logits (C, Vs), teacher_logits (C, Vt), token_map (Vt,) with −1 for a token that
    the student has no word for, labels and targets (C,).
    """
    own = student_logits.log_softmax(-1)
    with torch.no_grad():
        theirs = _mapped_log_probs(teacher_logits, token_map, own, 1.0)
        best = theirs.max(-1)
        target = (
            theirs
            if temperature == 1
            else _mapped_log_probs(teacher_logits, token_map, own, temperature)
        )
        student_entropy = entropy(own)
    softened = own if temperature == 1 else log_softmax(student_logits, temperature)
    return StudentStatistics(
        nll(own, labels),
        nll(theirs, targets),
        DIVERGENCES[divergence](target, softened),
        student_entropy,
        best.values.exp(),
        best.indices == targets,
    )


def _mapped_log_probs(
    teacher_logits: Tensor, token_map: Tensor, like: Tensor, temperature: float
) -> Tensor:
    """log Σ_{v: token_map(v) = s} p_t(v), over what has a student's token: (C, Vs).

    A token that no teacher's token is mapped to has the smallest probability that there is.
    """
    known = token_map >= 0
    probabilities = softmax(teacher_logits.to(like.dtype), temperature)[:, known]
    # Rows are tokens here, so that each of the teacher's is one addition of a whole row.
    summed = like.new_zeros(like.shape[1], like.shape[0])
    summed = summed.index_add_(0, token_map[known], probabilities.T).T
    smallest = torch.finfo(like.dtype).tiny
    return (summed / summed.sum(-1, keepdim=True).clamp_min(smallest)).clamp_min(smallest).log()


def _kernel(batch: Batch) -> Kernel:
    settings = {
        "token_map": batch.teacher.token_map,
        "divergence": batch.loss.divergence,
        "temperature": batch.loss.temperature,
    }
    return Kernel(mapped_statistics, 3, settings)


def _student_kd(passes: HeadPasses[Match]) -> dict[str, Tensor]:
    tokens, compared = StudentStatistics(*passes.student), passes.match.compared
    side, weighting = passes.batch.student_side, passes.batch.loss.student_weighting
    weights = student_token_weights(
        tokens.entropy, tokens.gate, compared, weighting, compared.sum(1)
    )
    taught = (weights * tokens.divergence.where(compared, 0.0)).sum()
    at_end = compared & side.last
    return paired_sums(tokens, compared, at_end) | {
        "student_kd": taught + tokens.ce.where(side.valid & ~compared, 0.0).sum(),
        "teacher_ce": tokens.t2s_ce.where(compared, 0.0).sum(),
        "teacher_end_ce": tokens.t2s_ce.where(at_end, 0.0).sum(),
    }


MAPPED = Term(
    "student_kd", "teach", _student_kd, kernel=_kernel, figures=(*PAIRED, *TEACHER), ramps=True
)
