"""The DWA-KD objective (arXiv 2602.21669): dual-space distillation plus time-warped alignment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwakd_plugin.loss.alignment import (
    attention_band,
    attention_entropy,
    attention_spread,
    band_penalty,
    cross_model_attention,
    pair_band,
    standardise_scale,
    valid_positions,
)
from dwakd_plugin.loss.divergence import most_likely
from dwakd_plugin.loss.sequence_level import (
    cost_between,
    normalised_soft_dtw,
    soft_dtw_and_path,
    unit_vectors,
)
from dwakd_plugin.loss.states import (
    Head,
    ProjectorSet,
    ResponseStates,
    gathered,
    required_labels,
    response_index,
)
from dwakd_plugin.loss.token_level import (
    Matched,
    chunk_of,
    cross_entropy,
    in_order_sums,
    mapped_sums,
    student_space_sums,
    teacher_space_sums,
)
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig

DEFAULT_LOSS = LossConfig.model_validate({})
DEFAULT_SOFT_DTW = SoftDTWConfig.model_validate({})


@dataclass(frozen=True)
class LossTerms:
    """Sums over tokens and samples, as scalar tensors. The terms are not weighted by any λ.

    With a graph, 0 where the configuration leaves a term out:

    ce              Σ −log p_s(y)
    t2s_ce          Σ −log p_t2s(target), y or with exact matching the teacher's own prediction
    student_kd      Σ w_s D(p_t2s ‖ p_s)
    teacher_kd      Σ w_t KL(p_t ‖ p_s2t)
    hidden_dtw      Σ nDTW(h, t2s(g))
    embed_dtw       Σ nDTW(e_tgt, embed_t2s(f_tgt))
    uld             Σ of the distances between sorted probabilities

    Detached, for reports:

    student_tokens      student tokens with a label: the denominator of `ce`
    teacher_tokens      teacher tokens in samples that have a student side: of `teacher_kd`
    distilled_tokens    student tokens in samples that have a teacher side: of `student_kd`,
                        `t2s_ce`, `uld`, `attention_entropy` and the two DTW terms
    paired_tokens       those of them that have a teacher's token to learn from: all with attention,
                        otherwise those with a counterpart; of `t2s_correct` and `gate`
    t2s_correct         where the projected teacher's argmax is the target of `t2s_ce`
    gate                Σ g, the confidence of the projected teacher
    teacher_ce          Σ −log p_t(teacher's label) where the teacher-space term compares, in nats;
                        0 without it, and without the teacher's labels
    paired_ce           the same text's Σ −log p_s(y): of the paired tokens
    teacher_end_ce      of `teacher_ce` and `paired_ce`, what the last position of each sample adds,
    end_ce              which as a rule says where a response ends
    end_tokens          the samples of these two
    attention_entropy   Σ H(A_i), in nats; of attention to one and the same position each
    attention_spread    Σ H(mean A) of the token's sample, which says how much of the row is looked
                        at by any, and
    attention_limit     Σ log T of the token's sample, the most that both can be
    band_cells_inside   cells (i, j) within the band, of
    band_cells          all cells; both 0 without a band
    """

    ce: Tensor
    t2s_ce: Tensor
    student_kd: Tensor
    teacher_kd: Tensor
    hidden_dtw: Tensor
    embed_dtw: Tensor
    uld: Tensor
    student_tokens: Tensor
    teacher_tokens: Tensor
    distilled_tokens: Tensor
    paired_tokens: Tensor
    t2s_correct: Tensor
    gate: Tensor
    teacher_ce: Tensor
    paired_ce: Tensor
    teacher_end_ce: Tensor
    end_ce: Tensor
    end_tokens: Tensor
    attention_entropy: Tensor
    attention_spread: Tensor
    attention_limit: Tensor
    band_cells_inside: Tensor
    band_cells: Tensor

    @staticmethod
    def weights(loss: LossConfig, kd_ramp: float = 1.0) -> dict[str, float]:
        """The λ of each term; `kd_ramp` is the warm-up of the student-space term (D6)."""
        return {
            "ce": loss.ce_weight,
            "student_kd": loss.kd_weight * kd_ramp,
            "teacher_kd": loss.kd_weight,
            "t2s_ce": loss.kd_weight,
            "uld": loss.kd_weight,
            "hidden_dtw": loss.dtw_weight,
            "embed_dtw": loss.dtw_weight,
        }

    def total(self, loss: LossConfig, kd_ramp: float = 1.0) -> Tensor:
        """The objective: sums weighted by the λ of `loss`.

            λ_CE ce + λ_KD (kd_ramp · student_kd + teacher_kd + t2s_ce + uld)
                    + λ_DTW (hidden_dtw + embed_dtw)

        The trainer divides it by the label tokens of the whole optimizer step. Terms of weight 0
        stay out of the graph, so that backward does not visit them.
        """
        weights = self.weights(loss, kd_ramp)
        kept = [weight * getattr(self, name) for name, weight in weights.items() if weight != 0]
        return torch.stack(kept).sum() if kept else 0.0 * self.ce


def dwakd_loss(
    student: ResponseStates,
    teacher: ResponseStates | None,
    projectors: ProjectorSet | None,
    *,
    loss: LossConfig = DEFAULT_LOSS,
    soft_dtw: SoftDTWConfig = DEFAULT_SOFT_DTW,
    gamma: float | None = None,
    teacher_space: bool = True,
) -> LossTerms:
    """The terms of DWA-KD for one batch, as sums.

    Shapes::

        B      samples                     S, T    student / teacher response positions
        d, D   student / teacher width     Vs, Vt  rows of the student / teacher head

        student   e_in, e_tgt, h  (B, S, d)   Ws (Vs, d)   y (B, S)
        teacher   f_in, f_tgt, g  (B, T, D)   Wt (Vt, D)

    Equations (per sample; numbers of arXiv 2602.21669)::

        A, B     = softmax of query([e_in; e_tgt]) · N([f_in; f_tgt])ᵀ / √(2D)            (1, 2)
        p_t2s    = softmax(A t2s(N(f_tgt) + N(g)) Wsᵀ)      p_s2t = softmax(B s2t(h) Wtᵀ)
        w_s      ∝ H(p_s) · max p_t2s                       w_t   ∝ 1 − H(p_t) / log Vt   (11-14)
        KD       = Σ w_s D(p_t2s ‖ p_s) + Σ w_t KL(p_t ‖ p_s2t) + CE(p_t2s, y)            (15, 16)
        DTW      = nDTW(h, t2s(g)) + nDTW(e_tgt, embed_t2s(f_tgt))                        (17-25)

    Decisions where the paper is silent:

    - D1  positions are those with a label, gathered in order: `ResponseStates` holds nothing else.
    - D2  std, weights and band are per sample; padding and the other samples change nothing.
    - D3  everything but the heads' products is in float32 at least, under autocast too.
    - D4  temperature τ on both sides of both divergences, without a factor τ²; entropies, gate
      and cross-entropies at temperature 1.
    - D5  `loss.divergence` chooses D; the teacher-space term is always forward KL.
    - D6  the ramp of the student-space term is `LossTerms.total`'s.
    - D7  in DTW, `t2s` is applied to the raw g, and e_tgt is not detached.
    - D8  `gamma` is the schedule's current value; default: `soft_dtw.gamma_start`.
    - D9  Vs and Vt are the heads' rows.

    `loss.matching` replaces the attention. In the first two of these forms a term is its mean over
    the tokens that are compared, times the sample's length on its side, so that a sample's share is
    the same in all::

        exact    pairs (i, j) of positions that predict the same bytes (DSKDv2, arXiv 2504.11426)
                 h_t2s,i = t2s(g_j), h_s2t,j = s2t(h_i); CE_t2s against the teacher's argmax, and
                 D only where p_t2s has the same argmax; the band's centres lie on the pairs
        order    pairs (i, i), and nothing but Σ_r |p_s(r) − p_t(r)| of sorted probabilities
                 (ULD, arXiv 2402.12030)
        mapped   pairs (i, j) of positions that have read the same bytes, and nothing but
                 D(p_map,i ‖ p_s,i), p_map the teacher's probabilities summed by the student's
                 tokens that they begin with; −log p_s(y) where there is no pair (`mapped_sums`)

    `teacher` may be None where `loss.needs_teacher` is not, and `projectors` where
    `loss.trained_projectors` is empty.

    Constants: everything of the teacher, the embeddings in the query, Ws in p_t2s, p_t2s as the
    target of D, all weights, and the band.

    A term whose weight is 0 is not computed, nor is `teacher_kd` with `teacher_space=False` (the
    dearest term: two products with the teacher's head). A sample without a teacher side contributes
    its `ce` only; one without a student side contributes nothing. With no label at all every term
    is 0 with a graph, and the student's states, its head and the projectors get zero gradients (not
    None).

    >>> import torch
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
    distill, warp = loss.kd_weight > 0, loss.dtw_weight > 0
    if teacher is None:
        if loss.needs_teacher:
            raise ValueError("teacher is None; the loss asks for its states")
        teacher, projectors = _no_teacher(student), None
    if min(*student.hidden.shape[:2], teacher.hidden.shape[1]) == 0:
        distill = warp = False
    exact = loss.matching == "exact"
    projected = loss.matching in ("attention", "exact")
    student_lengths, teacher_lengths = _paired_lengths(student, teacher)
    dtype = _dtype(student, teacher)

    sums: dict[str, Tensor] = {}
    if (distill or warp) and projected:
        assert projectors is not None
        student_side, teacher_side = _sides(student, teacher)
        predicted = _predicted(student, teacher, loss) if exact and distill else None
        # Autocast would take the attention and the costs back to half precision (D3).
        with torch.autocast(student.hidden.device.type, enabled=False):
            if not exact and (distill or soft_dtw.band):
                attention, reverse_attention = _attend(student_side, teacher_side, projectors)
                sums["attention_entropy"] = attention_entropy(attention).sum()
                spread = attention_spread(attention, student_lengths)
                sums["attention_spread"] = (student_lengths * spread).sum()
                limit = teacher_lengths.clamp_min(1).to(dtype).log()
                sums["attention_limit"] = (student_lengths * limit).sum()
            if predicted is not None:
                matched = _match_exactly(
                    student, teacher, student_side, teacher_side, projectors, predicted
                )
            elif distill:
                matched = Matched(
                    attention @ _values(teacher_side, projectors),
                    reverse_attention @ _project(projectors.s2t, student_side.hidden),
                    required_labels(student),
                    student_side.valid,
                    teacher_side.valid,
                    response_index(teacher),
                )
    if distill and loss.matching == "order":
        sums |= in_order_sums(student, teacher, student_lengths, teacher_lengths, loss)
    elif distill and loss.matching == "mapped":
        sums |= mapped_sums(student, teacher, student_lengths, loss)
    elif distill:
        student_ends, teacher_ends = matched.at_end(student_lengths, teacher_lengths)
        sums |= student_space_sums(student, matched, student_lengths, student_ends, loss)
        if teacher_space:
            sums |= teacher_space_sums(teacher, matched, teacher_lengths, teacher_ends, loss)
    elif loss.ce_weight > 0:
        sums["ce"] = cross_entropy(student, loss)
    # After the heads, and so before them in backward: what it keeps is not there while they work.
    if warp:
        assert projectors is not None
        with torch.autocast(student.hidden.device.type, enabled=False):
            penalty = None
            if soft_dtw.band:
                inside = (
                    _band_of_pairs(student, teacher, student_lengths, teacher_lengths, soft_dtw)
                    if exact
                    else attention_band(attention, student_lengths, teacher_lengths, soft_dtw)
                )
                penalty = band_penalty(inside, soft_dtw, dtype)
                sums["band_cells_inside"] = inside.sum()
                sums["band_cells"] = (student_lengths * teacher_lengths).sum()
            gamma = soft_dtw.gamma_start if gamma is None else gamma
            sums |= _sequence_level(student_side, teacher_side, projectors, penalty, gamma)

    zero = _zero_with_graph(student, teacher, projectors, with_head=loss.ce_weight == 0)
    zero = zero.to(dtype)

    def term(name: str) -> Tensor:
        return zero + sums[name] if name in sums else zero

    def figure(name: str) -> Tensor:
        return sums.get(name, zero).detach().to(dtype)

    return LossTerms(
        ce=term("ce"),
        t2s_ce=term("t2s_ce"),
        student_kd=term("student_kd"),
        teacher_kd=term("teacher_kd"),
        hidden_dtw=term("hidden_dtw"),
        embed_dtw=term("embed_dtw"),
        uld=term("uld"),
        student_tokens=student.lengths.sum(),
        teacher_tokens=teacher_lengths.sum(),
        distilled_tokens=student_lengths.sum(),
        paired_tokens=figure("paired_tokens"),
        t2s_correct=figure("t2s_correct"),
        gate=figure("gate"),
        teacher_ce=figure("teacher_ce"),
        paired_ce=figure("paired_ce"),
        teacher_end_ce=figure("teacher_end_ce"),
        end_ce=figure("end_ce"),
        end_tokens=figure("end_tokens"),
        attention_entropy=figure("attention_entropy"),
        attention_spread=figure("attention_spread"),
        attention_limit=figure("attention_limit"),
        band_cells_inside=figure("band_cells_inside"),
        band_cells=figure("band_cells"),
    )


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
    student_side, teacher_side = _sides(student, teacher)
    student_lengths, teacher_lengths = student_side.lengths, teacher_side.lengths
    with torch.autocast(student.hidden.device.type, enabled=False):
        if student.pairs is not None:
            columns = torch.arange(1, teacher.hidden.shape[1] + 1, device=student.hidden.device)
            paired = _partners(student, teacher)[..., None] == columns
            attention = paired.to(student_side.hidden.dtype)
        else:
            attention, _ = _attend(student_side, teacher_side, projectors)
        inside, penalty = None, None
        if soft_dtw.band:
            inside = (
                attention_band(attention, student_lengths, teacher_lengths, soft_dtw)
                if student.pairs is None
                else _band_of_pairs(student, teacher, student_lengths, teacher_lengths, soft_dtw)
            )
            penalty = band_penalty(inside, soft_dtw, attention.dtype)
        gamma = soft_dtw.gamma_start if gamma is None else gamma
        hidden_path, embed_path = (
            soft_dtw_and_path(
                cost_between(unit_vectors(x)[0], unit_vectors(y)[0], penalty),
                student_lengths,
                teacher_lengths,
                gamma,
            )[1]
            for x, y in _sequence_pairs(student_side, teacher_side, projectors)
        )
    return Alignment(attention, inside, hidden_path, embed_path)


@dataclass(frozen=True)
class _Side:
    """One model's states in the loss's dtype, zero at padding, of the samples with both sides."""

    input_embeds: Tensor
    target_embeds: Tensor
    hidden: Tensor
    lengths: Tensor  # (B,)
    valid: Tensor  # (B, L)


def _paired_lengths(student: ResponseStates, teacher: ResponseStates) -> tuple[Tensor, Tensor]:
    """Lengths (B,) of both sides, in two-sided terms: 0 where a sample has one side only."""
    paired = (student.lengths > 0) & (teacher.lengths > 0)
    return student.lengths * paired, teacher.lengths * paired


def _dtype(student: ResponseStates, teacher: ResponseStates) -> torch.dtype:
    """float32 at least (D3)."""
    dtype = torch.promote_types(student.hidden.dtype, teacher.hidden.dtype)
    return torch.promote_types(dtype, torch.float32)


def _sides(student: ResponseStates, teacher: ResponseStates) -> tuple[_Side, _Side]:
    """Both sides of what is both's; the teacher's without a graph."""
    student_lengths, teacher_lengths = _paired_lengths(student, teacher)
    dtype = _dtype(student, teacher)
    return (
        _side(student, student_lengths, dtype),
        _side(teacher.detached(), teacher_lengths, dtype),
    )


def _side(states: ResponseStates, lengths: Tensor, dtype: torch.dtype) -> _Side:
    """Zero the padding once, so that what it holds reaches no sum, forward or backward."""
    valid = valid_positions(lengths, states.hidden.shape[1])

    def clean(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).where(valid[..., None], 0.0)

    return _Side(
        clean(states.input_embeds),
        clean(states.target_embeds),
        clean(states.hidden),
        lengths,
        valid,
    )


def _project(projector: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Apply a projector in its own dtype and come back to the dtype of the states."""
    parameter = next(_parameters(projector), states)
    return projector(states.to(parameter.dtype)).to(states.dtype)


def _parameters(projector: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    return projector.parameters() if isinstance(projector, nn.Module) else iter(())


def _zero_with_graph(
    student: ResponseStates,
    teacher: ResponseStates,
    projectors: ProjectorSet | None,
    with_head: bool,
) -> Tensor:
    """0 whose backward gives zeros to all that trains here and that no term may reach.

    Without it an ablation, or a batch without labels, leaves gradients None; DDP then waits for
    them, and optimizers skip what other ranks step. Empty slices: padding may hold NaN. Projectors
    are called, as a sharded one has its parameters only while it is.
    """
    trained = [student.hidden, student.target_embeds]
    if projectors is not None:
        read = torch.cat([student.input_embeds[:0], student.target_embeds[:0]], -1).detach()
        trained += [
            _project(projectors.query, read),
            _project(projectors.t2s, teacher.hidden[:0].detach()),
            _project(projectors.s2t, student.hidden[:0].detach()),
            _project(projectors.embed_t2s, teacher.target_embeds[:0].detach()),
        ]
    if with_head:  # a zero of the head's size: only where no cross-entropy reaches it anyway
        trained.append(student.head.weight)
        if student.head.bias is not None:
            trained.append(student.head.bias)
    return torch.stack([tensor[:0].sum().float() for tensor in trained]).sum()


def _attend(student: _Side, teacher: _Side, projectors: ProjectorSet) -> tuple[Tensor, Tensor]:
    """A (B, S, T) and B (B, T, S) from queries of the student and keys of the teacher (Eq. 1)."""
    read = torch.cat([student.input_embeds, student.target_embeds], -1).detach()
    key = torch.cat([teacher.input_embeds, teacher.target_embeds], -1)
    return cross_model_attention(
        _project(projectors.query, read),
        standardise_scale(key, teacher.valid),
        student.valid,
        teacher.valid,
    )


def _values(teacher: _Side, projectors: ProjectorSet) -> Tensor:
    """v = t2s(N(f_tgt) + N(g)): (B, T, d) (Eq. 1, Appendix C)."""
    return _project(
        projectors.t2s,
        standardise_scale(teacher.target_embeds, teacher.valid)
        + standardise_scale(teacher.hidden, teacher.valid),
    )


def _no_teacher(student: ResponseStates) -> ResponseStates:
    """The side of a teacher that is not there: no position in any sample."""
    nothing = student.hidden.new_zeros(student.hidden.shape[0], 0, 0)
    head = Head(student.hidden.new_zeros(0, 0))
    return ResponseStates(nothing, nothing, nothing, torch.zeros_like(student.lengths), head)


def _pairs(student: ResponseStates, teacher: ResponseStates) -> tuple[Tensor, Tensor]:
    if student.pairs is None or teacher.pairs is None:
        raise ValueError("exact matching needs `pairs` of both student and teacher (P,)")
    return student.pairs, teacher.pairs


def _partners(student: ResponseStates, teacher: ResponseStates) -> Tensor:
    """For each student position its pair's number among the teacher's, from 1, or 0: (B, S)."""
    student_pairs, teacher_pairs = _pairs(student, teacher)
    none = torch.zeros(student.hidden.shape[:2], dtype=torch.long, device=student.hidden.device)
    numbers = teacher_pairs % teacher.hidden.shape[1] + 1
    return none.flatten().index_copy(0, student_pairs, numbers).view_as(none)


def _band_of_pairs(
    student: ResponseStates,
    teacher: ResponseStates,
    student_lengths: Tensor,
    teacher_lengths: Tensor,
    config: SoftDTWConfig,
) -> Tensor:
    partners = _partners(student, teacher)
    return pair_band(partners, student_lengths, teacher_lengths, teacher.hidden.shape[1], config)


def _predicted(student: ResponseStates, teacher: ResponseStates, loss: LossConfig) -> Tensor:
    """The teacher's argmax of each pair in the student's vocabulary, −1 where it has none: (P,)."""
    if teacher.token_map is None:
        raise ValueError("exact matching needs the teacher's `token_map` (Vt,)")
    _, teacher_pairs = _pairs(student, teacher)
    hidden = gathered(teacher.hidden, teacher_pairs)
    best = most_likely(hidden, teacher.head.logits, chunk_of(loss, teacher.head))
    return teacher.token_map[best]


def _match_exactly(
    student: ResponseStates,
    teacher: ResponseStates,
    student_side: _Side,
    teacher_side: _Side,
    projectors: ProjectorSet,
    predicted: Tensor,
) -> Matched:
    """Each position of a pair learns from the other, where `predicted` (P,) is not −1."""
    student_pairs, teacher_pairs = _pairs(student, teacher)
    used = predicted >= 0

    def placed(values: Tensor, index: Tensor, side: _Side) -> Tensor:
        """(P, ...) → (B, L, ...), 0 elsewhere."""
        grid = values.new_zeros(side.valid.numel(), *values.shape[1:])
        return grid.index_copy(0, index, values).view(*side.valid.shape, *values.shape[1:])

    labels = required_labels(student).flatten()
    targets = torch.where(used, predicted, labels[student_pairs])
    return Matched(
        placed(
            _project(projectors.t2s, gathered(teacher_side.hidden, teacher_pairs)),
            student_pairs,
            student_side,
        ),
        placed(
            _project(projectors.s2t, gathered(student_side.hidden, student_pairs)),
            teacher_pairs,
            teacher_side,
        ),
        labels.index_copy(0, student_pairs, targets).view_as(student_side.valid),
        placed(used, student_pairs, student_side),
        placed(used, teacher_pairs, teacher_side),
        teacher_pairs,
        agreeing_only=True,
    )


def _sequence_pairs(
    student: _Side, teacher: _Side, projectors: ProjectorSet
) -> Iterator[tuple[Tensor, Tensor]]:
    """Student's (B, S, d) and teacher's (B, T, d) sequences: hidden states, then embeddings."""
    yield student.hidden, _project(projectors.t2s, teacher.hidden)
    yield student.target_embeds, _project(projectors.embed_t2s, teacher.target_embeds)


def _sequence_level(
    student: _Side, teacher: _Side, projectors: ProjectorSet, penalty: Tensor | None, gamma: float
) -> dict[str, Tensor]:
    """Σ nDTW(h, t2s(g)) and Σ nDTW(e_tgt, embed_t2s(f_tgt)), one after the other (Eq. 25)."""
    hidden, embeds = (
        normalised_soft_dtw(x, y, student.lengths, teacher.lengths, penalty, gamma).sum()
        for x, y in _sequence_pairs(student, teacher, projectors)
    )
    return {"hidden_dtw": hidden, "embed_dtw": embeds}
