"""The teacher's own probabilities, summed by the student's tokens.

    p_map,i(s) = Σ_{v: token_map(v) = s} p_t,j(v) / Σ_{v: token_map(v) ≥ 0} p_t,j(v)
    student_kd = Σ w_i D(p_map,i ‖ p_s,i) over pairs (i, j) + spelt_kd, of tokens that the teacher
                 cuts in several (`terms.spelt`) + Σ −log p_s,i(y_i) over the rest

Where i lies inside the token that the teacher predicts at j, r being the tokens that the student
has read of it, and cut(v) the student's cut of a token v (`ResponseStates.continuations`):

    p_map,i(s) = Σ_{v: cut(v) = r s …} p_t,j(v) / Σ_{v: cut(v) = r …, longer} p_t,j(v)

The weights of a sample's pairs sum to their number, so that each token weighs as much as any other:
where the teacher says nothing, the label stands in for it. With the labels left to λ_CE alone,
tokens that only one tokenizer cuts off would be taught less, and unlearnt.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.divergence import DIVERGENCES, log_softmax, nll, softmax
from dwakd_plugin.loss.head_pass import Kernel
from dwakd_plugin.loss.matches import Figure
from dwakd_plugin.loss.matches.partners import SamePrefix
from dwakd_plugin.loss.record import HeadPasses, Term
from dwakd_plugin.loss.states import ContinuationTable, Head
from dwakd_plugin.loss.terms.mapped_top import LEAST_READ, top_statistics
from dwakd_plugin.loss.terms.spelt import spelt_sum
from dwakd_plugin.loss.terms.student_space import PAIRED, StudentStatistics, paired_sums
from dwakd_plugin.loss.terms.teacher_space import TEACHER
from dwakd_plugin.loss.token_order import summed_runs, token_order
from dwakd_plugin.loss.token_weights import entropy, student_token_weights
from dwakd_plugin.recipe.schema import Divergence

COMPILED: tuple[Divergence, ...] = ("forward_kl", "reverse_kl")  # at temperature 1, on the CPU

# Of a teacher that gives its likeliest tokens alone: how often the label is one of them.
TOP = Figure("label_in_top_k", "top_labels", "top_tokens")
# Of one that gives all: the tokens that are several of its own, which it teaches beside the pairs.
SPELT = Figure("spelt_share", "spelt_tokens", "tokens_to_spell")


def mapped_statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    read: Tensor,
    token_map: Tensor,
    continuations: ContinuationTable | None,
    divergence: Divergence,
    temperature: float,
    sampled: bool = False,
) -> StudentStatistics:
    """`student_statistics` with p_map for p_t2s, a constant: its `t2s_ce` takes no gradient.

    Shapes: student_logits (C, Vs), teacher_logits (C, Vt), token_map (Vt,) with −1 for a token that
    the student has no word for, labels (C,) and read (C,), the number of what the student has read
    of the teacher's token in `continuations`, 0 where nothing. Where labels are `sampled`,
    `t2s_correct` is whether both models' likeliest tokens are the same.
    """
    own = student_logits.log_softmax(-1)
    ce = nll(own, labels)

    def mapped(temperature: float) -> tuple[Tensor, Tensor]:
        return _mapped_log_probs(teacher_logits, token_map, read, continuations, own, temperature)

    with torch.no_grad():
        theirs, foreseen = mapped(1.0)
        best, wanted = theirs.max(-1), own.argmax(-1) if sampled else labels
        target = theirs if temperature == 1 else mapped(temperature)[0]
        student_entropy = entropy(own)
    softened = own if temperature == 1 else log_softmax(student_logits, temperature)
    value = DIVERGENCES[divergence](target, softened)
    if continuations is not None:
        value = torch.where((read == 0) | (foreseen >= LEAST_READ), value, ce)
    return StudentStatistics(
        ce, nll(theirs, labels), value, student_entropy, best.values.exp(), best.indices == wanted
    )


def _mapped_log_probs(
    teacher_logits: Tensor,
    token_map: Tensor,
    read: Tensor,
    continuations: ContinuationTable | None,
    like: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """log p_map over the student's tokens (C, Vs), and the mass that it is a share of (C,).

    A token that no teacher's token is mapped to has the smallest probability that there is.
    """
    probabilities = softmax(teacher_logits.to(like.dtype), temperature)
    # The last row has what is none of the student's. Nothing is picked by a mask, for which a GPU
    # is waited.
    rows = like.shape[1]
    summed = token_order(token_map).sums(probabilities, rows + 1)
    if continuations is not None:
        _add_continuations(summed.mul_(read == 0), probabilities, read, continuations)
    summed, smallest = summed[:rows].T, torch.finfo(like.dtype).tiny
    mass = summed.sum(-1, keepdim=True)
    return (summed / mass.clamp_min(smallest)).clamp_min(smallest).log(), mass.squeeze(-1)


def _add_continuations(
    summed: Tensor, probabilities: Tensor, read: Tensor, continuations: ContinuationTable
) -> None:
    """summed (Vs + 1, C) += probabilities (C, Vt), each by what it goes on with behind `read` (C,).

    Each row takes as many entries as the longest has, which is a small part of Vt.
    """
    starts, none = continuations.starts, len(summed) - 1
    longest, most, teacher_tokens, student_tokens = continuations.in_order
    if longest == 0:
        return
    number = torch.arange(longest, device=read.device)
    inside = number < starts.diff()[read][:, None]
    entries = torch.where(inside, starts[read][:, None] + number, 0)
    values = probabilities.gather(1, teacher_tokens[entries])
    tokens = torch.where(inside, student_tokens[entries], none)
    # Equal tokens lie side by side, so that no two are added to one place.
    values, last = summed_runs(values, tokens, most)
    summed.scatter_add_(0, tokens.where(last, none).T, values.T)


def _kernel(batch: Batch) -> Kernel:
    loss, teacher = batch.loss, batch.teacher
    tables: dict[str, Any] = {
        "token_map": teacher.token_map,
        "continuations": teacher.continuations,
    }
    comparing = {"divergence": loss.divergence, "sampled": batch.student.sampled}
    if teacher.top is not None:
        if loss.temperature != 1:  # of the mass outside nobody knows what it would be at another
            raise ValueError(f"temperature {loss.temperature:g}: the teacher's `top` is at 1")
        return Kernel(top_statistics, 3, tables | comparing)
    plain = loss.divergence in COMPILED and loss.temperature == 1
    if plain and batch.compiled:
        return Kernel(
            compiled_statistics,
            3,
            comparing,
            both=compiled_gradients,
            beforehand=partial(compiled_target, **tables),
        )
    return Kernel(mapped_statistics, 3, tables | comparing | {"temperature": loss.temperature})


def compiled_target(
    teacher_hidden: Tensor,
    teacher_head: Head,
    read: Tensor,
    student_head: Head,
    token_map: Tensor,
    continuations: ContinuationTable | None,
) -> tuple[Tensor, Tensor]:
    """p_map (C, Vs) at temperature 1, and whether the teacher says enough for it, (C,) bool.

    Shapes as `mapped_statistics` has them, Vs being the rows of student_head and Vt those of
    teacher_head, the head of teacher_hidden (C, D).
    """
    from dwakd_plugin.loss.terms import mapped_cpu  # numba, which a GPU has no need of

    dtype = torch.promote_types(student_head.weight.dtype, torch.float32)
    rows = len(student_head.weight)
    target, foreseen = mapped_cpu.mapped_probabilities(
        lambda first, last: teacher_head.rows(first, last).logits(teacher_hidden).to(dtype),
        token_map,
        read,
        continuations,
        teacher_hidden.new_empty(len(read), rows, dtype=dtype),
    )
    return target, (read == 0) | (foreseen >= LEAST_READ)


def compiled_statistics(
    student_logits: Tensor,
    target: tuple[Tensor, Tensor],
    labels: Tensor,
    read: Tensor,
    divergence: Divergence,
    sampled: bool = False,
) -> StudentStatistics:
    """`mapped_statistics` on the CPU against `compiled_target`'s, by one of COMPILED, no graph."""
    zero = student_logits.new_zeros(len(labels))
    comparing = divergence, sampled
    return compiled_gradients(student_logits, target, labels, read, zero, zero, zero, *comparing)[0]


