"""The teacher's likeliest tokens: taken from its head, carried in a batch, packed for a disk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dwakd_plugin.loss import Head, TopTokens, tokens_per_chunk

# Of a row, by its teacher token ids and labels (L,): its states (T, D), or `TopTokens` (T, k); or
# the number by which a served teacher will have them.
RowStates = Callable[[Tensor, Tensor], Tensor | TopTokens | int]

BYTES_A_TOKEN = 6  # of those that are kept: three for the id, three for the log-probability
_STEP = 2.0**-18  # between log-probabilities on disk: a probability is off by 2e-6 of itself
_LARGEST = 2**24 - 1  # so that the least is exp(-64), 2e-28


@torch.no_grad()
def top_of_states(hidden: Tensor, head: Head, k: int) -> TopTokens:
    """The k likeliest tokens of the head's by hidden states (..., D), a chunk of logits at a time.

    k is the whole vocabulary where that has fewer. Log-probabilities are float32 at least.
    """
    k = min(k, head.weight.shape[0])
    chunk = tokens_per_chunk("auto", head.weight.shape[0], head.weight.device)
    found = [
        head.logits(part).log_softmax(-1).topk(k)
        for part in torch.split(hidden.flatten(0, -2), chunk)
    ]
    ids, log_probs = (torch.cat([part[n] for part in found]) for n in (1, 0))
    shape = (*hidden.shape[:-1], k)
    return TopTokens(ids.to(torch.int32).view(shape), log_probs.view(shape))


def to_bits(top: TopTokens) -> Tensor:
    """(..., k, 2) int32, the log-probabilities as the bits of a float32.

    So a batch carries them: what an engine finds of floats in it is rounded to half precision.
    """
    bits = top.log_probs.to(torch.float32).contiguous().view(torch.int32)
    return torch.stack([top.token_ids.to(torch.int32), bits], -1)


def from_bits(bits: Tensor) -> TopTokens:
    """What `to_bits` was given."""
    return TopTokens(bits[..., 0], bits[..., 1].contiguous().view(torch.float32))


def pack(top: TopTokens) -> Tensor:
    """(..., k, 6) uint8: the id and the log-probability in 2^-18 nats, three bytes each, the low
    first. An id of -1 is all ones; ids are below 2^24 - 1."""
    steps = (-top.log_probs.double() / _STEP).round().clamp(0, _LARGEST)
    numbers = torch.stack([top.token_ids.to(torch.int32), steps.to(torch.int32)], -1)
    return numbers.view(torch.uint8).unflatten(-1, (2, 4))[..., :3].flatten(-2)


def unpack(packed: Tensor) -> TopTokens:
    """What `pack` was given, float32: an id of -1 comes back with -inf."""
    numbers = torch.zeros(*packed.shape[:-1], 2, 4, dtype=torch.uint8)
    numbers[..., :3] = packed.unflatten(-1, (2, 3))
    ids, steps = numbers.flatten(-2).view(torch.int32).unbind(-1)
    none = ids == _LARGEST
    log_probs = (-_STEP * steps).masked_fill(none, -torch.inf)
    return TopTokens(ids.masked_fill(none, -1), log_probs)
