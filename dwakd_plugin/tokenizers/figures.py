"""Figures of a pair of tokenizers: where tokens end in the same texts, and which both have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np

from dwakd_plugin.tokenizers.alignment import cuts_of
from dwakd_plugin.tokenizers.pair import (
    ByteCutter,
    Cut,
    PairCut,
    cut_both,
    text_of,
)

_WHITE_RUN = re.compile(r"\s{2,}|[\n\t]")


def _ends_within(cut: Cut, other: Cut) -> int:
    """How many of the tokens end where a token of the other side ends."""
    theirs = set(other.ends)
    return sum(end in theirs for end in cut.ends)


def _same_spans(cut: Cut, other: Cut) -> int:
    """How many of the tokens begin and end where one token of the other side does."""
    theirs = set(pairwise([0, *other.ends]))
    return sum(span in theirs for span in pairwise([0, *cut.ends]))


@dataclass
class TextFigures:
    """What was counted over texts; one entry a compared text in each list.

    `normalised` texts were compared as a tokenizer reads them, `left_out` ones not at all: a
    tokenizer has no token for a part of them.
    """

    texts: int = 0
    normalised: int = 0
    left_out: int = 0
    teacher_tokens: list[int] = field(default_factory=list)
    student_tokens: list[int] = field(default_factory=list)
    teacher_ends_shared: list[int] = field(default_factory=list)
    student_ends_shared: list[int] = field(default_factory=list)
    student_spans_shared: list[int] = field(default_factory=list)
    common_ends: list[int] = field(default_factory=list)
    characters: Counter[str] = field(default_factory=Counter)
    white_run_characters: int = 0

    def add(self, text: str, pair: PairCut | None) -> None:
        """Counts one text; one without a token on either side is not compared (nor left out)."""
        self.texts += 1
        self.characters.update(text)
        self.white_run_characters += sum(map(len, _WHITE_RUN.findall(text)))
        if pair is None:
            self.left_out += 1
            return
        self.normalised += pair.text != text
        teacher, student = pair.teacher, pair.student
        if not teacher.ends or not student.ends:
            return
        self.teacher_tokens.append(len(teacher.ends))
        self.student_tokens.append(len(student.ends))
        self.teacher_ends_shared.append(_ends_within(teacher, student))
        self.student_ends_shared.append(_ends_within(student, teacher))
        self.student_spans_shared.append(_same_spans(student, teacher))
        self.common_ends.append(len(set(teacher.ends) & set(student.ends)))

    def as_dict(self) -> dict[str, Any]:
        """Shares and ratios. Empty lists give None: nothing was compared.

        `length_ratio`: student/teacher tokens per text, and `corpus`, over all texts together.
        `boundary_agreement_*` and `identical_span_share` are over all texts together; their
        distributions over texts are in `per_text`.
        """
        teacher, student = np.array(self.teacher_tokens), np.array(self.student_tokens)
        figures: dict[str, Any] = {
            "texts": self.texts,
            "texts_compared": len(teacher),
            "texts_normalised": self.normalised,
            "texts_left_out": self.left_out,
            "teacher_tokens": int(teacher.sum()),
            "student_tokens": int(student.sum()),
            "length_ratio": None,
            "boundary_agreement_student": None,
            "boundary_agreement_teacher": None,
            "identical_span_share": None,
            "common_segments_per_text": None,
            "per_text": None,
        }
        if len(teacher) == 0:
            return figures
        shares = {
            "boundary_agreement_student": (np.array(self.student_ends_shared), student),
            "boundary_agreement_teacher": (np.array(self.teacher_ends_shared), teacher),
            "identical_span_share": (np.array(self.student_spans_shared), student),
        }
        return figures | {
            "length_ratio": _distribution(student / teacher)
            | {"corpus": _rounded(student.sum() / teacher.sum())},
            **{name: _rounded(part.sum() / whole.sum()) for name, (part, whole) in shares.items()},
            "common_segments_per_text": _rounded(np.mean(self.common_ends)),
            "per_text": {
                name: _distribution(part / whole) for name, (part, whole) in shares.items()
            },
        }


def _rounded(value: Any) -> float:
    return round(float(value), 6)


def _distribution(values: Any) -> dict[str, float]:
    p5, p50, p95 = np.percentile(values, [5, 50, 95])
    return {
        "mean": _rounded(values.mean()),
        "p5": _rounded(p5),
        "p50": _rounded(p50),
        "p95": _rounded(p95),
        "min": _rounded(values.min()),
        "max": _rounded(values.max()),
    }


def measure(
    teacher: ByteCutter, student: ByteCutter, texts: Iterable[str], batch: int = 500
) -> TextFigures:
    """Cuts the texts with both tokenizers, `batch` at a time, and counts."""
    figures = TextFigures()
    rest = iter(texts)
    while chunk := list(islice(rest, batch)):
        for text, pair in zip(chunk, cut_both(teacher, student, chunk), strict=True):
            figures.add(text, pair)
    return figures


def vocabulary_figures(teacher: ByteCutter, student: ByteCutter) -> dict[str, Any]:
    """Sizes and what is shared: as strings (added tokens too) and as bytes (without them).

    `shared_tokens_read` are those of the latter that the student's own cuts arrive at: the others
    are in its vocabulary, and it never reads them.
    """
    strings = teacher.vocabulary.keys(), student.vocabulary.keys()
    pieces, own = teacher.ids_by_bytes(), student.ids_by_bytes()
    shared_strings, shared_pieces = strings[0] & strings[1], pieces.keys() & own.keys()
    # A part of a character is read within one, and not by itself.
    texts = {own[piece]: text for piece in shared_pieces if (text := text_of(piece))}
    cuts = cuts_of(student, texts, range(1 + max(own.values())))
    return {
        "teacher_vocab_size": len(strings[0]),
        "student_vocab_size": len(strings[1]),
        "shared_tokens_exact": len(shared_strings),
        "shared_tokens_exact_share_of_teacher": _rounded(len(shared_strings) / len(strings[0])),
        "shared_tokens_exact_share_of_student": _rounded(len(shared_strings) / len(strings[1])),
        "shared_tokens_bytes": len(shared_pieces),
        "shared_tokens_read": len(shared_pieces)
        - sum(cut != (token,) for token, cut in cuts.items()),
        "shared_tokens_bytes_share_of_teacher": _rounded(len(shared_pieces) / len(pieces)),
        "shared_tokens_bytes_share_of_student": _rounded(len(shared_pieces) / len(own)),
    }
