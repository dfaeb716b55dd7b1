"""Answers sampled from a model, batched, with numbers that are the same however they are computed.

Token t of row r under seed s is the inverse of the cumulative distribution at a uniform number that
depends on (s, r, t) alone. So neither the batch nor its order nor an interruption decides what is
drawn; only rounding in the model's own logits can, where a number falls on a token's edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dwakd_plugin.errors import UserError


class NaNLogits(UserError):
    """A model that answers has NaN for a next token."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256


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
    found = torch.searchsorted(cumulative, targets.unsqueeze(-1), right=True).squeeze(-1)
    # NaN is larger than all. A token is one of the vocabulary's all the same: see `NaNLogits`.
    return found.clamp(max=logits.shape[-1] - 1)


class Sample(NamedTuple):
    """New tokens up to the first stop, and Σ log p of them in nats, where it was asked for.

    p is the model's own, whatever temperature and top_p the tokens were drawn with.
    """

    tokens: list[int]
    log_probability: float | None = None


class _Drawn(LogitsProcessor):
    """Leaves one token possible a row: the one that its next number draws."""

    def __init__(self, numbers: Tensor, sampling: Sampling, scored: bool) -> None:
        self.numbers = numbers
        self.sampling = sampling
        self.step = 0
        self.scored = scored
        self.log_probabilities: list[Tensor] = []  # (B,) of each step
        self.nan = torch.tensor(False, device=numbers.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampling = self.sampling
        numbers = self.numbers[:, self.step].to(scores.device)
        drawn = draw(scores, numbers, sampling.temperature, sampling.top_p)
        self.step += 1
        self.nan = self.nan.to(scores.device) | scores.isnan().any()
        places = drawn.unsqueeze(-1)
        if self.scored:
            own = scores.float().log_softmax(-1).gather(-1, places)
            self.log_probabilities.append(own.squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, places, 0.0)


# (prompts, (seed, row) of each, largest number of new tokens) to samples
Generator = Callable[[list[list[int]], list[tuple[int, int]], int], list[Sample]]


def with_transformers(
    model: Any,
    sampling: Sampling,
    stop: Sequence[int],
    *,
    device: torch.device | None = None,
    scored: bool = False,
) -> Generator:
    """Generates a batch at once, prompts padded on the left; new tokens up to the first stop.

    Raises NaNLogits.

    `device` takes the tokens, by default the model's own; `scored` asks for log-probabilities.
    """
    place = model.device if device is None else device

    @torch.no_grad()
    def generate(prompts: list[list[int]], keys: list[tuple[int, int]], limit: int) -> list[Sample]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        numbers = torch.tensor(np.stack([uniforms(*key, limit) for key in keys]))
        drawn = _Drawn(numbers.to(place), sampling, scored)
        output = model.generate(
            input_ids=ids.to(place),
            attention_mask=mask.to(place),
            logits_processor=LogitsProcessorList([drawn]),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=list(stop),
            pad_token_id=stop[0],
        )
        if drawn.nan:
            raise NaNLogits(
                "A model's logits of the next token are NaN, so it cannot answer. Check its "
                "weights (a download that broke off, a run that diverged), or try another dtype."
            )
        samples = [up_to_stop(new, stop) for new in output[:, width:].tolist()]
        if not scored:
            return [Sample(new) for new in samples]
        found = torch.stack(drawn.log_probabilities, dim=1).double().cpu()  # (B, T)
        return [Sample(new, float(found[row, : len(new)].sum())) for row, new in enumerate(samples)]

    return generate


def up_to_stop(new: list[int], stop: Sequence[int]) -> list[int]:
    for place, index in enumerate(new):
        if index in stop:
            return new[: place + 1]
    return new
