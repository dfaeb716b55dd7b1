"""What a server answers, as `TopTokens`: by token ids (vLLM), or by the texts of tokens (echo).

vLLM's `prompt_logprobs`: for each token of the prompt None or {token id: {logprob, rank, ...}}, the
token itself among them. The completions API's `logprobs` with `echo`: the lists tokens,
token_logprobs and top_logprobs, of the prompt and then of what was generated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dwakd_plugin.loss import TopTokens
from dwakd_plugin.tokenizers.pair import is_byte_level, token_bytes

MOST = 1.001  # what the probabilities of a position may sum to, rounded in the server


class Unreadable(ValueError):
    """An answer that does not say what it should; the message says how."""


class TokenTexts:
    """A tokenizer's tokens as a server writes them, and back where that can be told.

    A server may write a token whose bytes are no whole characters as those that are, as marks, or
    not at all; a text that may stand for more than one token stands for none.
    """

    def __init__(self, tokenizer: Any) -> None:
        byte_level = is_byte_level(tokenizer)
        added = set(tokenizer.get_added_vocab())
        self.special = set(tokenizer.all_special_ids)
        self.bos = tokenizer.bos_token_id
        self.size = max(tokenizer.get_vocab().values()) + 1
        self.texts: dict[int, str | None] = {}  # None where they are no whole characters
        claims: dict[str, set[int]] = defaultdict(set)
        for token, index in tokenizer.get_vocab().items():
            raw = token.encode() if token in added else token_bytes(token, byte_level=byte_level)
            for how in ("ignore", "replace"):
                claims[raw.decode(errors=how)].add(index)
            try:
                self.texts[index] = raw.decode()
            except UnicodeDecodeError:
                self.texts[index] = None
        self.ids = {
            text: index
            for text, (index, *others) in ((text, [*found]) for text, found in claims.items())
            if not others and text and self.texts[index] == text
        }

    def slots(self, tokens: Sequence[Any], ids: Sequence[int]) -> dict[int, int] | None:
        """Where in the server's `tokens` those of a row are; None where they are others.

        The tokens of a text that begins with it or has it between turns may come without BOS
        (llama-cpp-python); one that was generated may stand behind them.
        """
        whole = range(len(ids))
        without = [place for place in whole if ids[place] != self.bos]
        for places in (whole, without):
            if len(tokens) - len(places) in (0, 1) and all(
                self._may_be(token, ids[place])
                for token, place in zip(tokens, places, strict=False)
            ):
                return {place: slot for slot, place in enumerate(places)}
        return None

    def _may_be(self, text: Any, index: int) -> bool:
        """Whether a server may write a token so."""
        own = self.texts.get(index)
        return own is None or text == own or (text == "" and index in self.special)


@dataclass
class Left:
    """Of so many likeliest tokens a position, those whose texts do not say which they are."""

    top_k: int
    unknown: int = 0
    positions: int = 0

    @property
    def share(self) -> float:
        return self.unknown / max(1, self.positions * self.top_k)


def by_ids(answer: Mapping[str, Any], ids: Sequence[int]) -> list[dict[int, float] | None]:
    """log p by token id, for each token of a row, from `prompt_logprobs`. Raises Unreadable."""
    entries = _choice(answer).get("prompt_logprobs")
    if not isinstance(entries, list):
        raise Unreadable("it has no `prompt_logprobs`")
    if len(entries) != len(ids):
        raise Unreadable(f"it has `prompt_logprobs` of {len(entries)} tokens for {len(ids)}")
    try:
        return [
            entry and {int(token): float(said["logprob"]) for token, said in entry.items()}
            for entry in entries
        ]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Unreadable("its `prompt_logprobs` have another form than vLLM's") from error


@dataclass(frozen=True)
class Echo:
    """The lists of an echoed text. `late`: an entry says what follows its token, not the token."""

    tokens: list[Any]
    own: list[Any]
    top: list[Any]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Echo:
        """Raises Unreadable where the prompt is not among what is answered."""
        found = _choice(answer).get("logprobs")
        lists = [
            found.get(name) if isinstance(found, dict) else None
            for name in ("tokens", "token_logprobs", "top_logprobs")
        ]
        tokens, own, top = (each if isinstance(each, list) else [] for each in lists)
        if not tokens or not len(tokens) == len(own) == len(top):
            raise Unreadable("it has no `logprobs` of tokens")
        return cls(tokens, own, top)

    def by_ids(
        self, ids: Sequence[int], texts: TokenTexts, *, late: bool, left: Left
    ) -> list[dict[int, float] | None]:
        """log p by token id, for each token of a row, where texts say which it is.

        Raises Unreadable where the server has cut the row otherwise.
        """
        slots = texts.slots(self.tokens, ids)
        if slots is None:
            raise Unreadable(f"it has {len(self.tokens)} tokens, other ones than the row's")
        rows: list[dict[int, float] | None] = []
        for place, index in enumerate(ids):
            slot = slots.get(place - 1 if late else place)
            entry = None if slot is None else self.top[slot]
            if slot is None or not isinstance(entry, dict):
                rows.append(None)
                continue
            row = {texts.ids[text]: value for text, value in entry.items() if text in texts.ids}
            left.unknown += max(0, min(left.top_k, texts.size) - len(row))
            left.positions += 1
            if not late and self.own[slot] is not None:
                row[index] = self.own[slot]
            if not all(isinstance(value, int | float) for value in row.values()):
                raise Unreadable("its log-probabilities are no numbers")
            rows.append(row)
        return rows


def top_tokens(rows: Iterable[dict[int, float] | None], top_k: int, vocabulary: int) -> TopTokens:
    """(T, k) of some positions. Raises Unreadable where they are no log-probabilities.

    Ids from `vocabulary` on, which a padded head has, and positions without an entry say nothing.
    """
    token_ids, log_probs = [], []
    for row in rows:
        pairs = sorted((row or {}).items(), key=lambda pair: -pair[1])
        if not all(value <= 1e-4 for _, value in pairs):  # NaN is not either
            raise Unreadable("its log-probabilities are not all at most 0")
        total = sum(math.exp(value) for _, value in pairs)
        if total > MOST:
            raise Unreadable(f"the probabilities of a position sum to {total:.4g}")
        pairs = [pair for pair in pairs if 0 <= pair[0] < vocabulary][:top_k]
        lacking = top_k - len(pairs)
        token_ids.append([token for token, _ in pairs] + [-1] * lacking)
        log_probs.append([min(0.0, value) for _, value in pairs] + [-math.inf] * lacking)
    return TopTokens(
        torch.tensor(token_ids, dtype=torch.int32).view(-1, top_k),
        torch.tensor(log_probs, dtype=torch.float32).view(-1, top_k),
    )


def _choice(answer: Mapping[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unreadable("it has no `choices`")
    return choices[0]
