"""The sequence level: time-warped alignment of both models' states (Eq. 17-25).

    hidden_dtw = Σ nDTW(h, t2s(g))      embed_dtw = Σ nDTW(e_tgt, embed_t2s(f_tgt))
    nDTW(x, y) = sDTW(x, y) − ½ (sDTW(x, x) + sDTW(y, y))       cost_ij = 1 − cos(x_i, y_j)

`t2s` is applied to the raw g, and e_tgt is not detached (D7). Outside the match's band, cells
between student and teacher cost more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.matches import Banded, Figure
from dwakd_plugin.loss.products import in_full_precision
from dwakd_plugin.loss.record import HeadPasses, Term, no_column
from dwakd_plugin.loss.soft_dtw import expected_alignments as alignments
from dwakd_plugin.loss.soft_dtw import in_one_launch


def unit_vectors(states: Tensor) -> tuple[Tensor, Tensor]:
    """x / ‖x‖, and 1 / ‖x‖ (..., 1). The zero vector stays zero, and 0 stands for its inverse."""
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm.where(norm > 0, 1.0), 0.0)
    return states * inverse, inverse


def cost_between(x: Tensor, y: Tensor, penalty: Tensor | None) -> Tensor:
    """1 − cos(x_i, y_j) of unit vectors x (B, S, F), y (B, T, F), and the band's penalty."""
    with in_full_precision():
        cost = torch.baddbmm(x.new_ones(()), x, y.transpose(1, 2), alpha=-1)
    return cost if penalty is None else cost.add_(penalty)


def normalised_soft_dtw(
    pairs: Sequence[tuple[Tensor, Tensor]],
    x_lengths: Tensor,
    y_lengths: Tensor,
    penalty: Tensor | None,
    gamma: float,
    largest_penalty: float,
) -> tuple[Tensor, ...]:
    """nDTW of each sample (Eq. 17-20, 24), of several pairs x, y of the same lengths.

    The cost is 1 where a vector is zero; `penalty`, which is `largest_penalty` at most, is added
    between x and y only.

    Shapes: x (B, S, F), y (B, T, F), lengths (B,), penalty (B, S, T) → (B,) each.
    """
    settings = x_lengths, y_lengths, penalty, gamma, largest_penalty
    sides = [side for pair in pairs for side in pair]
    return _NormalisedSoftDTW.apply(settings, *sides)  # type: ignore[no-untyped-call, no-any-return]


class _NormalisedSoftDTW(torch.autograd.Function):
    """With the gradients formed in forward, as many costs at a time as are worth it.

    A sample's distance depends on its own rows alone, so one gradient of the size of x and y each
    is all that backward needs. Costs and alignments are gone before the heads want the memory.
    """

    @staticmethod
    @in_full_precision()
    def forward(
        ctx: Any,
        settings: tuple[Tensor, Tensor, Tensor | None, float, float],
        *sides: Tensor,
    ) -> tuple[Tensor, ...]:
        *lengths, penalty, gamma, largest_penalty = settings
        units, scales = zip(*map(unit_vectors, sides), strict=True)
        grads = [torch.zeros_like(unit) for unit in units]
        values = [unit.new_zeros(len(unit)) for unit in units[::2]]
        # x and y lie side by side: those of even number are xs.
        jobs = [
            two for x in range(0, len(units), 2) for two in ((x, x + 1), (x, x), (x + 1, x + 1))
        ]
        shapes = [(len(units[a]), units[a].shape[1], units[b].shape[1]) for a, b in jobs]
        for numbers in in_one_launch(shapes, units[0].device):
            some = [jobs[number] for number in numbers]
            found = alignments(
                [cost_between(units[a], units[b], penalty if a != b else None) for a, b in some],
                [(lengths[a % 2], lengths[b % 2]) for a, b in some],
                gamma,
                largest=1.001 * (2 + largest_penalty),  # of vectors that are units but for rounding
            )
            for (a, b), (value, path) in zip(some, found, strict=True):
                weight = -1.0 if a != b else 0.5
                values[a // 2] -= weight * value
                grads[a].baddbmm_(path, units[b], alpha=weight)
                grads[b].baddbmm_(path.transpose(1, 2), units[a], alpha=weight)
        # Through x / ‖x‖: what lies along the unit vector changes nothing.
        for unit, grad, scale in zip(units, grads, scales, strict=True):
            along = torch.linalg.vecdot(unit, grad)[..., None]
            grad.addcmul_(unit, along, value=-1).mul_(scale)
        ctx.save_for_backward(*grads)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return None, *(grads[side // 2][:, None, None] * own for side, own in enumerate(saved))


def hidden_pair(batch: Batch) -> tuple[Tensor, Tensor]:
    """h (B, S, d) and t2s(g) (B, T, d)."""
    return batch.student_side.hidden, batch.project("t2s", batch.teacher_side.hidden)


def embed_pair(batch: Batch) -> tuple[Tensor, Tensor]:
    """e_tgt (B, S, d) and embed_t2s(f_tgt) (B, T, d)."""
    theirs = batch.project("embed_t2s", batch.teacher_side.target_embeds)
    return batch.student_side.target_embeds, theirs


def _warped(passes: HeadPasses[Banded], name: str) -> Tensor:
    """Σ nDTW of a pair over samples, within the match's band; both pairs are found at once."""
    if name not in passes.shared:
        batch, match = passes.batch, passes.match
        both = normalised_soft_dtw(
            (hidden_pair(batch), embed_pair(batch)),
            batch.student_side.lengths,
            batch.teacher_side.lengths,
            match.penalty,
            batch.gamma,
            batch.soft_dtw.band_penalty if batch.soft_dtw.band else 0.0,
        )
        passes.shared.update(zip(("hidden_dtw", "embed_dtw"), (v.sum() for v in both), strict=True))
    return passes.shared[name]


def _hidden_dtw(passes: HeadPasses[Banded]) -> dict[str, Tensor]:
    sums = {"hidden_dtw": _warped(passes, "hidden_dtw")}
    if passes.batch.soft_dtw.band:
        lengths = passes.batch.student_side.lengths * passes.batch.teacher_side.lengths
        sums |= {"band_cells_inside": passes.match.inside.sum(), "band_cells": lengths.sum()}
    return sums


def _embed_dtw(passes: HeadPasses[Banded]) -> dict[str, Tensor]:
    return {"embed_dtw": _warped(passes, "embed_dtw")}


WARP_HIDDEN = Term(
    "hidden_dtw",
    "warp",
    _hidden_dtw,
    weights=no_column,
    beside="hidden_dtw",
    trains=frozenset({"t2s"}),
    figures=(Figure("band_share", "band_cells_inside", "band_cells"),),
)
WARP_EMBEDS = Term(
    "embed_dtw",
    "warp",
    _embed_dtw,
    weights=no_column,
    beside="embed_dtw",
    trains=frozenset({"embed_t2s"}),
    embeds=True,
)
