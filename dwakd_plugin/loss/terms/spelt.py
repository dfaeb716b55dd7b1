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

import torch
from torch import Tensor

from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.divergence import DIVERGENCES, softmax
from dwakd_plugin.loss.head_pass import Kernel, through_student_head
from dwakd_plugin.loss.states import SpellingTable, gathered, required_labels
from dwakd_plugin.loss.terms.mapped_top import LEAST_READ
from dwakd_plugin.loss.token_order import summed_runs, token_order
from dwakd_plugin.recipe.schema import Divergence


def spelt_divergences(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    read: Tensor,
    table: SpellingTable,
    divergence: Divergence,
    temperature: float,
) -> tuple[Tensor]:
    """D(p_t(· | r) ‖ p_s(· | r)) of each row (C,), the teacher's a constant; −log p_s(actual | r)
    where the teacher says nearly nothing of what may follow.

    Shapes: student_logits (C, Vs), teacher_logits (C, Vt), labels (C,) of the student's, read (C,)
    the numbers of the beginnings, 0 where nothing was read.
    """
    own = softmax(student_logits, temperature)
    theirs = softmax(teacher_logits.to(own.dtype), temperature).detach()
    further = read > 0
    pairs = _first(own, theirs, labels, table), _after(own, theirs, labels, read, table)
    found = []
    for student, teacher, actual in pairs:
        said, smallest = teacher.sum(1, keepdim=True), torch.finfo(own.dtype).tiny
        student, teacher = (
            (each / each.sum(1, keepdim=True).clamp_min(smallest)).clamp_min(smallest).log()
            for each in (student, teacher)
        )
        label = -student.gather(1, actual[:, None])
        value = DIVERGENCES[divergence](teacher, student)
        found.append(torch.where(said[:, 0] >= LEAST_READ, value, label[:, 0]))
    return (torch.where(further, found[1], found[0]),)


def _first(
    own: Tensor, theirs: Tensor, labels: Tensor, table: SpellingTable
) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides' masses (C, Vt) by the first token of a spelling, and the actual one's (C,)."""
    rows = theirs.shape[1]
    student = token_order(table.firsts).sums(own, rows).T
    teacher = token_order(table.groups).sums(theirs, rows).T
    return student, teacher, table.firsts[labels].clamp_min(0)


def _after(
    own: Tensor, theirs: Tensor, labels: Tensor, read: Tensor, table: SpellingTable
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by what comes behind `read`, (C, 1 + the most outcomes): first that nothing does."""
    entries, outcomes, most = table.longest

    def places(starts: Tensor, most: int) -> tuple[Tensor, Tensor]:
        number = torch.arange(most, device=read.device)
        inside = number < starts.diff()[read][:, None]
        return torch.where(inside, starts[read][:, None] + number, 0), inside

    at, inside = places(table.starts, entries)
    if entries == 0:
        nothing = own[:, :1] * 0.0
        return nothing, nothing.detach(), labels * 0
    tokens = table.student_tokens[at]
    into = torch.where(inside, table.places[at], outcomes + 1)  # the last is dropped
    masses, last = summed_runs(own.gather(1, tokens).where(inside, 0.0), into, most)
    into = into.where(last, outcomes + 1)  # so that no two are added to one place
    student = own.new_zeros(len(own), outcomes + 2).scatter_add(1, into, masses)
    actual = torch.where(inside & (tokens == labels[:, None]), table.places[at], 0).sum(1)
    at, inside = places(table.outcome_starts, outcomes)
    teacher = theirs.gather(1, table.outcomes[at]).where(inside, 0.0)
    ends = (into == 0).any(1, keepdim=True)
    rest = (1.0 - teacher.sum(1, keepdim=True)).clamp_min(0.0).where(ends, 0.0)
    return student[:, :-1], torch.cat([rest, teacher], 1), actual


def spelt_sum(batch: Batch) -> Tensor | None:
    """The sum over a batch, (), whose gradients are formed with it; None where nothing is spelt."""
    student, teacher = batch.student, batch.teacher
    ours, theirs, read = student.spelt, teacher.spelt, student.spelt_read
    if not batch.spells or ours is None or theirs is None or read is None or len(ours) == 0:
        return None
    settings = {
        "table": teacher.spellings,
        "divergence": batch.loss.divergence,
        "temperature": batch.loss.temperature,
    }
    (found,), weighted = through_student_head(
        Kernel(spelt_divergences, 1, settings),
        gathered(student.hidden, ours),
        gathered(teacher.hidden, theirs),
        gathered(required_labels(student), ours),
        read,
        student.head,
        teacher.head,
        batch.chunk(student.head, teacher.head),
        batch.product,
        [torch.ones(len(ours), dtype=batch.dtype, device=ours.device)],
    )
    return found.sum() if weighted is None else weighted
