"""The rivals, written plainly after the habits of published research code.

Soft-DTW: one sample at a time, a table R of the printed recursion with exp and log in every cell,
kept for a backward that reads it again. The objective: logits of all tokens at once, each
probability and log-probability a tensor of its own, autograd for everything, DTW in a loop over
samples. The equations are those of `dwakd_plugin.loss`, and so are the values: the benchmarks
assert it.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd_plugin.loss import ResponseStates
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig


@numba.njit(cache=True)
def _table(cost: Any, gamma: float) -> Any:
    n, m = cost.shape
    r = np.full((n + 2, m + 2), np.inf)
    r[0, 0] = 0.0
    for j in range(1, m + 1):
        for i in range(1, n + 1):
            diagonal = -r[i - 1, j - 1] / gamma
            above = -r[i - 1, j] / gamma
            left = -r[i, j - 1] / gamma
            largest = max(max(diagonal, above), left)
            total = np.exp(diagonal - largest) + np.exp(above - largest) + np.exp(left - largest)
            r[i, j] = cost[i - 1, j - 1] - gamma * (np.log(total) + largest)
    return r


@numba.njit(cache=True)
def _alignment(cost: Any, r: Any, gamma: float) -> Any:
    n, m = cost.shape
    padded = np.zeros((n + 2, m + 2))
    padded[1 : n + 1, 1 : m + 1] = cost
    r[:, m + 1] = -np.inf
    r[n + 1, :] = -np.inf
    r[n + 1, m + 1] = r[n, m]
    e = np.zeros((n + 2, m + 2))
    e[n + 1, m + 1] = 1.0
    for j in range(m, 0, -1):
        for i in range(n, 0, -1):
            down = np.exp((r[i + 1, j] - r[i, j] - padded[i + 1, j]) / gamma)
            right = np.exp((r[i, j + 1] - r[i, j] - padded[i, j + 1]) / gamma)
            diagonal = np.exp((r[i + 1, j + 1] - r[i, j] - padded[i + 1, j + 1]) / gamma)
            e[i, j] = e[i + 1, j] * down + e[i, j + 1] * right + e[i + 1, j + 1] * diagonal
    return e[1 : n + 1, 1 : m + 1]


class _SoftDTW(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float) -> Tensor:
        r = torch.from_numpy(_table(cost.detach().numpy(), gamma)).to(cost.dtype)
        ctx.save_for_backward(cost, r)
        ctx.gamma = gamma
        return r[-2, -2].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cost, r = ctx.saved_tensors
        # A copy: the sentinels that backward writes would spoil a second one.
        expected = _alignment(cost.detach().numpy(), r.numpy().copy(), ctx.gamma)
        return grad * torch.from_numpy(expected).to(cost.dtype), None


def soft_dtw(
    cost: Tensor, student_lengths: Tensor, teacher_lengths: Tensor, gamma: float
) -> Tensor:
    """Soft-DTW of each sample, (B, S, T) → (B,)."""
    lengths = zip(student_lengths.tolist(), teacher_lengths.tolist(), strict=True)
    return torch.stack(
        [_SoftDTW.apply(one[:n, :m], gamma) for one, (n, m) in zip(cost, lengths, strict=True)]
    )


def objective(
    student: ResponseStates,
    teacher: ResponseStates,
    projectors: Projectors,
    loss: LossConfig,
    config: SoftDTWConfig,
    *,
    broadcast_cosine: bool = False,
) -> dict[str, Tensor]:
    """The six terms of `dwakd_plugin.loss.LossTerms`, for samples without padding.

    `broadcast_cosine` forms costs by `F.cosine_similarity` over (S, T, F), as published code does,
    instead of by a product of unit vectors: a hundred times slower.
    """
    assert student.labels is not None
    student_head, teacher_head = student.head.weight, teacher.head.weight
    read = torch.cat([student.input_embeds, student.target_embeds], -1).detach()
    key = torch.cat([teacher.input_embeds, teacher.target_embeds], -1)
    key = key / key.std((1, 2), keepdim=True)
    target_embeds = teacher.target_embeds / teacher.target_embeds.std((1, 2), keepdim=True)
    hidden = teacher.hidden / teacher.hidden.std((1, 2), keepdim=True)
    scores = projectors.query(read) @ key.transpose(1, 2) / math.sqrt(key.shape[-1])
    attention = scores.softmax(-1)
    t2s_hidden = attention @ projectors.t2s(target_embeds + hidden)
    s2t_hidden = scores.transpose(1, 2).softmax(-1) @ projectors.s2t(student.hidden)

    student_logits = F.linear(student.hidden, student_head)
    t2s_logits = F.linear(t2s_hidden, student_head.detach())
    with torch.no_grad():
        teacher_logits = F.linear(teacher.hidden, teacher_head)
    s2t_logits = F.linear(s2t_hidden, teacher_head)

    with torch.no_grad():
        gate = t2s_logits.softmax(-1).max(-1).values
        student_weight = _entropy(student_logits) * gate
        student_weight *= student_weight.shape[1] / student_weight.sum(1, keepdim=True)
        teacher_weight = 1 - _entropy(teacher_logits) / math.log(teacher_head.shape[0])
        teacher_weight *= teacher_weight.shape[1] / teacher_weight.sum(1, keepdim=True)
    student_kd = student_weight * _kl(t2s_logits.detach(), student_logits, loss.temperature)
    teacher_kd = teacher_weight * _kl(teacher_logits, s2t_logits, loss.temperature)

    penalty = _penalty(attention.detach(), config)
    t2s_states, t2s_embeds = (
        projectors.t2s(teacher.hidden),
        projectors.embed_t2s(teacher.target_embeds),
    )
    dtw = [torch.zeros(()), torch.zeros(())]
    for b in range(len(attention)):
        pairs = [(student.hidden[b], t2s_states[b]), (student.target_embeds[b], t2s_embeds[b])]
        for which, (x, y) in enumerate(pairs):
            across = _cosine_cost(x, y, broadcast_cosine) + penalty[b]
            own = [_cosine_cost(states, states, broadcast_cosine) for states in (x, y)]
            distances = [_SoftDTW.apply(cost, config.gamma_start) for cost in (across, *own)]
            dtw[which] = dtw[which] + distances[0] - 0.5 * (distances[1] + distances[2])
    labels = student.labels.flatten()
    return {
        "ce": F.cross_entropy(student_logits.flatten(0, 1), labels, reduction="sum"),
        "t2s_ce": F.cross_entropy(t2s_logits.flatten(0, 1), labels, reduction="sum"),
        "student_kd": student_kd.sum(),
        "teacher_kd": teacher_kd.sum(),
        "hidden_dtw": dtw[0],
        "embed_dtw": dtw[1],
    }


def _entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def _kl(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """KL(target ‖ logits) per token, of logits."""
    probs = (target / temperature).softmax(-1)
    log_probs = (target / temperature).log_softmax(-1)
    return (probs * (log_probs - (logits / temperature).log_softmax(-1))).sum(-1)


def _penalty(attention: Tensor, config: SoftDTWConfig) -> Tensor:
    _, S, T = attention.shape
    rows, columns = torch.arange(1.0, S + 1), torch.arange(1.0, T + 1)
    blend = config.band_center_blend
    center = blend * (attention @ columns) + (1 - blend) * rows * T / S
    entropy = torch.special.entr(attention).sum(-1)
    width = config.band_width + config.band_entropy_coef * entropy
    outside = (columns - center[..., None]).abs() > width[..., None]
    return config.band_penalty * outside.float()


def _cosine_cost(x: Tensor, y: Tensor, broadcast: bool) -> Tensor:
    if broadcast:
        return 1 - F.cosine_similarity(x[:, None], y[None], dim=-1)
    return 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T
