"""The figures of `dwakd evaluate`: ROUGE-L, bits per byte, and how near a student is to a teacher.

Symbols: n the tokens of a response with its end; V rows of the head; d hidden size.

    ROUGE-L        F-measure × 100 of the longest common subsequence of stemmed words, the best over
                   the references of a row (rouge-score's own)
    bits per byte  Σ −log₂ p(token | all before it) / Σ UTF-8 bytes of the text, over the tokens of
                   the first reference and its end; the prompt costs nothing
    next byte      p(byte) at a place in the text: Σ p(token) over the tokens that begin with it;
                   the end is a symbol of its own
    structure      distance of two models' matrices of similarities between the states of one text:
                   cosine, mean |Δ| of the entries; inner products divided by their row's sum, mean
                   over rows of Σ |Δ|

Two tokenizers are compared at the bytes of the text where a token of both ends: there both models
have read the same text.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import regex
import torch
from torch import Tensor

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.causal_lm import hidden_states, output_head

RESAMPLES = 10_000
CONFIDENCE = 0.95
SYMBOLS = 258  # the bytes, the end, and what is neither
END, OTHER = 256, 257
_LOGITS = 2**24  # numbers held at once: 64 MB


# ROUGE-L ------------------------------------------------------------------------------------


def rouge_l(
    responses: Sequence[str],
    references: Sequence[Sequence[str]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    unicode_words: bool = False,
) -> np.ndarray:
    """ROUGE-L of each response, 0 to 100, against the best of its row's references.

    Of rouge-score's own words, runs of a-z and 0-9; or of `words`, which no stemmer knows.
    """
    from rouge_score.rouge_scorer import RougeScorer

    keep_stderr_open()
    own = _UnicodeWords() if unicode_words else None
    scorer = RougeScorer(["rougeL"], use_stemmer=True, tokenizer=own)
    scores = np.zeros(len(responses))
    for row, (response, texts) in enumerate(zip(responses, references, strict=True)):
        scores[row] = 100 * scorer.score_multi(list(texts), response)["rougeL"].fmeasure
        progress(row + 1, len(responses))
    return scores


def words(text: str) -> list[str]:
    """The words of a text in any script; characters where it writes no spaces between words.

    >>> words("Größte Stadt: 数据 2")
    ['grösste', 'stadt', '数', '据', '2']
    """
    return _WORDS.findall(unicodedata.normalize("NFC", text).casefold())


class _UnicodeWords:
    """`words` as rouge-score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORDS = regex.compile(
    rf"[{_SPACELESS}]\p{{M}}*|[\p{{L}}\p{{N}}\p{{M}}_--[{_SPACELESS}]]+", regex.VERSION1
)


def without_words(references: Sequence[Sequence[str]]) -> int:
    """How many rows have no word that ROUGE-L knows (a-z, 0-9) in any reference, and score 0."""
    return sum(not any(map(_seen, texts)) for texts in references)


def mostly_unseen(references: Sequence[Sequence[str]]) -> int:
    """How many rows have references in which ROUGE-L sees less than half of the letters.

    What scores there is what is left: two Russian sentences with one figure in common are the same.
    """
    return sum(all(2 * _seen(text) < _letters(text) for text in texts) for texts in references)


def _seen(text: str) -> int:
    """How many characters ROUGE-L takes for parts of words."""
    return sum(each in _ROUGE_LETTERS for each in text.lower())


def _letters(text: str) -> int:
    return sum(map(str.isalnum, text))


_ROUGE_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")


def keep_stderr_open() -> None:
    """Has absl, on which rouge-score logs, leave sys.stderr open where that is redirected.

    It closes what was sys.stderr at its import when logging is configured again, as axolotl does,
    unless that is the process's own.
    """
    from absl import logging

    logging.get_absl_handler().python_handler.stream = sys.__stderr__


# Uncertainty --------------------------------------------------------------------------------


class Amounts(NamedTuple):
    """A figure as the quotient of two sums over rows; a mean has 1 for each row below."""

    above: np.ndarray
    below: np.ndarray

    @property
    def value(self) -> float:
        return float(self.above.sum() / self.below.sum())


def mean_of(values: np.ndarray) -> Amounts:
    return Amounts(np.asarray(values, dtype=float), np.ones(len(values)))


