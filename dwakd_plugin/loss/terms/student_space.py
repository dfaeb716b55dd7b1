"""Distillation in the student's space: the projected teacher teaches the student (Eq. 3-6, 11-16).

    student_kd = Σ_i w_s,i D(p_t2s,i ‖ p_s,i)       p_t2s = softmax(h_t2s Wsᵀ), a constant here
    t2s_ce     = Σ_i −log p_t2s,i(target_i)         trains the projectors, Ws being a constant
    w_s,i      ∝ H(p_s,i) · max_v p_t2s,i(v)        constants

D at temperature τ on both sides, without a factor τ² (D4); the rest at temperature 1. Over compared
positions, whose weights sum to the sample's length, as do those of `t2s_ce`; with pairs of tokens D
only where the argmax of p_t2s is the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.divergence import (
    DIVERGENCES,
    log_softmax,
    nll,
    nll_gradient,
    softmax,
)
from dwakd_plugin.loss.head_pass import Kernel
from dwakd_plugin.loss.matches import Figure, Projecting
from dwakd_plugin.loss.record import HeadPasses, Term
from dwakd_plugin.loss.token_weights import entropy, normalise_per_sample, student_token_weights
from dwakd_plugin.recipe.schema import Divergence

# Over the tokens that have something of the teacher's to learn from: how many there are, where the
# teacher's argmax is the target, how sure it is, and what the same text costs the student.
PAIRED = (
    Figure("paired_share", "paired_tokens", "distilled_tokens"),
    Figure("t2s_accuracy", "t2s_correct", "paired_tokens"),
    Figure("gate", "gate", "paired_tokens"),
    Figure("paired_ce", "paired_ce", "paired_tokens"),
    # Of the last position of each sample, which as a rule says where a response ends.
    Figure("end_ce", "end_ce", "end_tokens", logged=False),
)


class StudentStatistics(NamedTuple):
    """Per student token, each (N,): the first three carry gradients, the others are detached."""

    ce: Tensor  # −log p_s(y)
    t2s_ce: Tensor  # −log p_t2s(target)
    divergence: Tensor  # D(p_t2s ‖ p_s) at temperature τ
    entropy: Tensor  # H(p_s)
    gate: Tensor  # max_v p_t2s(v)
    t2s_correct: Tensor  # argmax p_t2s = target


def student_statistics(
    student_logits: Tensor,
    t2s_logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    divergence: Divergence,
    temperature: float,
) -> StudentStatistics:
    """What the student-space terms need of each token.

    Shapes: student_logits and t2s_logits (C, Vs), labels of the student's cross-entropy and targets
    of the projected teacher's (C,).
    """
    student_log_probs = student_logits.log_softmax(-1)
    ce, student_entropy = nll(student_log_probs, labels), entropy(student_log_probs)
    t2s_log_probs = t2s_logits.log_softmax(-1)
    t2s_ce, best = nll(t2s_log_probs, targets), t2s_log_probs.max(-1)
    if temperature != 1:
        del student_log_probs, t2s_log_probs  # before others of their size are made
        student_log_probs = log_softmax(student_logits, temperature)
        t2s_log_probs = log_softmax(t2s_logits, temperature)
    value = DIVERGENCES[divergence](t2s_log_probs, student_log_probs)
    return StudentStatistics(
        ce, t2s_ce, value, student_entropy, best.values.exp(), best.indices == targets
    )


def student_gradients(
    student_logits: Tensor,
    t2s_logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    ce_grad: Tensor,
    t2s_ce_grad: Tensor,
    divergence_grad: Tensor,
    divergence: Divergence,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `student_statistics` in student_logits and t2s_logits.

    The target p_t2s is detached in the divergence: cross-entropy alone trains it. Written down
    where it matters, this takes a third of autograd's passes over the logits and half its memory.

    Shapes: as above, gradients of the first three statistics (C,) → (C, Vs) each.
    """
    student_grad = nll_gradient(student_logits, labels, ce_grad)
    if divergence == "forward_kl":  # (p_s − p_t2s) / τ at temperature τ
        scale = divergence_grad[:, None] / temperature
        student_grad.addcmul_(softmax(student_logits, temperature), scale)
        student_grad.addcmul_(softmax(t2s_logits, temperature), scale, value=-1)
    else:
        target = log_softmax(t2s_logits, temperature)
        with torch.enable_grad():
            leaf = student_logits.detach().requires_grad_()
            value = DIVERGENCES[divergence](target, log_softmax(leaf, temperature))
        student_grad += torch.autograd.grad(value, leaf, divergence_grad)[0]
        del target, value
    return student_grad, nll_gradient(t2s_logits, targets, t2s_ce_grad)


