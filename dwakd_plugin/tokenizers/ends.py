"""Which token ends an answer on either side, as the rows have it.

A tokenizer's end of sequence need not be what a chat template ends a turn with: Gemma's is `<eos>`,
and its turns end with `<end_of_turn>`; a base model with ChatML ends them with a token that is none
of its special ones. Where the teacher is sure that an answer ends, the student is to learn its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = ("labels", "teacher_labels")
ENOUGH = 200  # rows that are looked at


def paired_ends(
    rows: Iterable[Mapping[str, Sequence[int]]], student_tokenizer: Any, teacher_tokenizer: Any
) -> dict[int, int]:
    """The teacher's token that ends most answers, and the student's; empty where none does.

    Rows have the `COLUMNS`. An end is the last token that is learnt of a row, if it is one that was
    added to the vocabulary; a row counts if both sides learn of it.
    """
    added = student_tokenizer.added_tokens_decoder, teacher_tokenizer.added_tokens_decoder
    pairs: Counter[tuple[int, int]] = Counter()
    seen = 0
    for row in rows:
        student, teacher = _last(row["labels"]), _last(row["teacher_labels"])
        if student is None or teacher is None:
            continue
        seen += 1
        if student in added[0] and teacher in added[1]:
            pairs[teacher, student] += 1
        if seen == ENOUGH:
            break
    found = pairs.most_common(1)
    return {teacher: student for (teacher, student), count in found if 2 * count > seen}


def _last(labels: Sequence[int]) -> int | None:
    """The last token that is learnt; nothing predicts a row's first."""
    return next((label for label in reversed(labels[1:]) if label != -100), None)
