"""Sums over groups of tokens that come out the same each time, on a GPU too.

Adding columns where an index says so (`index_add_`, `scatter_add_`) takes them in the order in
which a GPU's threads come by. Here a vocabulary is sorted once, and a sum is one thread's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Tokens that are summed one after another: then these sums are, so that a student's byte in which
# thousands of the teacher's tokens begin is no long wait. Rounding is the less for it, too.
RUN = 64


@dataclass(frozen=True)
class TokenOrder:
    """The teacher's tokens that have one of the student's, sorted by it; all long.

    tokens          (K,) the teacher's
    runs            (R + 1,) where in `tokens` each run begins, of at most RUN for the same one of
                    the student's, and where the last ends
    groups          (U + 1,) where in `runs` each of the student's tokens begins, and the last ends
    student_tokens  (U,)
    """

    tokens: Tensor
    runs: Tensor
    groups: Tensor
    student_tokens: Tensor

    def sums(self, values: Tensor, rows: int) -> Tensor:
        """Of values (C, Vt), those that belong to each of `rows` tokens of the student: (rows, C).

        Rows are tokens, as one addition is then of neighbours in memory.
        """
        summed = values.index_select(1, self.tokens).T.contiguous()
        for offsets in (self.runs, self.groups):
            summed = torch.segment_reduce(summed, "sum", offsets=offsets, axis=0, unsafe=True)
        return values.new_zeros(rows, len(values)).index_copy_(0, self.student_tokens, summed)


def summed_runs(values: Tensor, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Each of values (C, L) with those before it in its run of equal groups (C, L), and whether it
    is the last of that run: it has the sum then. `most`: how long a run is at most.

    Each takes on what those before it have, first of one, then of two, four and so on.
    """
    step = 1
    while step < most:
        same = groups[:, step:] == groups[:, :-step]
        rest = values[:, step:] + values[:, :-step].where(same, 0.0)
        values = torch.cat([values[:, :step], rest], 1)
        step *= 2
    last = torch.ones_like(groups, dtype=torch.bool)
    last[:, :-1] = groups[:, 1:] != groups[:, :-1]
    return values, last


_ORDERS = WeakTensorKeyDictionary()


def token_order(token_map: Tensor) -> TokenOrder:
    """Of a map (Vt,), −1 where there is none, found once: a GPU is waited for then.

    The map must not be changed afterwards.
    """
    if token_map not in _ORDERS:
        _ORDERS[token_map] = _sorted(token_map)
    found: TokenOrder = _ORDERS[token_map]
    return found


def _sorted(token_map: Tensor) -> TokenOrder:
    mapped, tokens = token_map.sort(stable=True)
    known = int((mapped < 0).sum())
    mapped, tokens = mapped[known:], tokens[known:]
    student_tokens, counts = torch.unique_consecutive(mapped, return_counts=True)
    run_counts = (counts + RUN - 1) // RUN
    groups = _offsets(run_counts)
    place = torch.arange(int(groups[-1]), device=token_map.device)  # of a run among its group's
    place -= groups[:-1].repeat_interleave(run_counts)
    starts = _offsets(counts)[:-1].repeat_interleave(run_counts) + RUN * place
    end = starts.new_tensor([len(tokens)])
    return TokenOrder(tokens, torch.cat([starts, end]), groups, student_tokens)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
