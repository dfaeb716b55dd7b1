"""The loss written plainly: one sample at a time, no padding, no chunks, probabilities."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dwakd_plugin.loss import Head
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig
from tests.loss.cases import TERMS, Case, Sample


def reference_divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * torch.log(a / b)).sum()

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "skewed_forward_kl":
        return kl(p, 0.1 * p + 0.9 * q)
    if name == "skewed_reverse_kl":
        return kl(q, 0.9 * p + 0.1 * q)
    if name == "js":
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    assert name == "adaptive_kl"
    # The tail: the least likely tokens, as many as fit into half of the mass.
    mass = head_gap = tail_gap = 0.0
    for v in sorted(range(len(p)), key=lambda v: float(p[v])):
        mass += float(p[v])
        gap = abs(float(p[v]) - float(q[v].detach()))
        if mass <= 0.5:
            tail_gap += gap
        else:
            head_gap += gap
    return (head_gap * kl(p, q) + tail_gap * kl(q, p)) / (head_gap + tail_gap)


def reference_soft_dtw(x: Tensor, y: Tensor, gamma: float, penalty: Tensor | None = None) -> Tensor:
    infinity = x.new_tensor(math.inf)
    R = {(0, 0): x.new_zeros(())}
    for i, j in itertools.product(range(1, len(x) + 1), range(1, len(y) + 1)):
        cost = 1 - torch.nn.functional.cosine_similarity(x[i - 1], y[j - 1], dim=0)
        if penalty is not None:
            cost = cost + penalty[i - 1, j - 1]
        before = torch.stack([R.get(c, infinity) for c in ((i - 1, j - 1), (i - 1, j), (i, j - 1))])
        before = before[before.isfinite()]
        R[i, j] = cost - gamma * torch.logsumexp(-before / gamma, 0)
    return R[len(x), len(y)]


def reference_terms(
    student: Sample,
    teacher: Sample,
    case: Case,
    loss: LossConfig,
    soft_dtw: SoftDTWConfig,
) -> dict[str, Tensor]:
    def logits(head: Head, states: Tensor) -> Tensor:
        out = states @ head.weight.T + (0 if head.bias is None else head.bias)
        out = out * head.scale
        return out if head.softcap is None else head.softcap * torch.tanh(out / head.softcap)

    def N(x: Tensor) -> Tensor:
        return x / x.std()

    S, T = len(student.hidden), len(teacher.hidden)
    zero = case.student_head.weight.new_zeros(())
    terms = dict.fromkeys(TERMS, zero)
    if S == 0:
        return terms
    z_s = logits(case.student_head, student.hidden)
    p_s = z_s.softmax(-1)
    terms["ce"] = -sum((p_s[i, student.labels[i]].log() for i in range(S)), zero)
    if T == 0:
        return terms

    P = case.projectors
    q = P.query(torch.cat([student.input_embeds, student.target_embeds], -1).detach())
    k = N(torch.cat([teacher.input_embeds, teacher.target_embeds], -1))
    scores = q @ k.T / math.sqrt(k.shape[1])
    A, B = scores.softmax(1), scores.softmax(0).T
    constant_head = case.student_head.detached()
    read = N(teacher.hidden)
    if loss.attention_value == "label_and_hidden":
        read = read + N(teacher.target_embeds)
    z_t2s = logits(constant_head, A @ P.t2s(read))
    z_t = logits(case.teacher_head, teacher.hidden)
    z_s2t = logits(case.teacher_head, B @ P.s2t(student.hidden))
    p_t2s, p_t = z_t2s.softmax(-1), z_t.softmax(-1)

    w_s, w_t = [], []  # plain numbers: weights and band are constants
    for i in range(S):
        weight = -float((p_s[i] * p_s[i].log()).detach().sum())
        if loss.student_weighting == "entropy_gate":
            weight *= float(p_t2s[i].detach().max())
        w_s.append(1.0 if loss.student_weighting == "none" else weight)
    for j in range(T):
        weight = 1 + float((p_t[j] * p_t[j].log()).detach().sum()) / math.log(z_t.shape[1])
        w_t.append(1.0 if loss.teacher_weighting == "none" else weight)
    tau = loss.temperature
    for i in range(S):
        target, own = (z_t2s[i].detach() / tau).softmax(-1), (z_s[i] / tau).softmax(-1)
        value = reference_divergence(loss.divergence, target, own) * S / sum(w_s)
        if loss.student_weighting == "entropy_then_gate":
            value = value * float(p_t2s[i].detach().max())
        terms["student_kd"] = terms["student_kd"] + w_s[i] * value
        terms["t2s_ce"] = terms["t2s_ce"] - p_t2s[i, student.labels[i]].log()
    for j in range(T):
        target, own = (z_t[j] / tau).softmax(-1), (z_s2t[j] / tau).softmax(-1)
        value = reference_divergence("forward_kl", target, own)
        terms["teacher_kd"] = terms["teacher_kd"] + w_t[j] * T / sum(w_t) * value

    penalty, A = torch.zeros(S, T, dtype=A.dtype), A.detach()
    for i in range(S):
        mean = sum((j + 1) * float(A[i, j]) for j in range(T))
        alpha = soft_dtw.band_center_blend
        center = alpha * mean + (1 - alpha) * (i + 1) * T / S
        spread = -sum(float(a) * math.log(float(a)) for a in A[i])
        width = soft_dtw.band_width + soft_dtw.band_entropy_coef * spread
        for j in range(T):
            if soft_dtw.band and abs(j + 1 - center) > width:
                penalty[i, j] = soft_dtw.band_penalty
    gamma = soft_dtw.gamma_start
    pairs = {
        "hidden_dtw": (student.hidden, P.t2s(teacher.hidden)),
        "embed_dtw": (student.target_embeds, P.embed_t2s(teacher.target_embeds)),
    }
    for name, (x, y) in pairs.items():
        across = reference_soft_dtw(x, y, gamma, penalty)
        own = reference_soft_dtw(x, x, gamma) + reference_soft_dtw(y, y, gamma)
        terms[name] = across - own / 2
    return terms
