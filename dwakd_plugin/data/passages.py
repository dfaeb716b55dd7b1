"""Texts in passages to measure a model on, and as windows of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwakd_plugin.errors import UserError

HELD_OUT_BYTES = 12_000


class Passages(NamedTuple):
    """Two parts of the same texts: what a choice is made on, and what it is judged on."""

    choosing: list[str]
    held_out: list[str]


def passages(texts: Sequence[str], characters: int) -> Passages:
    """Texts in passages of at most so many characters, shuffled the same way each time.

    Up to HELD_OUT_BYTES and half of the passages are held out; a single one serves for both.
    """
    found = [
        text[start : start + characters]
        for text in texts
        for start in range(0, len(text), characters)
    ]
    found = [passage for passage in found if passage.strip()]
    random.Random(0).shuffle(found)
    size, count = 0, 0
    while count < len(found) // 2 and size < HELD_OUT_BYTES:
        size += len(found[count].encode())
        count += 1
    return Passages(found[count:], found[: max(1, count)])


def start_of(tokenizer: Any) -> int:
    """The token after which a text begins: what the tokenizer puts before one, or its end."""
    before = [*tokenizer("")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id]
    return next(index for index in before if index is not None)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens and no special ones around them."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def windows(tokenizer: Any, texts: Sequence[str], width: int, tokens: int) -> Tensor:
    """Up to `tokens` tokens of the texts, joined, in rows (N, width) that each begin with a start.

    Raises UserError where the texts have no tokens.
    """
    ids: list[int] = []
    for text in texts:
        ids += plain_ids(tokenizer, text)
        if len(ids) >= tokens:
            break
    if not ids:
        raise UserError("The texts have no tokens. Give others with --texts.")
    step = min(width - 1, len(ids))
    rows = max(1, min(len(ids), tokens) // step)
    start = torch.full((rows, 1), start_of(tokenizer))
    return torch.cat([start, torch.tensor(ids[: rows * step]).view(rows, step)], dim=1)
