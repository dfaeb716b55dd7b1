"""Token weights of the two distillation terms (Eq. 11-16). All of them are detached.

    B batch   L positions of one side (right-padded)

Weights are normalised per sample, after the gate unless told otherwise, to sum to the sample's
length on that side: they move attention between the tokens of a sample and leave the size of the
term alone (D2). Where only some of a sample's tokens are compared, theirs sum to the same length.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dwakd_plugin.recipe.schema import StudentWeighting


def entropy(log_probs: Tensor) -> Tensor:
    """H(p) in nats, detached: (..., V) → (...)."""
    log_probs = log_probs.detach()
    negative: Tensor = torch.linalg.vecdot(log_probs.exp(), log_probs)
    return -negative


def normalise_per_sample(weights: Tensor, valid: Tensor, lengths: Tensor | None = None) -> Tensor:
    """w · (length / Σ w) per sample: (B, L), valid (B, L) bool → (B, L), 0 where not valid.

    Lengths (B,) are the counts of valid tokens where none are given. Where all weights of a sample
    are 0 they say nothing about its tokens, and each counts the same.
    """
    weights = weights.where(valid, 0.0)
    # By the largest first: weights near the smallest float would overflow count / Σ w.
    peak = weights.max(-1, keepdim=True).values
    weights = torch.where(peak > 0, weights / peak, valid.to(weights.dtype))
    count = valid.sum(-1, keepdim=True) if lengths is None else lengths[:, None]
    total = weights.sum(-1, keepdim=True)
    return weights * (count / total.where(total > 0, 1.0))


def student_token_weights(
    student_entropy: Tensor,
    gate: Tensor,
    valid: Tensor,
    weighting: StudentWeighting,
    lengths: Tensor | None = None,
) -> Tensor:
    """w_s: where the student is unsure, as far as the projected teacher is sure (Eq. 11-13).

        w_s,i ∝ H(p_s,i) · g_i,   g_i = max_v p_t2s,i(v)      both at temperature 1

    `entropy` leaves the gate out, `none` weighs every token the same. `entropy_then_gate`
    multiplies by g_i after H is normalised, as the public research code does (D10): an unsure
    teacher then shrinks the term, where it otherwise only moves weight between tokens.

    Shapes: student_entropy, gate and valid (bool) (B, S), lengths (B,) → (B, S).
    """
    if weighting == "none":
        return normalise_per_sample(valid.to(student_entropy.dtype), valid, lengths)
    weights = student_entropy.detach()
    if weighting == "entropy_gate":
        weights = weights * gate.detach()
    weights = normalise_per_sample(weights, valid, lengths)
    return weights * gate.detach() if weighting == "entropy_then_gate" else weights


def teacher_token_weights(
    teacher_entropy: Tensor,
    vocab_size: int,
    valid: Tensor,
    weighting: Literal["confidence", "none"],
    lengths: Tensor | None = None,
) -> Tensor:
    """w_t,j ∝ 1 − H(p_t,j) / log Vt: where the teacher is sure (Eq. 14).

    Vt counts the rows of the teacher's head, padding rows included, as its softmax does (D9).

    Shapes: teacher_entropy and valid (bool) (B, T), lengths (B,) → (B, T).
    """
    if weighting == "none":
        return normalise_per_sample(valid.to(teacher_entropy.dtype), valid, lengths)
    # Rounding can put the entropy of a uniform distribution a hair above log Vt.
    confidence = (1 - teacher_entropy.detach() / math.log(vocab_size)).clamp_min(0)
    return normalise_per_sample(confidence, valid, lengths)
