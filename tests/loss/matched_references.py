"""The losses of the baselines that match tokens, written plainly: sample by sample, in loops."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

import torch
from torch import Tensor

from dwakd_plugin.loss.terms.mapped import LEAST_READ
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig
from dwakd_plugin.tokenizers.spellings import Spellings
from tests.loss.cases import TERMS, Case, Sample
from tests.loss.references import reference_divergence, reference_soft_dtw

Pairs = list[tuple[int, int]]
Inside = list[tuple[int, int, int]]  # student and teacher position, and what was read of the latter
ALL_TERMS = (*TERMS, "uld", "hidden_cosine")
COMPARED = ("paired_ce", "teacher_ce")  # both models' nats for the same text


def entropy_of(p: Tensor) -> float:
    return -sum(x * math.log(x) for x in p.tolist())


def reference_exact(
    student: Sample,
    teacher: Sample,
    pairs: Pairs,
    mapped: Tensor,
    case: Case,
    loss: LossConfig,
    soft_dtw: SoftDTWConfig,
) -> dict[str, Tensor]:
    zero = torch.zeros((), dtype=torch.float64)
    terms = dict.fromkeys((*ALL_TERMS, *COMPARED), zero)
    S, T, P, tau = len(student.hidden), len(teacher.hidden), case.projectors, loss.temperature
    fixed, theirs = case.student_head.detached(), case.teacher_head
    for i in range(S):
        p = case.student_head.logits(student.hidden[i : i + 1])[0].softmax(-1)
        terms["ce"] = terms["ce"] - p[student.labels[i]].log()
    if S == 0 or T == 0:
        return terms

    used = []
    for i, j in pairs:
        best = int(theirs.logits(teacher.hidden[j : j + 1])[0].argmax())
        if mapped[best] >= 0:
            used.append((i, j, int(mapped[best])))
    taught, teaching = [], []
    for i, j, target in used:
        z_s = case.student_head.logits(student.hidden[i : i + 1])[0]
        z_t2s = fixed.logits(P.t2s(teacher.hidden[j : j + 1]))[0]
        terms["t2s_ce"] = terms["t2s_ce"] - z_t2s.softmax(-1)[target].log() * S / len(used)
        for name, head, sample, place in (
            ("paired_ce", case.student_head, student, i),
            ("teacher_ce", theirs, teacher, j),
        ):
            p = head.logits(sample.hidden[place : place + 1])[0].softmax(-1)
            terms[name] = terms[name] - p[sample.labels[place]].log()
        if int(z_t2s.argmax()) == target:
            weight = {
                "none": 1.0,
                "entropy": entropy_of(z_s.softmax(-1)),
                "entropy_gate": entropy_of(z_s.softmax(-1)) * float(z_t2s.softmax(-1).max()),
            }[loss.student_weighting]
            p_t2s = (z_t2s / tau).softmax(-1).detach()
            value = reference_divergence(loss.divergence, p_t2s, (z_s / tau).softmax(-1))
            taught.append((weight, value))
        z_t = theirs.logits(teacher.hidden[j : j + 1])[0].detach()
        z_s2t = theirs.detached().logits(P.s2t(student.hidden[i : i + 1]))[0]
        sure = 1 - entropy_of(z_t.softmax(-1)) / math.log(len(z_t))
        weight = sure if loss.teacher_weighting == "confidence" else 1.0
        p_t, p_s2t = (z_t / tau).softmax(-1), (z_s2t / tau).softmax(-1)
        teaching.append((weight, reference_divergence("forward_kl", p_t, p_s2t)))
    for name, length, weighted in (("student_kd", S, taught), ("teacher_kd", T, teaching)):
        for weight, value in weighted:
            share = weight * length / sum(other for other, _ in weighted)
            terms[name] = terms[name] + share * value
    if loss.dtw_weight > 0:
        terms |= reference_warp(student, teacher, pairs, case, soft_dtw)
    return terms


def reference_warp(
    student: Sample, teacher: Sample, pairs: Pairs, case: Case, soft_dtw: SoftDTWConfig
) -> dict[str, Tensor]:
    """Soft-DTW's two terms with a band around the pairs, which ascend."""
    terms, P = {}, case.projectors
    S, T = len(student.hidden), len(teacher.hidden)
    penalty = torch.zeros(S, T, dtype=torch.float64)
    ends = [(0, 0), *((i + 1, j + 1) for i, j in pairs), (S + 1, T + 1)]
    for i in range(1, S + 1):
        (i0, j0), (i1, j1) = next(
            (before, after) for before, after in pairwise(ends) if before[0] <= i < after[0]
        )
        center = j0 + (i - i0) * (j1 - j0) / (i1 - i0)
        for j in range(1, T + 1):
            if soft_dtw.band and abs(j - center) > soft_dtw.band_width:
                penalty[i - 1, j - 1] = soft_dtw.band_penalty
    gamma = soft_dtw.gamma_start
    for name, x, y in (
        ("hidden_dtw", student.hidden, P.t2s(teacher.hidden)),
        ("embed_dtw", student.target_embeds, P.embed_t2s(teacher.target_embeds)),
    ):
        own = reference_soft_dtw(x, x, gamma) + reference_soft_dtw(y, y, gamma)
        terms[name] = reference_soft_dtw(x, y, gamma, penalty) - own / 2
    return terms


