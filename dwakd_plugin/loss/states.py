"""What the loss is told: each model's states of a batch of responses, its head, the projectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dwakd_plugin.loss.alignment import valid_positions
from dwakd_plugin.loss.linear import linear


class ProjectorSet(Protocol):
    """Anything with the four projections (see `dwakd_plugin.models.projectors.Projectors`)."""

    query: Callable[[Tensor], Tensor]  # 2d → 2D
    t2s: Callable[[Tensor], Tensor]  # D → d
    s2t: Callable[[Tensor], Tensor]  # d → D
    embed_t2s: Callable[[Tensor], Tensor]  # D → d


@dataclass(frozen=True)
class Head:
    """A model's output head: logits = softcap(scale · (hidden weightᵀ + bias)).

    weight (V, d), bias (V,); `scale` and `softcap` for the families that have them (Cohere,
    Granite; Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, d) → (N, V): the product in the weight's dtype, the rest in float32 at least (D3)."""
        logits = linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits

    def product_gradient(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient in `hidden weightᵀ + bias` from that in the logits: (N, V), its dtype."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap).square())
        return (grad if self.scale == 1.0 else grad * self.scale).to(self.weight.dtype)

    def rows(self, first: int, last: int) -> Head:
        """The head of the tokens `first` to `last` alone, a view: (last − first, d)."""
        bias = None if self.bias is None else self.bias[first:last]
        return replace(self, weight=self.weight[first:last], bias=bias)

    def detached(self) -> Head:
        """The same head as a constant."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def cast(self, dtype: torch.dtype | None) -> Head:
        """The head as autocast to `dtype` would use it; None where there is no autocast."""
        if dtype is None or self.weight.dtype == torch.float64:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)


_NUMBER = 2**32  # more than any token's id


@dataclass(frozen=True)
class ContinuationTable:
    """What the teacher's tokens go on with for the student, by what it has read of them.

    starts (G + 2,) long, teacher_tokens and student_tokens (E,) long: behind what has the number g,
    1 to G, the teacher's tokens from starts[g] to starts[g + 1] go on with the student's there.
    """

    starts: Tensor
    teacher_tokens: Tensor
    student_tokens: Tensor

    @cached_property
    def in_order(self) -> tuple[int, int, Tensor, Tensor]:
        """The most entries of one number and the most of these for one token of the student's; and
        teacher_tokens and student_tokens with each number's sorted by the latter.

        A GPU is waited for, once.
        """
        counts = self.starts.diff()
        number = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        order = self.student_tokens.argsort(stable=True)
        order = order[number[order].sort(stable=True).indices]
        tokens = self.student_tokens[order]
        pairs = torch.stack([number, tokens])
        repeats = torch.unique_consecutive(pairs, dim=1, return_counts=True)[1]
        most = int(repeats.max()) if len(repeats) else 0
        return int(counts.max()), most, self.teacher_tokens[order], tokens

    @cached_property
    def _by_key(self) -> tuple[Tensor, Tensor]:
        """Number and teacher's token of all entries as one integer, sorted; the student's token."""
        starts, tokens = self.starts, self.teacher_tokens
        numbers = torch.arange(len(starts) - 1, device=starts.device)
        numbers = numbers.repeat_interleave(starts.diff(), output_size=len(tokens))
        keys, order = (numbers * _NUMBER + tokens).sort()
        return keys, self.student_tokens[order]

    def after(self, read: Tensor, teacher_tokens: Tensor) -> Tensor:
        """The student's token that each of the teacher's (C, k) goes on with behind `read` (C,).

        −1 where it does not: (C, k) long.
        """
        keys, student_tokens = self._by_key
        if len(keys) == 0:
            return torch.full_like(teacher_tokens, -1)
        wanted = read[:, None] * _NUMBER + teacher_tokens
        place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return torch.where(keys[place] == wanted, student_tokens[place], -1)


@dataclass(frozen=True)
class SpellingTable:
    """How the teacher spells the student's tokens (`tokenizers.spellings`).

    firsts (Vs,) and groups (Vt,) long: what each is spelt with first, of the teacher's tokens, and
    which of those each of the teacher's stands for, −1 where none. Behind the beginning with the
    number r, 1 to R, the student's tokens student_tokens[starts[r] : starts[r + 1]] go on with the
    outcome of their `places`: 0 for nothing more, n for the n-th of the teacher's tokens
    outcomes[outcome_starts[r] : outcome_starts[r + 1]]. Equal places lie side by side.
    """

    firsts: Tensor
    groups: Tensor
    starts: Tensor
    student_tokens: Tensor
    places: Tensor
    outcome_starts: Tensor
    outcomes: Tensor

    @cached_property
    def by_first(self) -> tuple[int, Tensor, Tensor]:
        """How many of the teacher's tokens any spelling begins with, and `firsts` and `groups` as
        places among these: a GPU is waited for, once."""
        size = len(self.firsts)
        both = torch.cat([self.firsts, self.groups])
        known, places = torch.unique(both.clamp_min(-1), return_inverse=True)
        none = int((known < 0).sum())  # places are those of `known`, which begins with it
        places -= none
        return len(known) - none, places[:size].clone(), places[size:].clone()

    @cached_property
    def longest(self) -> tuple[int, int, int]:
        """The most entries and outcomes that one number has, and the most entries of one outcome:
        a GPU is waited for, once."""
        entries, outcomes = (each.diff() for each in (self.starts, self.outcome_starts))
        number = torch.arange(len(entries), device=entries.device).repeat_interleave(entries)
        outcome = number * (len(self.outcomes) + 1) + self.places
        runs = torch.unique_consecutive(outcome, return_counts=True)[1]
        return int(entries.max()), int(outcomes.max()), int(max(runs, default=0))


class TopTokens(NamedTuple):
    """What a teacher says without its states: the k likeliest next tokens of each position.

    token_ids (..., k) integers, log_probs (..., k) at temperature 1, in order of falling
    probability; where a position has fewer than k, the rest is -1 and -inf.
    """

    token_ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class ResponseStates:
    """One model's view of a batch of responses: response positions only, gathered in order (D1).

    input_embeds    (B, L, d)  embedding of the token read at a position (e_in, f_in)
    target_embeds   (B, L, d)  embedding of the token predicted there (e_tgt, f_tgt)
    hidden          (B, L, d)  the head's input, after the final norm (h, g)
    lengths         (B,) long  response positions of each sample; the rest is padding on the right
    head            the model's output head
    labels          (B, L) long, −100 at padding; required of the student, and of the teacher for
                    the figure `teacher_ce` alone
    index           (N,) long, the response positions' places in the flattened (B · L), in order.
                    Optional: counted from `lengths` where it is missing, for which a GPU is waited
    pairs           (P,) long, places in the flattened (B · L) that have a counterpart in the other
                    model's, in the same order on both sides. Required of both for exact and
                    mapped matching
    token_map       (V,) long, for each token the student's of the same bytes, −1 where there is
                    none. Required of the teacher for exact matching; for mapped, the student's
                    token that its bytes begin with
    read            (P,) long, beside the student's pairs for mapped matching: what of the teacher's
                    token the student has read before, as a number of the teacher's `continuations`,
                    0 where the two begin alike. None: all do
    continuations   of the teacher, where the student has `read`
    spelt           (Q,) long, as `pairs`, for mapped matching: the student's positions whose token
                    the teacher spells with several, each as often as it has places of the
                    teacher's; first those with nothing of the spelling before. None: no such
                    positions
    spelt_read      (R,) long, beside the last R of the student's: the number in the teacher's
                    `spellings`, from 1, of what comes before
    spellings       of the teacher, where both have `spelt`
    sampled         of a student whose labels are its own samples: `t2s_correct` then counts where
                    the teacher's likeliest token is the student's likeliest, not its label
    top             (B, L, k) of a teacher, for a variant that needs no states (`Variant.
                    needs_states`): it is read instead of the states and the head, which may then
                    have a width of 0

    Padding may hold anything, NaN included.
    """

    input_embeds: Tensor
    target_embeds: Tensor
    hidden: Tensor
    lengths: Tensor
    head: Head
    labels: Tensor | None = None
    index: Tensor | None = None
    pairs: Tensor | None = None
    token_map: Tensor | None = None
    read: Tensor | None = None
    continuations: ContinuationTable | None = None
    spelt: Tensor | None = None
    spelt_read: Tensor | None = None
    spellings: SpellingTable | None = None
    sampled: bool = False
    top: TopTokens | None = None

    def detached(self) -> ResponseStates:
        """The same states as constants."""
        return replace(
            self,
            input_embeds=self.input_embeds.detach(),
            target_embeds=self.target_embeds.detach(),
            hidden=self.hidden.detach(),
            head=self.head.detached(),
        )

    def samples(self, places: Tensor) -> ResponseStates:
        """Some samples of the batch (k,) long, in that order, as a batch of their own."""
        number = torch.full_like(self.lengths, -1)
        number[places] = torch.arange(len(places), device=places.device)
        pairs, read = self._of(self.pairs, self.read, number)
        spelt, spelt_read = self._of(self.spelt, self.spelt_read, number)
        return replace(
            self,
            input_embeds=self.input_embeds[places],
            target_embeds=self.target_embeds[places],
            hidden=self.hidden[places],
            lengths=self.lengths[places],
            labels=None if self.labels is None else self.labels[places],
            index=None,  # of the whole batch
            pairs=pairs,
            read=read,
            spelt=spelt,
            spelt_read=spelt_read,
            top=self.top and TopTokens(*(each[places] for each in self.top)),
        )

    def _of(
        self, places: Tensor | None, read: Tensor | None, number: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Places in the batch, and what goes with them, of the samples that have a `number`."""
        if places is None:
            return None, None
        size = self.hidden.shape[1]
        found = number[places // size]
        kept = found >= 0
        with_read = kept[0 if read is None else len(places) - len(read) :]
        return (found * size + places % size)[kept], None if read is None else read[with_read]

    def sample(self, index: int) -> ResponseStates:
        """One sample of the batch, as a batch of one."""
        return self.samples(torch.tensor([index], device=self.hidden.device))


def response_index(states: ResponseStates) -> Tensor:
    """Places of all response positions in the flattened batch: (N,)."""
    if states.index is not None:
        return states.index
    valid = valid_positions(states.lengths, states.hidden.shape[1])
    return valid.flatten().nonzero().squeeze(1)


def gathered(states: Tensor, index: Tensor) -> Tensor:
    """(B, L, ...) → (N, ...)."""
    return states.flatten(0, 1).index_select(0, index)


def padded(values: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Put per-token values back in their places: (N,) → (B, L), 0 elsewhere."""
    return values.new_zeros(valid.numel()).index_copy(0, index, values).view_as(valid)


def required_labels(student: ResponseStates) -> Tensor:
    """The student's labels (B, S). Raises ValueError where there are none."""
    if student.labels is None:
        raise ValueError(
            "student.labels is None; give the student's labels (B, S), −100 at padding"
        )
    return student.labels
