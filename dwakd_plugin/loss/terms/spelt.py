"""Student tokens that the teacher spells with several of its own: a divergence for each of those.

    spelt_kd = Σ_i Σ_n D(p_t,j+n(· | r) ‖ p_s,i(· | r)),   r = v_1 … v_n,   n = 0 … m

where v_1 … v_m is the teacher's spelling of y_i, and T(s) that of any token s (`SpellingTable`):

    p_s,i(v | r) ∝ Σ_{s: T(s) = r v …} p_s,i(s)        p_s,i(end | r) ∝ p_s,i(s with T(s) = r)
    p_t,j+n(v | r) = Σ_{u: group(u) = v} p_t,j(u) / Σ_{u: group(u) ≥ 0} p_t,j(u)        n = 0
    p_t,j+n(v | r) = p_t,j+n(v), for the v that a spelling goes on with; end has the rest    n > 0

With a one-hot teacher the inner sum is −log p_s,i(y_i): what a token weighs is what its label does.
Where no token ends at r, the teacher's probabilities are those of the v alone, renormalised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.divergence import DIVERGENCES, nll, softmax
from dwakd_plugin.loss.head_pass import Kernel, through_student_head
from dwakd_plugin.loss.states import SpellingTable, gathered, required_labels
from dwakd_plugin.loss.terms.mapped_top import LEAST_READ
from dwakd_plugin.loss.token_order import summed_runs, token_order
from dwakd_plugin.recipe.schema import Divergence


def first_divergences(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    _: Tensor,
    table: SpellingTable,
    divergence: Divergence,
    temperature: float,
) -> tuple[Tensor]:
    """D(p_t ‖ p_s) of each row's first token of a spelling (C,), the teacher's a constant;
    −log p_s(actual) where the teacher says nearly nothing of what may come first.

    Shapes: student_logits (C, Vs), teacher_logits (C, Vt), labels (C,) of the student's.
    """
    count, firsts, groups = table.by_first
    with torch.no_grad():
        said = softmax(teacher_logits.to(student_logits.dtype), temperature)
        teacher = token_order(groups).sums(said, count).T
        del said
    student: Tensor = _LogShares.apply(  # type: ignore[no-untyped-call]
        student_logits, firsts, count, temperature
    )
    return _compared(student, teacher, firsts[labels].clamp_min(0), divergence)


def further_divergences(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    read: Tensor,
    table: SpellingTable,
    divergence: Divergence,
    temperature: float,
) -> tuple[Tensor]:
    """D(p_t(· | r) ‖ p_s(· | r)) of each row (C,), as `first_divergences`; read (C,) has the
    numbers of the beginnings r, 1 and more.

    Nothing but softmax's sum goes over a vocabulary: outcomes are few, and the first is that
    nothing more comes.
    """
    entries, outcomes, most = table.longest
    at, inside = _places(table.starts, read, entries)
    tokens = table.student_tokens[at]
    into = torch.where(inside, table.places[at], outcomes + 1)  # the last is dropped
    own = student_logits.gather(1, tokens) / temperature
    # Shares of the entries alone: what all tokens' softmax divides by is no part of them.
    masses, last = summed_runs(own.where(inside, -torch.inf).softmax(1), into, most)
    into = into.where(last, outcomes + 1)  # so that no two are added to one place
    student = own.new_zeros(len(own), outcomes + 2).scatter_add(1, into, masses)[:, :-1]
    with torch.no_grad():
        at, inside = _places(table.outcome_starts, read, outcomes)
        theirs = teacher_logits.to(own.dtype)
        theirs = theirs if temperature == 1 else theirs / temperature
        whole = theirs.logsumexp(1, keepdim=True)
        teacher = (theirs.gather(1, table.outcomes[at]) - whole).exp().where(inside, 0.0)
        ends = (into == 0).any(1, keepdim=True)
        rest = (1.0 - teacher.sum(1, keepdim=True)).clamp_min(0.0).where(ends, 0.0)
        teacher = torch.cat([rest, teacher], 1)
        at, inside = _places(table.starts, read, entries)
        is_label = inside & (tokens == labels[:, None])
        actual = torch.where(is_label, table.places[at], 0).sum(1)
    return _compared(_log(student), teacher, actual, divergence)


def _places(starts: Tensor, read: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The entries of each number in `read`, (C, most), and which of these there are."""
    number = torch.arange(most, device=read.device)
    inside = number < starts.diff()[read][:, None]
    return torch.where(inside, starts[read][:, None] + number, 0), inside


def _log(shares: Tensor) -> Tensor:
    return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


def _compared(
    student: Tensor, teacher: Tensor, actual: Tensor, divergence: Divergence
) -> tuple[Tensor]:
    """Of the student's log-probabilities and the teacher's masses, (C, outcomes)."""
    said = teacher.sum(1, keepdim=True)
    teacher = _log(teacher / said.clamp_min(torch.finfo(teacher.dtype).tiny))
    value = DIVERGENCES[divergence](teacher, student)
    return (torch.where(said[:, 0] >= LEAST_READ, value, nll(student, actual)),)


class _LogShares(torch.autograd.Function):
    """log p_s(v) of the v that each token begins with: logits (C, Vs) → (C, count).

    Backward keeps a softmax: with P = Σ p_s over all that has a v, and g a gradient in log p_s(v),

        ∂ / ∂ logit(s) = p_s(s) / P · (g_v / p_s(v) − Σ g),   v what s begins with
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, firsts: Tensor, count: int, temperature: float) -> Tensor:
        own = softmax(logits, temperature)
        masses = token_order(firsts).sums(own, count)
        whole = masses.sum(0).clamp_min_(torch.finfo(own.dtype).tiny)
        found = _log(masses / whole).T
        ctx.save_for_backward(own, whole, found, firsts)
        ctx.temperature = temperature
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, whole, found, firsts = ctx.saved_tensors
        shares = found.T.exp()  # (count, C), as rows are taken below
        grad = grad.T.where(shares > torch.finfo(own.dtype).tiny, 0.0)
        total = grad.sum(0)
        each = shares.new_zeros(len(shares) + 1, len(own))  # the last of what has no v
        torch.div(grad, shares, out=each[:-1])
        each[:-1].sub_(total).div_(whole * ctx.temperature)
        by_token = each.index_select(0, firsts.where(firsts >= 0, len(shares)))
        return own * by_token.T, None, None, None


def spelt_sum(batch: Batch) -> Tensor | None:
    """The sum over a batch, (), whose gradients are formed with it; None where nothing is spelt."""
    student, teacher = batch.student, batch.teacher
    ours, theirs, read = student.spelt, teacher.spelt, student.spelt_read
    if not batch.spells or ours is None or theirs is None or read is None or len(ours) == 0:
        return None
    first = len(ours) - len(read)
    settings = {
        "table": teacher.spellings,
        "divergence": batch.loss.divergence,
        "temperature": batch.loss.temperature,
    }
    each = (first, first_divergences), (len(read), further_divergences)
    (found,), weighted = through_student_head(
        [(count, Kernel(value, 1, settings)) for count, value in each if count],
        gathered(student.hidden, ours),
        gathered(teacher.hidden, theirs),
        gathered(required_labels(student), ours),
        torch.cat([read.new_zeros(first), read]),
        student.head,
        teacher.head,
        batch.chunk(student.head, teacher.head),
        batch.product,
        [torch.ones(len(ours), dtype=batch.dtype, device=ours.device)],
    )
    return found.sum() if weighted is None else weighted
