"""What the loss allocates, whatever its variant: its own code runs in small, and is watched.

Which tensors there are follows from the variant's record alone: its match, its terms, its
projectors. Soft-DTW is left out, as its kernels read their input (`soft_dtw`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwakd_plugin.loss import (
    ContinuationTable,
    Head,
    ResponseStates,
    SpellingTable,
    TopTokens,
    dwakd_loss,
    trained_projectors,
    variant_of,
)
from dwakd_plugin.loss.token_order import token_order
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.plan.trace import Events, forget_gradient, record, run
from dwakd_plugin.recipe.schema import LossConfig

# The most of `mapped`'s tables that one position may ask for, by the rows of the teacher's and of
# the student's head, and the share of the teacher's positions that spell a token of the student's:
# the largest that was seen of five pairs (Qwen1.5, GPT-2, Mistral, TinyLlama, SmolLM2).
CONTINUATIONS, SPELLINGS, SPELT_SHARE = 0.04, 0.04, 0.17

# Run in small, and scaled. What counts of a loss grows with tokens times features, or with tokens
# times tokens: both are made smaller alike. Of the heads' part, only the rows are many.
LENGTH, LEAST_WIDTH = 96, 8
TOKENS, FEW, WIDTH, ROWS = 128, 8, 64, 2**14


@dataclass(frozen=True)
class LossSizes:
    """What the loss's memory depends on; S and T are response tokens of one sample.

    product: the dtype of the heads' products under mixed precision. top_k: how many likely tokens
    the teacher gives instead of states.
    """

    S: int
    T: int
    d: int
    D: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    head_dtype: torch.dtype
    head_trained: bool
    product: torch.dtype | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class HeadTrace:
    """A loss's way through the heads; peaks are of forward and of backward.

    both      bytes of logits for each token of a chunk
    ours, theirs  the same of the student's head alone, and of the teacher's
    copies    bytes for each number of the student's head: its gradient, or itself in another dtype,
              at most, behind forward, and behind backward
    teacher_copies  the same of the teacher's, at most
    products  with the student's and with the teacher's head, for a token, forward and backward
    """

    both: tuple[float, float]
    ours: tuple[float, float]
    theirs: tuple[float, float]
    copies: tuple[int, int, int]
    teacher_copies: int
    products: tuple[float, float]

    def at(self, student_chunk: int, teacher_chunk: int) -> tuple[float, float]:
        """Peaks in bytes, by the tokens that may go through each head at once. Where logits of
        both are there at once, these are as many as both may have."""
        forward, backward = (
            both * min(student_chunk, teacher_chunk)
            if both > 1.1 * max(ours, theirs)
            else max(ours * student_chunk, theirs * teacher_chunk)
            for both, ours, theirs in zip(self.both, self.ours, self.theirs, strict=True)
        )
        return forward, backward


def trace_loss(sizes: LossSizes, loss: LossConfig, *, compiled: bool) -> Events:
    """What the loss allocates for one sample beside logits and soft-DTW, which grow otherwise."""
    widths = [width for width in (sizes.d, sizes.D) if width]
    scale = max(1.0, min(max(sizes.S, sizes.T) / LENGTH, min(widths) / LEAST_WIDTH))
    small = _scaled(sizes, ("S", "T", "d", "D", "top_k"), scale)
    events = record(_Run(small, loss, (2, 2), SPELT_SHARE / 2, compiled).prepare)
    return replace(events, fixed=scale**2 * events.fixed, each=scale**2 * events.each)


def _scaled(sizes: LossSizes, names: tuple[str, ...], scale: float) -> LossSizes:
    known = {name: getattr(sizes, name) for name in names if getattr(sizes, name)}
    smaller: dict[str, Any] = {name: max(1, round(size / scale)) for name, size in known.items()}
    return replace(sizes, **smaller)


def trace_heads(
    sizes: LossSizes, loss: LossConfig, rows: tuple[int, int], *, spelt: bool, compiled: bool
) -> HeadTrace:
    """The heads' part: of few tokens of narrow states nothing but logits counts, and what wide
    states add is of a head's size.

    rows: of the student's and of the teacher's head. spelt: with as many places as there are
    positions where a spelling of the teacher's begins, and as many where one goes on. compiled: by
    the kernels for a CPU, where there are any.
    """
    scale = max(rows) / ROWS
    s, t = (max(64, round(number / scale)) for number in rows)
    narrow = _scaled(
        replace(sizes, S=TOKENS, T=TOKENS, d=2, D=2 if sizes.D else 0), ("top_k",), scale
    )

    def course(sizes: LossSizes, rows: tuple[int, int]) -> tuple[np.ndarray, int, int]:
        one = _Run(sizes, loss, rows, float(spelt), compiled)
        events, forward, products = run(one.prepare, 1)
        return np.cumsum([0, *events]), forward, products

    peaks, products = [], []
    for some in ((s, t), (s, 2), (2, t)):
        bytes_, forward, multiplied = course(narrow, some)
        each = bytes_ * scale / TOKENS
        peaks.append((float(each[: forward + 1].max()), float(each[forward:].max())))
        products.append(multiplied / (2 * TOKENS))
    few = replace(narrow, S=FEW, T=FEW)
    (thin, *_), (wide, forward, _) = (course(each, (s, 2)) for each in (few, replace(few, d=WIDTH)))
    # Numbers of two bytes at least; states are too few to count.
    copies = 2 * np.rint((wide - thin) / (2 * s * (WIDTH - 2))).astype(int)
    cast = sizes.product not in (None, sizes.teacher_dtype) and sizes.top_k is None
    return HeadTrace(
        both=peaks[0],
        ours=peaks[1],
        theirs=peaks[2],
        copies=(int(copies.max()), int(copies[forward]), int(copies[-1])),
        teacher_copies=sizes.product.itemsize if cast and sizes.product is not None else 0,
        products=(products[1] / s, products[2] / t),
    )


class _Run:
    """A loss made ready for `record` and `run`."""

    def __init__(
        self,
        sizes: LossSizes,
        loss: LossConfig,
        rows: tuple[int, int],
        spelt: float,
        compiled: bool,
    ) -> None:
        self.compiled = compiled
        self.sizes, self.loss = sizes, loss
        self.rows, self.match = rows, variant_of(loss).match
        # Where spellings begin, and as many where they go on.
        self.spelt = min(sizes.S, round(spelt * sizes.T)) if self.spells else 0
        self.tables = tables(*rows)
        self.projectors = self._projectors()
        d, D = sizes.d, 0 if sizes.top_k else sizes.D
        self.student_head = torch.zeros(
            rows[0], d, dtype=sizes.head_dtype, requires_grad=sizes.head_trained
        )
        self.teacher_head = torch.zeros(rows[1], D, dtype=sizes.teacher_dtype)

    @property
    def inside(self) -> bool:
        return self.match.rows == "prefix" and self.loss.inside_tokens == "condition"

    @property
    def spells(self) -> bool:
        return self.inside and self.sizes.top_k is None

    def _projectors(self) -> Projectors | None:
        trained = trained_projectors(self.loss)
        if not trained:
            return None
        projectors = Projectors(self.sizes.d, self.sizes.D)
        for name, layer in projectors.named_children():
            layer.requires_grad_(name in trained)
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(forget_gradient)
        return projectors

    def prepare(self, batch: int) -> tuple[list[Tensor], Callable[[], Tensor]]:
        # Soft-DTW's memory is plain arithmetic, and chunks are `HeadTrace.at`'s.
        loss = self.loss.model_copy(
            update={"dtw_weight": 0.0, "chunk_size": 8 * max(self.sizes.S, self.sizes.T)}
        )
        known = [] if self.projectors is None else [*self.projectors.parameters()]
        product = self.sizes.product

        def forward() -> Tensor:
            teacher = self._teacher(batch) if loss.needs_teacher else None
            with torch.autocast("cpu", dtype=product, enabled=product is not None):
                terms = dwakd_loss(
                    self._student(batch), teacher, self.projectors, loss=loss, gamma=1.0
                )
            return terms.total(loss)

        # The embeddings and the states are the loss's to hold, and not known before.
        return [*known, self.student_head, self.teacher_head], forward

    def _student(self, batch: int) -> ResponseStates:
        sizes, S = self.sizes, self.sizes.S
        embeds = sizes.d if variant_of(self.loss).needs_embeds(self.loss) else 0
        widths = (embeds, embeds, sizes.d)
        states = [
            torch.zeros(batch, S, width, dtype=sizes.student_dtype, requires_grad=trained)
            for width, trained in zip(widths, (False, embeds > 0, True), strict=True)
        ]
        if not self.compiled:  # such kernels are for plain tensors
            states[-1] = nn.Parameter(states[-1].detach())
        pairs = min(S, sizes.T)
        return ResponseStates(
            *states,
            lengths=torch.full((batch,), S),
            head=Head(self.student_head),
            labels=torch.zeros(batch, S, dtype=torch.long),
            index=torch.arange(batch * S),
            pairs=self._places(batch, S, pairs) if self.match.rows else None,
            read=torch.zeros(batch * pairs, dtype=torch.long) if self.inside else None,
            spelt=self._places(batch, S, self.spelt).repeat(2) if self.spelt else None,
            spelt_read=torch.ones(batch * self.spelt, dtype=torch.long) if self.spelt else None,
        )

    def _teacher(self, batch: int) -> ResponseStates:
        sizes, T = self.sizes, self.sizes.T
        width, top = sizes.D, None
        if (k := sizes.top_k) is not None:
            width = 0
            ids = torch.zeros(batch, T, k, dtype=torch.int32)
            top = TopTokens(ids, torch.zeros(batch, T, k))
        states = [torch.zeros(batch, T, width, dtype=sizes.teacher_dtype) for _ in range(3)]
        token_map, continuations, spellings = self.tables
        return ResponseStates(
            *states,
            lengths=torch.full((batch,), T),
            head=Head(self.teacher_head),
            index=torch.arange(batch * T),
            pairs=self._places(batch, T, min(sizes.S, T)) if self.match.rows else None,
            token_map=token_map if self.match.rows else None,
            continuations=continuations if self.inside else None,
            spelt=self._places(batch, T, self.spelt).repeat(2) if self.spelt else None,
            spellings=spellings if self.spells else None,
            top=top,
        )

    @staticmethod
    def _places(batch: int, length: int, count: int) -> Tensor:
        """The first `count` of each sample's, in the flattened (batch · length)."""
        return (torch.arange(batch)[:, None] * length + torch.arange(count)).flatten()