def compiled_gradients(
    student_logits: Tensor,
    target: tuple[Tensor, Tensor],
    labels: Tensor,
    read: Tensor,
    ce_grad: Tensor,
    _: Tensor,
    divergence_grad: Tensor,
    divergence: Divergence,
    sampled: bool = False,
) -> tuple[StudentStatistics, Tensor]:
    """The same, and the gradient in student_logits (C, Vs) by gradients (C,) of the columns.

    The gradient takes the place of `target`'s probabilities.
    """
    from dwakd_plugin.loss.terms import mapped_cpu

    probabilities, said = target
    found = mapped_cpu.statistics_and_gradient(
        student_logits,
        probabilities,
        labels,
        ce_grad + divergence_grad.where(~said, 0.0),
        divergence_grad.where(said, 0.0),
        reverse=divergence == "reverse_kl",
        sampled=sampled,
    )
    tokens = StudentStatistics(*found)
    divergences = torch.where(said, tokens.divergence, tokens.ce)
    return tokens._replace(divergence=divergences), probabilities


def _weights(passes: HeadPasses[SamePrefix]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Even ones are known before the pass; others hang on what it finds."""
    if passes.batch.loss.student_weighting != "none":
        return None
    compared, dtype = passes.match.compared, passes.batch.dtype
    rest = _left_to_labels(passes).to(dtype)
    return rest, torch.zeros_like(rest), compared.to(dtype)


def _left_to_labels(passes: HeadPasses[SamePrefix]) -> Tensor:
    """(B, S) bool."""
    return passes.batch.student_side.valid & ~passes.match.compared & ~passes.match.spelt


def _student_kd(passes: HeadPasses[SamePrefix]) -> dict[str, Tensor]:
    columns, compared = passes.student, passes.match.compared
    tokens = StudentStatistics(*columns[: len(StudentStatistics._fields)])
    side, weighting = passes.batch.student_side, passes.batch.loss.student_weighting
    weights = student_token_weights(
        tokens.entropy, tokens.gate, compared, weighting, compared.sum(1)
    )
    taught = (weights * tokens.divergence.where(compared, 0.0)).sum()
    at_end = compared & side.last
    left, spelt = tokens.ce.where(_left_to_labels(passes), 0.0).sum(), spelt_sum(passes.batch)
    further = {} if spelt is None else {"spelt_kd": spelt}
    if passes.batch.spells:
        further["spelt_tokens"] = passes.match.spelt.sum()
        further["tokens_to_spell"] = side.lengths.sum()
    for kept in columns[len(tokens) :]:
        further |= {"top_labels": (kept & compared).sum(), "top_tokens": compared.sum()}
    return (
        paired_sums(tokens, compared, at_end)
        | further
        | {
            "student_kd": taught + left + (0.0 if spelt is None else spelt),
            "teacher_ce": tokens.t2s_ce.where(compared, 0.0).sum(),
            "teacher_end_ce": tokens.t2s_ce.where(at_end, 0.0).sum(),
        }
    )


MAPPED = Term(
    "student_kd",
    "teach",
    _student_kd,
    kernel=_kernel,
    weights=_weights,
    beside="spelt_kd",
    figures=(*PAIRED, *TEACHER, TOP, SPELT),
    ramps=True,
    needs_states=False,
)