def reference_uld(
    student: Sample, teacher: Sample, case: Case, loss: LossConfig
) -> dict[str, Tensor]:
    terms = dict.fromkeys(ALL_TERMS, torch.zeros((), dtype=torch.float64))
    S, T = len(student.hidden), len(teacher.hidden)
    for i in range(S):
        z = case.student_head.logits(student.hidden[i : i + 1])[0]
        terms["ce"] = terms["ce"] - z.softmax(-1)[student.labels[i]].log()
        if i >= T:
            continue
        p = (z / loss.temperature).softmax(-1)
        q = (case.teacher_head.logits(teacher.hidden[i : i + 1])[0] / loss.temperature).softmax(-1)
        ours = sorted(p, key=lambda x: -float(x))
        theirs = sorted((float(x) for x in q), reverse=True)
        for rank in range(max(len(ours), len(theirs))):
            mine = ours[rank] if rank < len(ours) else torch.zeros((), dtype=torch.float64)
            other = theirs[rank] if rank < len(theirs) else 0.0
            terms["uld"] = terms["uld"] + (mine - other).abs() * S / min(S, T)
    return terms


def reference_top(
    student: Sample,
    teacher: Sample,
    partners: list[tuple[int, int, int]],
    mapped: Tensor,
    case: Case,
    loss: LossConfig,
    entries: list[list[tuple[int, int]]],
    k: int,
) -> dict[str, Tensor]:
    """`mapped` of the k likeliest tokens; partners: positions of both, and what was read or 0."""
    zero, smallest = torch.zeros((), dtype=torch.float64), torch.finfo(torch.float64).tiny
    terms = dict.fromkeys((*ALL_TERMS, *COMPARED, "top_labels"), zero)
    taught = []
    compared = {i: (j, read) for i, j, read in partners}
    for i in range(len(student.hidden)):
        q = case.student_head.logits(student.hidden[i : i + 1])[0].softmax(-1)
        label = int(student.labels[i])
        terms["ce"] = terms["ce"] - q[label].log()
        if i not in compared:
            if len(teacher.hidden):
                terms["student_kd"] = terms["student_kd"] - q[label].log()
            continue
        j, read = compared[i]
        p = case.teacher_head.logits(teacher.hidden[j : j + 1])[0].softmax(-1).tolist()
        likeliest = sorted(range(len(p)), key=lambda token: -p[token])[:k]
        goes_on = dict(enumerate(mapped.tolist())) if read == 0 else dict(entries[read - 1])
        found: dict[int, float] = {}
        for token in likeliest:
            if goes_on.get(token, -1) >= 0:
                found[goes_on[token]] = found.get(goes_on[token], 0.0) + p[token]
        known, mass = sum(p[token] for token in likeliest), sum(found.values())
        theirs = {s: share / mass * known for s, share in found.items()}
        outside = max(1 - known, 0.0)
        value = -q[label].log()
        if mass / known >= (LEAST_READ if read else smallest):
            theirs_and_rest = torch.tensor([*theirs.values(), outside], dtype=torch.float64)
            own = torch.stack([q[s] for s in theirs])
            rest = 1 - own.sum() if len(theirs) < len(q) else zero
            value = reference_divergence(
                loss.divergence,
                theirs_and_rest.clamp_min(smallest),
                torch.cat([own, rest[None]]).clamp_min(smallest),
            )
        terms["paired_ce"] = terms["paired_ce"] - q[label].log()
        of_label = max(theirs.get(label, outside), smallest)
        terms["teacher_ce"] = terms["teacher_ce"] - math.log(of_label)
        terms["top_labels"] = terms["top_labels"] + (label in theirs)
        gate = max(theirs.values(), default=0.0)
        weight = entropy_of(q) * gate if loss.student_weighting == "entropy_gate" else 1.0
        taught.append((weight, value))
    for weight, value in taught:
        share = weight * len(taught) / sum(weight for weight, _ in taught)
        terms["student_kd"] = terms["student_kd"] + share * value
    return terms


