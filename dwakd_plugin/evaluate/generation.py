"""Sampled responses, one for each row and seed; none is made twice (see `models.sampling`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.responses import Response, ResponseStore
from dwakd_plugin.models.sampling import Generator, Sample


def batches(
    prompts: Mapping[int, Sequence[int]], limits: Mapping[int, int], size: int
) -> list[list[int]]:
    """Rows that are generated together: of one limit, longest prompts first.

    Of one limit, as a batch runs to its limit, and a row may have no position beyond its own.
    """
    order = sorted(prompts, key=lambda row: (-limits[row], -len(prompts[row]), row))
    plan: list[list[int]] = []
    for _, group in groupby(order, key=lambda row: limits[row]):
        rows = list(group)
        plan += [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    return plan


def respond(
    store: ResponseStore,
    generate: Generator,
    tokenizer: Any,
    prompts: Mapping[int, Sequence[int]],
    limits: Mapping[int, int],
    seeds: Sequence[int],
    stop: Sequence[int],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    exact: bool = False,
) -> list[list[Response]]:
    """A response for each seed and row: [seed][row]. Those in the store are not made again.

    prompts: token ids by the row's number in the data; limits: the largest number of new tokens.
    Batches are the same after an interruption as without one, so that a batch some of whose rows
    are missing is generated whole. Where a GPU's memory runs out, batches are halved.
    `exact` keeps a text as its tokens spell it, special ones included.

    Raises UserError.
    """

    def missing(seed: int, rows: Iterable[int]) -> list[int]:
        return [row for row in rows if store.get(seed, row, prompts[row]) is None]

    def read(sample: Sample) -> Response:
        return _response(sample, tokenizer, stop, exact)

    total = len(seeds) * len(prompts)
    with store.writing():
        done = total - sum(len(missing(seed, prompts)) for seed in seeds)
        for seed in seeds:
            plan = batches(prompts, limits, batch_size)
            while plan:
                rows = plan[0]
                wanted = missing(seed, rows)
                progress(done, total)
                if wanted:
                    try:
                        new = generate(
                            [list(prompts[row]) for row in rows],
                            [(seed, row) for row in rows],
                            limits[rows[0]],
                        )
                    except torch.OutOfMemoryError as error:
                        if batch_size == 1:
                            raise UserError(
                                "Out of memory with one row at a time. Use --load-in-8bit, or a "
                                "smaller --max-new-tokens."
                            ) from error
                        torch.cuda.empty_cache()
                        batch_size = (batch_size + 1) // 2
                        plan = batches(prompts, limits, batch_size)
                        continue
                    made = dict(zip(rows, new, strict=True))
                    store.add([(seed, row, prompts[row], read(made[row])) for row in wanted])
                    done += len(wanted)
                plan.pop(0)
    progress(total, total)
    return [
        [found for row in prompts if (found := store.get(seed, row, prompts[row])) is not None]
        for seed in seeds
    ]


def _response(sample: Sample, tokenizer: Any, stop: Sequence[int], exact: bool) -> Response:
    new, score = sample
    ended = bool(new) and new[-1] in stop
    as_spelt = {"clean_up_tokenization_spaces": False} if exact else {}
    text = tokenizer.decode(new[: -1 if ended else None], skip_special_tokens=not exact, **as_spelt)
    return Response(text, len(new), ended, None if score is None else score / max(1, len(new)))