def interval(*figures: Amounts) -> tuple[float, float]:
    """Bootstrap interval over rows of a figure, or of the first minus the second (paired).

    Percentiles of `RESAMPLES` draws of as many rows as there are; both figures see the same draws.
    Not scipy.stats.bootstrap's: it draws rows where this draws how often each comes, so that the
    same seed gives other numbers there, and intervals of older reports would not come again.
    """
    rows = len(figures[0].above)
    random = np.random.default_rng(0)
    values = []
    for _ in range(0, RESAMPLES, 500):
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=500)
        quotients = [(counts @ each.above) / (counts @ each.below) for each in figures]
        values.append(quotients[0] if len(quotients) == 1 else quotients[0] - quotients[1])
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(values), [tail, 100 - tail])
    return float(low), float(high)


# Reading ------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What a model makes of a response that it is given.

    bits         (n,)         −log₂ p of each token, the end the last
    similarities (n−1, n−1)   inner products of the states after each token but the end; or None
    next_bytes   (n−1, 258)   what would follow there: bytes, the end, neither; or None
    """

    bits: np.ndarray
    similarities: np.ndarray | None
    next_bytes: np.ndarray | None


@torch.no_grad()
def read(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    symbols: Tensor | None = None,
    batch_tokens: int = 2048,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Reading]:
    """Reads each (prompt, response) of token ids, n ≥ 1, at most `batch_tokens` at once.

    symbols: (V,), as `symbols_of` makes it; without, similarities and next bytes are left out.
    """
    head = output_head(model)
    device = head.weight.device
    symbols = None if symbols is None else symbols.to(device)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]) - len(rows[row][1]))
    readings: dict[int, Reading] = {}
    while order:
        progress(len(readings), len(rows))
        width = sum(map(len, rows[order[0]]))
        batch = order[: max(1, batch_tokens // width)]
        del order[: len(batch)]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(batch):
            whole = [*rows[row][0], *rows[row][1]]
            ids[place, : len(whole)] = torch.tensor(whole)
            mask[place, : len(whole)] = 1
        states = hidden_states(model, ids.to(device), mask.to(device))
        own = [
            states[place, len(prompt) - 1 : len(prompt) + len(response) - 1]
            for place, (prompt, response) in enumerate(rows[row] for row in batch)
        ]
        tokens = torch.tensor([token for row in batch for token in rows[row][1]], device=device)
        readings |= zip(batch, _readings(own, tokens, head, symbols), strict=True)
    progress(len(rows), len(rows))
    return [readings[row] for row in range(len(rows))]


def _readings(
    states: Sequence[Tensor], tokens: Tensor, head: Any, symbols: Tensor | None
) -> list[Reading]:
    """states: of each response the one that predicts each token (n, d); tokens: those of all."""
    bits, following = [], []
    step = max(1, _LOGITS // head.weight.shape[0])
    # All responses go through the head together: few tokens at once take longer each.
    for some, targets in zip(torch.cat(list(states)).split(step), tokens.split(step), strict=True):
        logs = head.logits(some).log_softmax(-1)
        bits.append(-logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
        if symbols is not None:
            sums = torch.zeros(len(some), SYMBOLS, dtype=logs.dtype, device=logs.device)
            following.append(sums.index_add(1, symbols, logs.exp()))
    numbers = torch.cat(bits).double().cpu().numpy() / np.log(2)
    if not np.isfinite(numbers).all():
        raise UserError("The model's logits are not finite. Try another checkpoint, or --dtype.")
    ends = np.cumsum([len(own) for own in states])[:-1]
    each = np.split(numbers, ends)
    if symbols is None:
        return [Reading(own, None, None) for own in each]
    next_bytes = np.split(torch.cat(following).float().cpu().numpy(), ends)
    after = [own[1:].float() for own in states]
    return [
        Reading(own, (some @ some.T).cpu().numpy(), ahead[1:])
        for own, some, ahead in zip(each, after, next_bytes, strict=True)
    ]


def symbols_of(table: Sequence[bytes], stop: Sequence[int], head_rows: int) -> Tensor:
    """For each of the head's rows the symbol (V,) that it stands for: its first byte, END or OTHER.

    table: what each token id stands for; rows beyond it, as padded heads have, stand for nothing.
    """
    symbols = torch.full((head_rows,), OTHER, dtype=torch.long)
    for index, piece in enumerate(table[:head_rows]):
        if piece:
            symbols[index] = piece[0]
    symbols[[index for index in stop if index < head_rows]] = END
    return symbols


def bits_per_byte(
    readings: Sequence[Reading], texts: Sequence[str], *, end: bool = True
) -> Amounts:
    """Bits of each response over its text's bytes; `end`: with the bits of the end token."""
    bits = [each.bits.sum() if end else each.bits[:-1].sum() for each in readings]
    return Amounts(np.array(bits), np.array([float(len(text.encode())) for text in texts]))