def tables(student_rows: int, teacher_rows: int) -> tuple[Tensor, ContinuationTable, SpellingTable]:
    """A map onto the student's tokens and what goes with it, as large as those of real pairs."""
    starts = [0, 0]

    def tokens(count: int, rows: int) -> Tensor:
        return torch.arange(count) % rows

    token_map = tokens(teacher_rows, student_rows)
    inside = max(1, int(CONTINUATIONS * teacher_rows))
    continuations = ContinuationTable(
        torch.tensor([*starts, inside]), tokens(inside, teacher_rows), tokens(inside, student_rows)
    )
    entries = max(2, int(SPELLINGS * student_rows))
    outcomes = tokens(max(1, entries // 4), teacher_rows)
    spellings = SpellingTable(
        firsts=tokens(student_rows, teacher_rows),
        groups=tokens(teacher_rows, min(student_rows, teacher_rows)),
        starts=torch.tensor([*starts, entries]),
        student_tokens=tokens(entries, student_rows),
        places=tokens(entries, len(outcomes) + 1).sort().values,
        outcome_starts=torch.tensor([*starts, len(outcomes)]),
        outcomes=outcomes,
    )
    # What is found once in a run is found now.
    for each in (token_map, *spellings.by_first[1:]):
        token_order(each)
    continuations.in_order, spellings.longest  # noqa: B018
    continuations.after(torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    return token_map, continuations, spellings
