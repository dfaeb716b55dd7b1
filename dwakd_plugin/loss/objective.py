"""The DWA-KD objective (arXiv 2602.21669): dual-space distillation plus time-warped alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from dwakd_plugin.loss.batch import Batch, no_teacher
from dwakd_plugin.loss.matches import Match, Projecting
from dwakd_plugin.loss.matches.attention import Attention
from dwakd_plugin.loss.matches.pairs import SameToken
from dwakd_plugin.loss.record import HeadPasses, Term
from dwakd_plugin.loss.soft_dtw import expected_alignments
from dwakd_plugin.loss.states import ProjectorSet, ResponseStates
from dwakd_plugin.loss.terms.labels import LABELS_ALONE
from dwakd_plugin.loss.terms.warp import (
    cost_between,
    embed_pair,
    hidden_pair,
    unit_vectors,
)
from dwakd_plugin.loss.variants import every_sum, every_term, variant_of
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig

DEFAULT_LOSS = LossConfig.model_validate({})
DEFAULT_SOFT_DTW = SoftDTWConfig.model_validate({})


class LossTerms(SimpleNamespace):
    """Sums over tokens and samples, as scalar tensors, by the names of `every_sum`.

    Terms are not weighted by any λ; they have a graph, and are 0 where the settings leave them out.
    The sums and counts of figures are detached. What each is stands where it is made, in `terms`,
    `matches` and at `Figure`.
    """

    __slots__ = ("_ready",)  # in no `vars`, which are the sums

    def __init__(self, ready: tuple[Mapping[str, float], Tensor] | None = None, **sums: Tensor):
        """`ready`: the objective with these λ, its gradients already formed, where it is."""
        super().__init__(**sums)
        self._ready = ready

    @staticmethod
    def weights(loss: LossConfig, kd_ramp: float = 1.0) -> dict[str, float]:
        """The λ of each term; `kd_ramp` is the warm-up of the student-space term (D6)."""
        return {term.name: term.weight(loss, kd_ramp) for term in every_term()}

    def total(self, loss: LossConfig, kd_ramp: float = 1.0) -> Tensor:
        """The objective: sums weighted by the λ of `loss`.

            λ_CE ce + λ_KD (kd_ramp · student_kd + teacher_kd + t2s_ce + uld)
                    + λ_cos hidden_cosine + λ_DTW (hidden_dtw + embed_dtw)

        The trainer divides it by the label tokens of the whole optimizer step. Terms of weight 0
        stay out of the graph, so that backward does not visit them.
        """
        weights = self.weights(loss, kd_ramp)
        if self._ready is not None and self._ready[0] == weights:
            return self._ready[1]
        kept = [weight * getattr(self, name) for name, weight in weights.items() if weight != 0]
        zero: Tensor = 0.0 * self.ce
        return torch.stack(kept).sum() if kept else zero


def dwakd_loss(
    student: ResponseStates,
    teacher: ResponseStates | None,
    projectors: ProjectorSet | None,
    *,
    loss: LossConfig = DEFAULT_LOSS,
    soft_dtw: SoftDTWConfig = DEFAULT_SOFT_DTW,
    gamma: float | None = None,
    kd_ramp: float = 1.0,
    teacher_space: bool = True,
) -> LossTerms:
    """The terms of DWA-KD for one batch, as sums.

    Shapes::

        B      samples                     S, T    student / teacher response positions
        d, D   student / teacher width     Vs, Vt  rows of the student / teacher head

        student   e_in, e_tgt, h  (B, S, d)   Ws (Vs, d)   y (B, S)
        teacher   f_in, f_tgt, g  (B, T, D)   Wt (Vt, D)

    `loss.matching` says who learns from whom (`matches`), and with the weights which sums there are
    (`terms`): their files have the equations (of arXiv 2602.21669), `variants` the record. In all,

    - D1  positions are those with a label, gathered in order: `ResponseStates` holds nothing else.
    - D2  std, weights and band are per sample; padding and the other samples change nothing.
    - D3  everything but the heads' products is in float32 at least, under autocast too.
    - D6  the ramp of the student-space term is `LossTerms.total`'s. With the same `kd_ramp` here,
          a loss whose weights of tokens are known beforehand (`Term.weights`) forms the gradient
          of its total in forward, and backward goes through no head again.
    - D8  `gamma` is the schedule's current value; default: `soft_dtw.gamma_start`.
    - D9  Vs and Vt are the heads' rows.

    `teacher` may be None where `loss.needs_teacher` is not, and `projectors` where
    `trained_projectors` has none.

    Constants: everything of the teacher, the embeddings in the query, all weights, and the band.
    A term whose weight is 0 is not computed, nor is `teacher_kd` with `teacher_space=False`. A
    sample without a teacher side contributes its `ce` only; one without a student side contributes
    nothing. With no label at all every term is 0 with a graph, and the student's states, its head
    and the projectors get zero gradients (not None).

    >>> import torch
    >>> from dwakd_plugin.loss import Head
    >>> from dwakd_plugin.models.projectors import Projectors
    >>> seed = torch.manual_seed(0)
    >>> def states(positions, width, vocab, lengths):
    ...     embeds = torch.randn(3, 2, positions, width)
    ...     labels = torch.randint(vocab, (2, positions))
    ...     head = Head(torch.randn(vocab, width))
    ...     return ResponseStates(*embeds, torch.tensor(lengths), head, labels)
    >>> student = states(5, width=8, vocab=50, lengths=[5, 3])
    >>> teacher = states(7, width=12, vocab=90, lengths=[7, 2])
    >>> terms = dwakd_loss(student, teacher, Projectors(8, 12))
    >>> int(terms.student_tokens), int(terms.band_cells)
    (8, 41)
    >>> (terms.total(LossConfig()) / terms.student_tokens).backward()
    """
    if teacher is None:
        if loss.needs_teacher:
            raise ValueError("teacher is None; the loss asks for its states")
        teacher, projectors = no_teacher(student), None
    batch = _batch(student, teacher, projectors, loss, soft_dtw, gamma)
    variant = variant_of(loss)
    if teacher.top is not None and variant.needs_states(loss):
        raise ValueError(f"matching `{loss.matching}` needs the teacher's states; it gives `top`")
    terms = variant.active(loss)
    if min(*student.hidden.shape[:2], teacher.hidden.shape[1]) == 0:
        terms = tuple(term for term in terms if term.role == "labels")
    kernels = [term.kernel(batch) for term in terms if term.kernel is not None]
    passes = HeadPasses(batch, variant.match(batch), next(iter(kernels), LABELS_ALONE))
    passes = replace(passes, weights=_column_weights(passes, terms, kd_ramp))
    sums: dict[str, Tensor] = {}
    # Autocast would take the attention and the costs back to half precision (D3).
    with torch.autocast(student.hidden.device.type, enabled=False):
        for term in terms:
            if teacher_space or "s2t" not in term.trains:
                sums |= term.value(passes)
        sums |= passes.match.sums()
        zero = batch.zero()
    weighted = {term.name for term in every_term()}
    named = {
        name: zero + sums[name] if name in weighted & sums.keys() else sums.get(name, zero)
        for name in every_sum()
    }
    counts = {
        "student_tokens": student.lengths.sum(),
        "teacher_tokens": batch.teacher_side.lengths.sum(),
        "distilled_tokens": batch.student_side.lengths.sum(),
    }
    figures = {
        name: value.detach().to(batch.dtype)
        for name, value in named.items()
        if name not in weighted
    }
    ready = None
    if passes.weights is not None and passes.weighted is not None:
        beside = [(term, sums[term.beside]) for term in terms if term.beside in sums]
        whole = sum((term.weight(loss, kd_ramp) * value for term, value in beside), zero)
        ready = LossTerms.weights(loss, kd_ramp), whole + passes.weighted
    return LossTerms(ready, **named | figures | counts)


def _column_weights(
    passes: HeadPasses[Match], terms: Sequence[Term], kd_ramp: float
) -> list[Tensor] | None:
    """The weight of each token's columns in the objective.

    None where a term has none beforehand, or no term reads a column.

    (B, S) for each differentiable column of the student's pass.
    """
    shape = passes.batch.student.hidden.shape[:2]
    none = passes.batch.student.hidden.new_zeros(shape, dtype=passes.batch.dtype)
    weights, read = [none] * passes.kernel.differentiable, False
    for term in terms:
        own = None if term.weights is None else term.weights(passes)
        if own is None:
            return None
        scale = term.weight(passes.batch.loss, kd_ramp)
        for column, each in enumerate(own):
            weights[column], read = weights[column] + scale * each, True
    return weights if read else None


@dataclass(frozen=True)
class Alignment:
    """How the tokens of a batch align in the loss, as constants.

    attention     (B, S, T)  A: where each student position looks, rows summing to 1; where tokens
                             are matched exactly, 1 at each pair and 0 elsewhere
    inside        (B, S, T)  bool, the cells within the band; None where there is no band
    hidden_path   (B, S, T)  E of the pair (h, t2s(g))
    embed_path    (B, S, T)  E of the pair (e_tgt, embed_t2s(f_tgt))

    E = ∂ sDTW / ∂ cost is the expected alignment: E_ij is the probability that a path drawn with
    weight exp(−cost / γ) goes through the cell (i, j). All are 0 (or False) at padding.
    """

    attention: Tensor
    inside: Tensor | None
    hidden_path: Tensor
    embed_path: Tensor


@torch.no_grad()
def alignment_of(
    student: ResponseStates,
    teacher: ResponseStates,
    projectors: ProjectorSet,
    *,
    soft_dtw: SoftDTWConfig = DEFAULT_SOFT_DTW,
    gamma: float | None = None,
) -> Alignment:
    """The alignment that `dwakd_loss` computes within, for pictures: same arguments, same steps."""
    matching: type[Projecting] = Attention if student.pairs is None else SameToken
    batch = _batch(student, teacher, projectors, DEFAULT_LOSS, soft_dtw, gamma)
    with torch.autocast(student.hidden.device.type, enabled=False):
        match = matching(batch)
        hidden_path, embed_path = (
            expected_alignments(
                [cost_between(unit_vectors(x)[0], unit_vectors(y)[0], match.penalty)],
                [(batch.student_side.lengths, batch.teacher_side.lengths)],
                batch.gamma,
            )[0][1]
            for x, y in (hidden_pair(batch), embed_pair(batch))
        )
        inside = match.inside if soft_dtw.band else None
        return Alignment(match.matrix, inside, hidden_path, embed_path)


def _batch(
    student: ResponseStates,
    teacher: ResponseStates,
    projectors: ProjectorSet | None,
    loss: LossConfig,
    soft_dtw: SoftDTWConfig,
    gamma: float | None,
) -> Batch:
    device = student.hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    gamma = soft_dtw.gamma_start if gamma is None else gamma
    return Batch(student, teacher.detached(), projectors, loss, soft_dtw, gamma, product)