# Student and teacher --------------------------------------------------------------------------


class Nearness(NamedTuple):
    """A student against its teacher. Rows left out: fewer than two common places in the text.

    agreement  share of common places where both find the same next byte most likely, over all rows
    divergence Jensen-Shannon divergence of the next byte there, in bits (0 to 1), over all rows
    cosine     (rows,) distance of structure, by cosines
    inner      (rows,) distance of structure, by normalised inner products
    """

    agreement: Amounts
    divergence: Amounts
    cosine: np.ndarray
    inner: np.ndarray
    rows_left_out: int


def nearness(
    student: Sequence[tuple[Reading, list[int] | None]],
    teacher: Sequence[tuple[Reading, list[int] | None]],
    texts: Sequence[str],
) -> Nearness | None:
    """Compares readings of the same texts; each with the ends of its tokens in bytes, or None.

    None where no row can be compared.
    """
    same, divergences, places, cosine, inner = [], [], [], [], []
    for (ours, our_ends), (theirs, their_ends), text in zip(student, teacher, texts, strict=True):
        common = common_places(our_ends, their_ends, len(text.encode()))
        if len(common) < 2:
            continue
        mine, other = (list(side) for side in zip(*common, strict=True))
        assert ours.next_bytes is not None and theirs.next_bytes is not None
        assert ours.similarities is not None and theirs.similarities is not None
        p, q = ours.next_bytes[mine], theirs.next_bytes[other]
        same.append((p.argmax(-1) == q.argmax(-1)).sum())
        divergences.append(jensen_shannon(p, q).sum())
        places.append(len(common))
        by_cosine, by_product = structure_distance(
            ours.similarities[np.ix_(mine, mine)], theirs.similarities[np.ix_(other, other)]
        )
        cosine.append(by_cosine)
        inner.append(by_product)
    if not places:
        return None
    counts = np.array(places, dtype=float)
    return Nearness(
        Amounts(np.array(same, dtype=float), counts),
        Amounts(np.array(divergences, dtype=float), counts),
        np.array(cosine),
        np.array(inner),
        len(texts) - len(places),
    )


def common_places(
    ours: Sequence[int] | None, theirs: Sequence[int] | None, size: int
) -> list[tuple[int, int]]:
    """(our token, their token) that end at the same byte of a text of `size` bytes, in order.

    Of several tokens that end at one byte, the last counts. The text's beginning isn't one.
    """
    if ours is None or theirs is None:
        return []
    mine = {end: token for token, end in enumerate(ours) if 0 < end <= size}
    other = {end: token for token, end in enumerate(theirs) if 0 < end <= size}
    return [(mine[end], other[end]) for end in sorted(mine.keys() & other.keys())]


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence (N,) in bits of distributions (N, K), 0 to 1."""
    p, q = p.astype(float), q.astype(float)
    middle = (p + q) / 2

    def divergence(one: np.ndarray) -> np.ndarray:
        quotient = np.divide(one, middle, out=np.ones_like(one), where=one > 0)
        return np.asarray((one * np.log2(quotient)).sum(-1))

    return (divergence(p) + divergence(q)) / 2


def structure_distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Distance of structure from inner products (n, n) of either model's n states.

    By cosines: mean over i, j of |cos − cos'|. By inner products, each divided by its row's sum:
    mean over i of Σ_j |p − p'|.
    """

    def cosines(products: np.ndarray) -> np.ndarray:
        lengths = np.sqrt(np.diag(products))
        return products / np.outer(lengths, lengths).clip(min=1e-30)

    def normalised(products: np.ndarray) -> np.ndarray:
        return np.asarray(products / products.sum(-1, keepdims=True))

    a, b = ours.astype(float), theirs.astype(float)
    by_cosine = np.abs(cosines(a) - cosines(b)).mean()
    by_product = np.abs(normalised(a) - normalised(b)).sum(-1).mean()
    return float(by_cosine), float(by_product)
