"""Sampled responses, one for each row and seed, that are the same however they are computed.

Token t of row r under seed s is the inverse of the cumulative distribution at a uniform number that
depends on (s, r, t) alone. So neither the batch nor its order nor an interruption decides what is
drawn; only rounding in the model's own logits can, where a number falls on a token's edge.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.responses import Response, ResponseStore


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256


# Drawing ------------------------------------------------------------------------------------


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) that a row's tokens are drawn with: a prefix of one sequence."""
    key = np.array([seed, row], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def draw(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """Token ids (B,) for logits (B, V) and uniform numbers (B,) in float64.

    The first token at which the cumulative probability exceeds the number. With top_p below 1, the
    smallest set of most likely tokens that reaches it is what is drawn from.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, places = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(outside.gather(-1, places.argsort(-1)), 0.0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))
    targets = torch.minimum(numbers * total, below)
    return torch.searchsorted(cumulative, targets.unsqueeze(-1), right=True).squeeze(-1)


class _Drawn(LogitsProcessor):
    """Leaves one token possible a row: the one that its next number draws."""

    def __init__(self, numbers: Tensor, sampling: Sampling) -> None:
        self.numbers = numbers
        self.sampling = sampling
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampling = self.sampling
        drawn = draw(scores, self.numbers[:, self.step], sampling.temperature, sampling.top_p)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn.unsqueeze(-1), 0.0)


# (prompts, (seed, row) of each, largest number of new tokens) to new token ids
Generator = Callable[[list[list[int]], list[tuple[int, int]], int], list[list[int]]]


def with_transformers(model: Any, sampling: Sampling, stop: Sequence[int]) -> Generator:
    """Generates a batch at once, prompts padded on the left; new tokens up to the first stop."""

    @torch.no_grad()
    def generate(
        prompts: list[list[int]], keys: list[tuple[int, int]], limit: int
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, prompt in enumerate(prompts):
            ids[place, width - len(prompt) :] = torch.tensor(prompt)
            mask[place, width - len(prompt) :] = 1
        numbers = torch.tensor(np.stack([uniforms(*key, limit) for key in keys]))
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([_Drawn(numbers.to(model.device), sampling)]),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=list(stop),
            pad_token_id=stop[0],
        )
        return [_up_to_stop(new, stop) for new in output[:, width:].tolist()]

    return generate


def _up_to_stop(new: list[int], stop: Sequence[int]) -> list[int]:
    for place, index in enumerate(new):
        if index in stop:
            return new[: place + 1]
    return new


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
        return [_up_to_stop(list(each.outputs[0].token_ids), stop) for each in outputs]

    yield generate


# All of it ----------------------------------------------------------------------------------


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
