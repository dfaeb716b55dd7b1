"""Sampled responses, one for each row and seed; none is made twice (see `models.sampling`)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch

from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.responses import Response, ResponseStore
from dwakd_plugin.models.sampling import Generator, Sampling, up_to_stop


@contextmanager
def with_vllm(
    source: Any, held: Any, sampling: Sampling, stop: Sequence[int], longest: int
) -> Iterator[Generator]:
    """Generates with vLLM, which draws its own numbers: other responses, as likely.

    Written against vLLM's documented interface and not tested. `longest` is the largest number of
    tokens of a prompt with its response. Raises UserError where vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(
            f"--backend vllm needs vLLM, which cannot be imported ({error}). Install it, or leave "
            "the option out."
        ) from error
    llm = LLM(
        model=source.weights,
        tokenizer=source.tokenizer,
        dtype=held.dtype,
        quantization="bitsandbytes" if held.load_in_8bit else None,
        trust_remote_code=held.trust_remote_code,
        max_model_len=longest,
        enable_lora=source.adapter is not None,
        max_lora_rank=512,
    )
    lora = LoRARequest("adapter", 1, str(source.adapter)) if source.adapter is not None else None

    def generate(
        prompts: list[list[int]], keys: list[tuple[int, int]], limit: int
    ) -> list[list[int]]:
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=limit,
                seed=zlib.crc32(f"{seed}:{row}".encode()),
                stop_token_ids=list(stop),
            )
            for seed, row in keys
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            parameters,
            lora_request=lora,
            use_tqdm=False,
        )
        return [up_to_stop(list(each.outputs[0].token_ids), stop) for each in outputs]

    yield generate


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
) -> list[list[Response]]:
    """A response for each seed and row: [seed][row]. Those in the store are not made again.

    prompts: token ids by the row's number in the data; limits: the largest number of new tokens.
    Batches are the same after an interruption as without one, so that a batch of which some rows
    are missing is generated whole. Where a GPU's memory runs out, batches are halved.

    Raises UserError.
    """

    def missing(seed: int, rows: Iterable[int]) -> list[int]:
        return [row for row in rows if store.get(seed, row, prompts[row]) is None]

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
                    store.add(
                        [
                            (seed, row, prompts[row], _response(made[row], tokenizer, stop))
                            for row in wanted
                        ]
                    )
                    done += len(wanted)
                plan.pop(0)
    progress(total, total)
    return [
        [found for row in prompts if (found := store.get(seed, row, prompts[row])) is not None]
        for seed in seeds
    ]


def _response(new: list[int], tokenizer: Any, stop: Sequence[int]) -> Response:
    ended = bool(new) and new[-1] in stop
    text = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
    return Response(text, len(new), ended)
