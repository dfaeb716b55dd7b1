"""Where two texts are the same: what one side's tokenizer or template wrote otherwise is set aside.

Two sides of a row have one and the same answer, and yet not always the same bytes: a chat template
strips the line break that an answer begins with, SentencePiece puts a space before it, a tokenizer
composes accents (NFC, which also replaces Ω, K and Å by letters that look alike) or reads `▁` as a
space. None of that is another answer.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from itertools import pairwise
from unicodedata import combining, normalize

Run = tuple[int, int, int]  # first byte here, first byte there, how many are the same

# White space; words, with the marks that follow their letters; other characters, one by one.
_UNITS = re.compile(r"\s+|\w(?:\w|[^\w\s\x00-\x7f])*|[^\w\s]")
# As templates of reasoning models open an answer that has no reasoning.
_EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*")


def spelling(text: str) -> str:
    """A text as it reads: composed (NFKC), `▁` as the space that it stands for."""
    return normalize("NFKC", text.replace("\u2581", " "))


def substance(text: str) -> str:
    """What a text says: its spelling, without white space at its ends and an empty reasoning."""
    return _EMPTY_REASONING.sub("", spelling(text)).strip()


def common_runs(one: bytes, other: bytes) -> list[Run]:
    """The runs of bytes that both texts have, in order; none overlap, and none are empty.

    What both begin and end with is found at once, whatever it is. Between, the texts are compared
    by words, and words that read alike and are written otherwise (`spelling`) by characters. A word
    that only one side has belongs to no run.
    """
    if one == other:
        return [(0, 0, len(one))] if one else []
    one_text, other_text = _decoded(one), _decoded(other)
    front = _front(one_text, other_text)
    back = _front(one_text[front:][::-1], other_text[front:][::-1])
    middle = one_text[front : len(one_text) - back], other_text[front : len(other_text) - back]
    blocks = [
        (0, 0, front),
        *((front + a, front + b, size) for a, b, size in _alike(*middle)),
        (len(one_text) - back, len(other_text) - back, back),
    ]
    one_at, other_at = _offsets(one_text), _offsets(other_text)
    runs: list[Run] = []
    for a, b, size in blocks:
        if size == 0:
            continue
        run = one_at[a], other_at[b], one_at[a + size] - one_at[a]
        if runs and _follows(runs[-1], run):
            run = runs[-1][0], runs[-1][1], runs[-1][2] + run[2]
            runs.pop()
        runs.append(run)
    return runs


def _alike(one: str, other: str) -> list[Run]:
    """Runs of characters in two texts whose first and last characters differ."""
    units = [
        [(match.start(), match.end()) for match in _UNITS.finditer(text)] for text in (one, other)
    ]
    words = [
        [spelling(text[begin:end]) for begin, end in found]
        for text, found in zip((one, other), units, strict=True)
    ]
    runs: list[Run] = []
    # The comparison may take the square of the number of words, which all the same ones need not.
    blocks = (
        [(0, 0, len(words[0]))]
        if words[0] == words[1]
        else SequenceMatcher(
            None, *words, autojunk=max(map(len, words)) > 1000
        ).get_matching_blocks()
    )
    for first, second, size in blocks:
        for (a, a_end), (b, b_end) in zip(
            units[0][first : first + size], units[1][second : second + size], strict=True
        ):
            if one[a:a_end] == other[b:b_end]:
                runs.append((a, b, a_end - a))
            else:
                runs += [
                    (a + c, b + d, n) for c, d, n in _same_characters(one[a:a_end], other[b:b_end])
                ]
    return runs


def _same_characters(one: str, other: str) -> list[Run]:
    """Of two words that read alike: the characters, each with its marks, that are the same."""
    starts = [
        [i for i, letter in enumerate(word) if not combining(letter)] + [len(word)]
        for word in (one, other)
    ]
    if len(starts[0]) != len(starts[1]):  # a ligature, or an ellipsis of three points
        return []
    runs = []
    for (a, a_end), (b, b_end) in zip(pairwise(starts[0]), pairwise(starts[1]), strict=True):
        if one[a:a_end] == other[b:b_end]:
            runs.append((a, b, a_end - a))
    return runs


def _follows(before: Run, run: Run) -> bool:
    return (before[0] + before[2], before[1] + before[2]) == run[:2]


def _front(one: str, other: str) -> int:
    """How many characters both begin with."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _decoded(text: bytes) -> str:
    """As characters, with a character for each byte that is none's: a cut may end within one."""
    return text.decode("utf-8", errors="surrogateescape")


def _offsets(text: str) -> list[int]:
    """The byte at which each character begins, and the number of all."""
    offsets = [0]
    for letter in text:
        offsets.append(offsets[-1] + len(letter.encode("utf-8", errors="surrogateescape")))
    return offsets