def reference_mapped(
    student: Sample,
    teacher: Sample,
    pairs: Pairs,
    mapped: Tensor,
    case: Case,
    loss: LossConfig,
    inside: Inside = [],  # noqa: B006
    entries: list[list[tuple[int, int]]] = [],  # noqa: B006
    spelt: Inside = [],  # noqa: B006
    spellings: Spellings | None = None,
    soft_dtw: SoftDTWConfig | None = None,
) -> dict[str, Tensor]:
    """entries: by what was read, from 1, tokens of the teacher's and what they go on with."""
    zero = torch.zeros((), dtype=torch.float64)
    terms = dict.fromkeys((*ALL_TERMS, *COMPARED), zero)

    def summed(place: tuple[int, int], temperature: float) -> tuple[Tensor, float]:
        j, read = place
        z = case.teacher_head.logits(teacher.hidden[j : j + 1])[0].detach() / temperature
        p = z.softmax(-1).tolist()
        found = [0.0] * case.student_head.weight.shape[0]
        begun = enumerate(mapped.tolist()) if read == 0 else entries[read - 1]
        for token, goes_on in begun:
            if goes_on >= 0:
                found[goes_on] += p[token]
        smallest, mass = torch.finfo(torch.float64).tiny, sum(found)
        shares = [max(share / mass, smallest) for share in found]
        return torch.tensor(shares, dtype=torch.float64), mass

    def node(i: int, j: int, number: int) -> Tensor:
        """D of one of the positions that spell the student's token i, by loops over all tokens."""
        assert spellings is not None
        z = case.student_head.logits(student.hidden[i : i + 1])[0] / loss.temperature
        p_s = z.softmax(-1)
        z_t = case.teacher_head.logits(teacher.hidden[j : j + 1])[0].detach() / loss.temperature
        p_t, read = z_t.softmax(-1), ()
        if number:
            read = next(r for r, n in spellings.numbers.items() if n == number)
        own: dict[int, Tensor] = defaultdict(lambda: zero)  # by the next token, −1 for the end
        for token, cut in enumerate(spellings.spelt):
            if cut and cut[: len(read)] == read:
                after = cut[len(read)] if len(cut) > len(read) else -1
                own[after] = own[after] + p_s[token]
        said: dict[int, Tensor] = defaultdict(lambda: zero)
        for token, group in enumerate(spellings.groups):
            if number and token in own:
                said[token] = said[token] + p_t[token]
            elif number and -1 in own:
                said[-1] = said[-1] + p_t[token]
            elif not number and group >= 0:
                said[group] = said[group] + p_t[token]
        mass = sum(said.values(), zero)
        masses = torch.stack([*own.values()])
        label = spellings.spelt[student.labels[i]]
        actual = label[len(read)] if len(label) > len(read) else -1
        if mass < LEAST_READ:
            return -(own[actual] / masses.sum()).log()
        target = torch.stack([said[token] for token in own]) / mass
        smallest = torch.finfo(torch.float64).tiny
        return reference_divergence(
            loss.divergence, target.clamp_min(smallest), masses / masses.sum()
        )

    partner = {i: (j, 0) for i, j in pairs} | {i: (j, read) for i, j, read in inside}
    taught = []
    for i in range(len(student.hidden)):
        z = case.student_head.logits(student.hidden[i : i + 1])[0]
        nll = -z.softmax(-1)[student.labels[i]].log()
        terms["ce"] = terms["ce"] + nll
        if i in partner:
            p, mass = summed(partner[i], 1.0)
            terms["paired_ce"] = terms["paired_ce"] + nll
            terms["teacher_ce"] = terms["teacher_ce"] - p[student.labels[i]].log()
            weight = {
                "none": 1.0,
                "entropy": entropy_of(z.softmax(-1)),
                "entropy_then_gate": entropy_of(z.softmax(-1)),
                "entropy_gate": entropy_of(z.softmax(-1)) * float(p.max()),
            }[loss.student_weighting]
            tau = loss.temperature
            value = reference_divergence(
                loss.divergence, summed(partner[i], tau)[0], (z / tau).softmax(-1)
            )
            if partner[i][1] > 0 and mass < LEAST_READ:
                value = nll
            if loss.student_weighting == "entropy_then_gate":
                value = value * float(p.max())
            taught.append((weight, value))
        elif i in {own for own, _, _ in spelt}:
            for j, number in [(j, number) for own, j, number in spelt if own == i]:
                terms["student_kd"] = terms["student_kd"] + node(i, j, number)
        elif len(teacher.hidden):
            terms["student_kd"] = terms["student_kd"] + nll
    for weight, value in taught:
        share = weight * len(taught) / sum(weight for weight, _ in taught)
        terms["student_kd"] = terms["student_kd"] + share * value
    if loss.cosine_weight > 0:
        for i, j in pairs:  # those inside a token have not read the same
            ours, theirs = student.hidden[i], case.projectors.t2s(teacher.hidden[j])
            dot = sum((x * y for x, y in zip(ours, theirs, strict=True)), zero)
            norms = (sum(x * x for x in v) for v in (ours, theirs))
            terms["hidden_cosine"] = terms["hidden_cosine"] + 1 - dot / math.prod(norms) ** 0.5
    if soft_dtw is not None and loss.dtw_weight > 0 and len(student.hidden) and len(teacher.hidden):
        path = sorted((i, j) for i, (j, _) in partner.items())
        terms |= reference_warp(student, teacher, path, case, soft_dtw)
    return terms
