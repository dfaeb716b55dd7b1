"""Soft alignment of two tokenizations: cross-model attention and the band derived from it.

    B batch   S, T student and teacher positions (right-padded)   d, D student and teacher width

Equation numbers are those of DWA-KD (arXiv 2602.21669). Padding is masked everywhere, and every
statistic is taken per sample, so that nothing depends on padding or on the rest of the batch (D2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dwakd_plugin.loss.products import in_full_precision, product
from dwakd_plugin.recipe.schema import SoftDTWConfig


def valid_positions(lengths: Tensor, size: int) -> Tensor:
    """Mask (B, size) of the positions before each length (B,)."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def standardise_scale(states: Tensor, valid: Tensor) -> Tensor:
    """N(x) = x / std(x) (Appendix C), the mean left in place.

    The standard deviation is unbiased, over all valid positions and features of one sample (D2).
    Where it is zero (constant or zero states) or undefined (a single number), x passes unscaled.

    Shapes: states (B, L, F), valid (B, L) bool → (B, L, F), zero at padding.
    """
    kept = valid[..., None]
    states = states.where(kept, 0.0)
    count = (valid.sum(-1) * states.shape[-1])[:, None, None]
    mean = states.sum((1, 2), keepdim=True) / count.clamp_min(1)
    # Two passes: the difference of E[x²] and E[x]² would cancel for states with a large mean.
    squares = (states - mean).where(kept, 0.0).square().sum((1, 2), keepdim=True)
    std = (squares / (count - 1).clamp_min(1)).sqrt()
    return states / std.where(std > 0, 1.0)


def _masked_softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the last dimension's valid entries; exactly 0 elsewhere, empty rows included."""
    scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    return torch.where(valid, scores.softmax(-1), 0.0)


def cross_model_attention(
    query: Tensor, key: Tensor, student_valid: Tensor, teacher_valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention between the two tokenizations of one text, in both directions (Eq. 1, 2).

        scores = q kᵀ / sqrt(2D)
        A = softmax(scores)  over teacher positions    (B, S, T)
        B = softmax(scoresᵀ) over student positions    (B, T, S)

    Shapes: query (B, S, 2D), key (B, T, 2D), student_valid (B, S), teacher_valid (B, T).
    Padded rows and columns are exactly 0.
    """
    scores = product(query, key.transpose(1, 2)) / math.sqrt(key.shape[-1])
    valid = student_valid[:, :, None] & teacher_valid[:, None, :]
    attention = _masked_softmax(scores, valid)
    reverse_attention = _masked_softmax(scores.transpose(1, 2), valid.transpose(1, 2))
    return attention, reverse_attention


def attention_entropy(attention: Tensor) -> Tensor:
    """H(A_i) in nats, detached: (B, S, T) → (B, S); 0 at padded rows."""
    summands: Tensor = torch.special.entr(attention.detach())
    return summands.sum(-1)


def attention_spread(attention: Tensor, student_lengths: Tensor) -> Tensor:
    """H of a sample's mean attention in nats, detached: (B, S, T), lengths (B,) → (B,).

    Beside the mean of H(A_i) it tells where rows look from how widely: their difference is the
    mutual information of student and teacher position, 0 where all rows look alike.
    """
    mean = attention.detach().sum(1) / student_lengths.clamp_min(1)[:, None]
    summands: Tensor = torch.special.entr(mean)
    return summands.sum(-1)


def attention_band(
    attention: Tensor, student_lengths: Tensor, teacher_lengths: Tensor, config: SoftDTWConfig
) -> Tensor:
    """Cells (i, j) within reach of where the attention of position i looks (Eq. 21-23).

        center_i = α Σ_j j·A_ij + (1−α)·i·T/S      positions from 1; S, T of the sample
        width_i  = b + β·H(A_i)
        inside   = |j − center_i| ≤ width_i

    Shapes: attention (B, S, T), lengths (B,) → bool (B, S, T), False at padding. Detached: the
    band says where to look and is nothing to optimise.
    """
    attention = attention.detach()
    _, S, T = attention.shape
    rows = torch.arange(1, S + 1, device=attention.device, dtype=attention.dtype)
    columns = torch.arange(1, T + 1, device=attention.device, dtype=attention.dtype)
    slope = teacher_lengths.to(attention.dtype) / student_lengths.clamp_min(1)
    blend = config.band_center_blend
    with in_full_precision():
        looked_at = attention @ columns
    center = blend * looked_at + (1 - blend) * rows * slope[:, None]
    width = config.band_width + config.band_entropy_coef * attention_entropy(attention)
    return _cells_near(center, width, student_lengths, teacher_lengths, T)


def pair_band(
    partner: Tensor,
    student_lengths: Tensor,
    teacher_lengths: Tensor,
    teacher_size: int,
    config: SoftDTWConfig,
) -> Tensor:
    """The band where positions are paired exactly: its centres lie on the pairs.

        center_i = the partner's position; between two pairs on the straight line from one to the
                   next, and from (0, 0) to the first and from the last to (S + 1, T + 1)
        width_i  = b                       a pair leaves nothing open that an entropy could measure

    Shapes: partner (B, S), the teacher's position from 1 and 0 where there is none, ascending;
    lengths (B,) → bool (B, S, teacher_size), False at padding.
    """
    S = partner.shape[1]
    paired = partner > 0
    rows = torch.arange(1, S + 1, device=partner.device).expand_as(partner)
    # The nearest pair at or before each position, and the nearest at or after it.
    row_before = rows.where(paired, 0).cummax(1).values
    before = partner.cummax(1).values
    ends = (student_lengths + 1)[:, None], (teacher_lengths + 1)[:, None]
    row_after, after = (
        values.where(paired, end).flip(1).cummin(1).values.flip(1)
        for values, end in zip((rows, partner), ends, strict=True)
    )
    share = (rows - row_before) / (row_after - row_before).clamp_min(1)
    center = before + share * (after - before)
    width = torch.full_like(center, config.band_width)
    return _cells_near(center, width, student_lengths, teacher_lengths, teacher_size)


def _cells_near(
    center: Tensor, width: Tensor, student_lengths: Tensor, teacher_lengths: Tensor, T: int
) -> Tensor:
    """|j − center_i| ≤ width_i, j from 1: center and width (B, S) → bool (B, S, T)."""
    columns = torch.arange(1, T + 1, device=center.device, dtype=center.dtype)
    near = (columns - center[..., None]).abs() <= width[..., None]
    student_valid = valid_positions(student_lengths, center.shape[1])
    teacher_valid = valid_positions(teacher_lengths, T)
    return near & student_valid[:, :, None] & teacher_valid[:, None, :]


def band_penalty(inside: Tensor, config: SoftDTWConfig, dtype: torch.dtype) -> Tensor:
    """λ_band outside the band and 0 inside, to add to the student × teacher cost.

    The band is soft: no cell is removed. (Padding counts as outside; soft-DTW never reads it.)

    Shapes: inside (B, S, T) bool → (B, S, T).
    """
    return (~inside).to(dtype) * config.band_penalty
