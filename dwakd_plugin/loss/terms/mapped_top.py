"""`mapped` from the teacher's likeliest tokens alone: what lies outside of them is one outcome.

    K        the teacher's k likeliest tokens; R = 1 − Σ_{v ∈ K} p_t(v)
    O        {token_map(v): v ∈ K}, or what K goes on with behind what the student has read
    p_top(s) = (1 − R) Σ_{v ∈ K: token_map(v) = s} p_t(v) / Σ_{v ∈ K: token_map(v) ≥ 0} p_t(v)
    p_top(rest) = R         p_s(rest) = 1 − Σ_{s ∈ O} p_s(s)

so that both sides are distributions over the same O and rest, and every divergence is finite. What
lies outside of K is taken to have as much that the student has no token for, or that goes on with
what it has read, as what lies inside. Merging outcomes lowers every f-divergence (all of ours but
the adaptive mixture): where no token outside K has its student's token in O, the divergence is a
lower bound of that of `mapped`. With the whole vocabulary in K it is that one. Tokens that the
teacher spells with several of its own (`terms.spelt`) are left to their labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dwakd_plugin.loss.divergence import DIVERGENCES, nll
from dwakd_plugin.loss.states import ContinuationTable
from dwakd_plugin.loss.token_order import summed_runs
from dwakd_plugin.loss.token_weights import entropy
from dwakd_plugin.recipe.schema import Divergence

# The least probability of what the student has read at which the teacher says what follows it.
LEAST_READ = 1e-4


class TopStatistics(NamedTuple):
    """`StudentStatistics` of p_top, and whether the label is in O: (N,) each."""

    ce: Tensor
    t2s_ce: Tensor  # −log p_top(y); of the rest where y lies in it: the least that it can be
    divergence: Tensor
    entropy: Tensor
    gate: Tensor  # max over O
    t2s_correct: Tensor
    label_kept: Tensor


class _Outcomes(NamedTuple):
    """Of each position: O in k places, of which those that are not `kept` are none."""

    tokens: Tensor  # (C, k) long, rising, Vs where none
    kept: Tensor  # (C, k) bool
    probs: Tensor  # (C, k + 1), the last of the rest; 0 where none
    said: Tensor  # (C,) bool, whether K has anything to say; else the label is learnt


def top_statistics(
    student_logits: Tensor,
    teacher_top: Tensor,
    labels: Tensor,
    read: Tensor,
    token_map: Tensor,
    continuations: ContinuationTable | None,
    divergence: Divergence,
    sampled: bool = False,
) -> TopStatistics:
    """`mapped.mapped_statistics` at temperature 1 with p_top for p_map.

    Shapes as there; teacher_top (C, 2k), the ids of K, −1 where there are fewer, and their
    log-probabilities.
    """
    own, smallest = student_logits.log_softmax(-1), torch.finfo(student_logits.dtype).tiny
    ce = nll(own, labels)
    with torch.no_grad():
        found = _outcomes(teacher_top, token_map, read, continuations, own.shape[1])
        is_label = found.kept & (found.tokens == labels[:, None])
        kept, rest = found.probs[:, :-1], found.probs[:, -1]
        best = kept.max(-1)
        chosen = found.tokens.gather(-1, best.indices[:, None]).squeeze(-1)
        wanted = own.argmax(-1) if sampled else labels
        label_kept = is_label.any(-1)
        of_label = torch.where(label_kept, (kept * is_label).sum(-1), rest)
    target = found.probs.clamp_min(smallest).log()
    value = DIVERGENCES[divergence](target, _of_student(own, found))
    return TopStatistics(
        ce,
        -of_label.clamp_min(smallest).log(),
        torch.where(found.said, value, ce),
        entropy(own),
        best.values,
        (chosen == wanted) & (best.values > 0),
        label_kept,
    )


def _outcomes(
    teacher_top: Tensor,
    token_map: Tensor,
    read: Tensor,
    continuations: ContinuationTable | None,
    rows: int,
) -> _Outcomes:
    ids, log_probs = teacher_top.chunk(2, -1)
    ids, probs = ids.long(), log_probs.exp()
    tokens = token_map[ids.clamp_min(0)]
    if continuations is not None:
        tokens = torch.where(read[:, None] == 0, tokens, continuations.after(read, ids))
    tokens = torch.where((ids < 0) | (tokens < 0), rows, tokens)
    inside = probs.sum(-1)
    # Several of the teacher's tokens may be one of the student's.
    tokens, order = tokens.sort(dim=-1, stable=True)
    summed, last = summed_runs(probs.gather(-1, order), tokens, tokens.shape[1])
    kept = last & (tokens < rows)
    summed = summed.where(kept, 0.0)
    mass, rest = summed.sum(-1), (1 - inside).clamp(0, 1)
    smallest = torch.finfo(probs.dtype).tiny
    summed = summed * ((1 - rest) / mass.clamp_min(smallest))[:, None]
    said = mass > torch.where(read == 0, 0.0, LEAST_READ) * inside
    return _Outcomes(tokens, kept, torch.cat([summed, rest[:, None]], -1), said)


def _of_student(own: Tensor, found: _Outcomes) -> Tensor:
    """Log-probabilities of the outcomes (C, k + 1) of the student's own (C, Vs).

    The rest is summed, and not what the others leave of 1: of a sure student that is rounding.
    """
    # Nothing is picked by a mask, for which a GPU is waited: no outcome has the place of the first.
    place = torch.where(found.kept, found.tokens, found.tokens[:, :1]).clamp_max(own.shape[1] - 1)
    none = torch.finfo(own.dtype).tiny
    floor = torch.full_like(own[:1, :1], none).log()
    inside = own.gather(-1, place).where(found.kept, floor)
    rest = own.scatter(-1, place, floor.expand_as(place)).logsumexp(-1, keepdim=True)
    return torch.cat([inside, rest], -1)