def compiled_statistics(
    student_logits: Tensor,
    t2s_logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    temperature: float,
) -> StudentStatistics:
    """`student_statistics` on the CPU, with forward KL."""
    from dwakd_plugin.loss.terms import dual_space_cpu  # numba, which a GPU has no need of

    return StudentStatistics(
        *dual_space_cpu.student_statistics(student_logits, t2s_logits, labels, targets, temperature)
    )


def compiled_gradients(
    student_logits: Tensor,
    t2s_logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    ce_grad: Tensor,
    t2s_ce_grad: Tensor,
    divergence_grad: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`student_gradients` on the CPU, with forward KL, in the place of both logits."""
    from dwakd_plugin.loss.terms import dual_space_cpu

    grads = ce_grad, t2s_ce_grad, divergence_grad
    dual_space_cpu.student_gradients_(
        student_logits, t2s_logits, labels, targets, *grads, temperature
    )
    return student_logits, t2s_logits


def _kernel(batch: Batch) -> Kernel:
    settings = {"divergence": batch.loss.divergence, "temperature": batch.loss.temperature}
    # A soft cap's gradient needs the logits, which the compiled gradients take the place of.
    plain = batch.loss.divergence == "forward_kl" and batch.student.head.softcap is None
    if plain and batch.compiled:
        temperature = {"temperature": batch.loss.temperature}
        return Kernel(compiled_statistics, 3, temperature, compiled_gradients)
    return Kernel(student_statistics, 3, settings, student_gradients)


def paired_sums(tokens: StudentStatistics, compared: Tensor, at_end: Tensor) -> dict[str, Tensor]:
    """The sums of `PAIRED`, of what is compared (B, S) and the ends of samples in it."""
    return {
        "paired_tokens": compared.sum(),
        "t2s_correct": (tokens.t2s_correct & compared).sum(),
        "gate": tokens.gate.where(compared, 0.0).sum(),
        "paired_ce": tokens.ce.detach().where(compared, 0.0).sum(),
        "end_ce": tokens.ce.detach().where(at_end, 0.0).sum(),
        "end_tokens": at_end.sum(),
    }


def _student_kd(passes: HeadPasses[Projecting]) -> dict[str, Tensor]:
    batch, match, tokens = passes.batch, passes.match, StudentStatistics(*passes.student)
    taught = match.compared & tokens.t2s_correct if match.agreeing_only else match.compared
    lengths, weighting = batch.student_side.lengths, batch.loss.student_weighting
    weights = student_token_weights(tokens.entropy, tokens.gate, taught, weighting, lengths)
    taught_sum = (weights * tokens.divergence.where(taught, 0.0)).sum()
    return {"student_kd": taught_sum} | paired_sums(tokens, match.compared, match.ends[0])


def _t2s_ce(passes: HeadPasses[Projecting]) -> dict[str, Tensor]:
    ce, compared = StudentStatistics(*passes.student).t2s_ce, passes.match.compared
    lengths = passes.batch.student_side.lengths
    alike = normalise_per_sample(compared.to(ce.dtype), compared, lengths)
    return {"t2s_ce": (alike * ce.where(compared, 0.0)).sum()}


STUDENT_SPACE = Term("student_kd", "teach", _student_kd, kernel=_kernel, figures=PAIRED, ramps=True)
T2S_LABELS = Term("t2s_ce", "projector", _t2s_ce, kernel=_kernel, trains=frozenset({"t2s"}))
