"""The sequence level: time-warped alignment of both models' states (Eq. 17-25).

    hidden_dtw = Σ nDTW(h, t2s(g))      embed_dtw = Σ nDTW(e_tgt, embed_t2s(f_tgt))
    nDTW(x, y) = sDTW(x, y) − ½ (sDTW(x, x) + sDTW(y, y))       cost_ij = 1 − cos(x_i, y_j)

`t2s` is applied to the raw g, and e_tgt is not detached (D7). Outside the match's band, cells
between student and teacher cost more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwakd_plugin.loss.batch import Batch
from dwakd_plugin.loss.matches import Figure, Projecting
from dwakd_plugin.loss.products import in_full_precision
from dwakd_plugin.loss.record import HeadPasses, Term
from dwakd_plugin.loss.soft_dtw import soft_dtw as soft_dtw_distance


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


def soft_dtw_and_path(
    cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Soft-DTW (B,) and its gradient, the expected alignment (B, S, T), of a constant cost."""
    with torch.enable_grad():
        values = soft_dtw_distance(cost.requires_grad_(), x_lengths, y_lengths, gamma)
        (path,) = torch.autograd.grad(values, cost, torch.ones_like(values))
    return values.detach(), path


def normalised_soft_dtw(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor,
    y_lengths: Tensor,
    penalty: Tensor | None,
    gamma: float,
) -> Tensor:
    """nDTW of each sample (Eq. 17-20, 24).

    The cost is 1 where a vector is zero; `penalty` is added between x and y only.

    Shapes: x (B, S, F), y (B, T, F), lengths (B,), penalty (B, S, T) → (B,).
    """
    return _NormalisedSoftDTW.apply(  # type: ignore[no-untyped-call, no-any-return]
        x, y, x_lengths, y_lengths, penalty, gamma
    )


class _NormalisedSoftDTW(torch.autograd.Function):
    """With the gradients formed in forward, one cost matrix at a time.

    A sample's distance depends on its own rows alone, so one gradient of the size of x and y each
    is all that backward needs. Costs and alignments are gone before the heads want the memory.
    """

    @staticmethod
    @in_full_precision()
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        x_lengths: Tensor,
        y_lengths: Tensor,
        penalty: Tensor | None,
        gamma: float,
    ) -> Tensor:
        (u, u_scale), (v, v_scale) = unit_vectors(x), unit_vectors(y)
        values, path = soft_dtw_and_path(cost_between(u, v, penalty), x_lengths, y_lengths, gamma)
        u_grad, v_grad = -(path @ v), -(path.transpose(1, 2) @ u)
        for unit, grad, lengths in ((u, u_grad, x_lengths), (v, v_grad, y_lengths)):
            own, path = soft_dtw_and_path(cost_between(unit, unit, None), lengths, lengths, gamma)
            values -= own / 2
            grad.baddbmm_(path, unit, alpha=0.5).baddbmm_(path.transpose(1, 2), unit, alpha=0.5)
        # Through x / ‖x‖: what lies along the unit vector changes nothing.
        for unit, grad, scale in ((u, u_grad, u_scale), (v, v_grad, v_scale)):
            along = torch.linalg.vecdot(unit, grad)[..., None]
            grad.addcmul_(unit, along, value=-1).mul_(scale)
        ctx.save_for_backward(u_grad, v_grad)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seed = grad[:, None, None]
        return *(seed * saved for saved in ctx.saved_tensors), None, None, None, None


def hidden_pair(batch: Batch) -> tuple[Tensor, Tensor]:
    """h (B, S, d) and t2s(g) (B, T, d)."""
    return batch.student_side.hidden, batch.project("t2s", batch.teacher_side.hidden)


def embed_pair(batch: Batch) -> tuple[Tensor, Tensor]:
    """e_tgt (B, S, d) and embed_t2s(f_tgt) (B, T, d)."""
    theirs = batch.project("embed_t2s", batch.teacher_side.target_embeds)
    return batch.student_side.target_embeds, theirs


def warped(passes: HeadPasses[Projecting], x: Tensor, y: Tensor) -> Tensor:
    """Σ nDTW(x, y) over samples, within the match's band."""
    batch, match = passes.batch, passes.match
    lengths = batch.student_side.lengths, batch.teacher_side.lengths
    return normalised_soft_dtw(x, y, *lengths, match.penalty, batch.gamma).sum()


def _hidden_dtw(passes: HeadPasses[Projecting]) -> dict[str, Tensor]:
    sums = {"hidden_dtw": warped(passes, *hidden_pair(passes.batch))}
    if passes.batch.soft_dtw.band:
        lengths = passes.batch.student_side.lengths * passes.batch.teacher_side.lengths
        sums |= {"band_cells_inside": passes.match.inside.sum(), "band_cells": lengths.sum()}
    return sums


def _embed_dtw(passes: HeadPasses[Projecting]) -> dict[str, Tensor]:
    return {"embed_dtw": warped(passes, *embed_pair(passes.batch))}


WARP_HIDDEN = Term(
    "hidden_dtw",
    "warp",
    _hidden_dtw,
    trains=frozenset({"t2s"}),
    figures=(Figure("band_share", "band_cells_inside", "band_cells"),),
)
WARP_EMBEDS = Term("embed_dtw", "warp", _embed_dtw, trains=frozenset({"embed_t2s"}))
