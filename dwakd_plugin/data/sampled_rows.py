"""Rows of a batch whose last answer the student gives itself, and their way back into the batch.

In such a row only the positions that both sides have in common are labelled, so that the k-th
labelled position of one side and the k-th of the other have read the same bytes. All tokens are
there to be read. Earlier turns of a conversation stay as they are given, without labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dwakd_plugin.data.answers import last_answer
from dwakd_plugin.data.dual_tokenization import SOURCE_COLUMN
from dwakd_plugin.tokenizers.sampled import SampledText

OWN_ROWS = "own_rows"  # (k,) long: which samples of a batch have an answer of the student's own
OWN_ANSWER = "own_answer"  # of a row for the collator: whether it has one


@dataclass(frozen=True)
class Row:
    """Both sides of a row: token ids, and the labels, −100 where nothing is learnt."""

    student_ids: list[int]
    student_labels: list[int]
    teacher_ids: list[int]
    teacher_labels: list[int]
    source: int
    own: bool = False  # whether the answer is the student's own

    def feature(self) -> dict[str, Any]:
        """The row as the collator takes it."""
        return {
            "input_ids": self.student_ids,
            "attention_mask": [1] * len(self.student_ids),
            "labels": self.student_labels,
            "teacher_input_ids": self.teacher_ids,
            "teacher_labels": self.teacher_labels,
            SOURCE_COLUMN: self.source,
            OWN_ANSWER: self.own,
        }


def rows_of(batch: dict[str, Tensor]) -> list[Row]:
    """The rows that `DualCollator` made a batch of, packed or not, in the order of its samples."""
    ids, labels = (batch[name].flatten().tolist() for name in ("input_ids", "labels"))
    theirs = batch["teacher_input_ids"].flatten().tolist()
    places = batch["teacher_positions"].tolist(), batch["teacher_lengths"].tolist()
    spans = batch["student_rows"].tolist(), batch["teacher_rows"].tolist()
    own = set(batch[OWN_ROWS].tolist()) if OWN_ROWS in batch else set()
    rows = []
    for number, ((start, end), (their_start, their_end), positions, count, source) in enumerate(
        zip(*spans, *places, batch[SOURCE_COLUMN].tolist(), strict=True)
    ):
        labelled = {place + 1 for place in positions[:count]}
        rows.append(
            Row(
                ids[start:end],
                labels[start:end],
                theirs[their_start:their_end],
                [
                    theirs[place] if place in labelled else -100
                    for place in range(their_start, their_end)
                ],
                source,
                number in own,
            )
        )
    return rows


def answer_begins(labels: Sequence[int]) -> int | None:
    """Where the last run of labels begins; None where there is none, or no prompt before it."""
    begin, _ = last_answer(labels)
    return begin or None


def end_of(ids: Sequence[int], labels: Sequence[int], special: frozenset[int]) -> int | None:
    """The token that ends a row's last answer: its last special one; None where it has none."""
    begin = answer_begins(labels)
    answer = zip(ids[begin:], labels[begin:], strict=True)
    ends = [token for token, label in answer if label != -100 and token in special]
    return ends[-1] if ends else None


def prompt_of(row: Row) -> list[int] | None:
    """The student's tokens before the last answer; None where a side has no answer."""
    begin = answer_begins(row.student_labels)
    if begin is None or answer_begins(row.teacher_labels) is None:
        return None
    return row.student_ids[:begin]


def answered(
    row: Row, sample: list[int], ended: bool, text: SampledText, teacher_end: int, longest: int
) -> Row | None:
    """The row with a sampled answer on both sides; None where it cannot be aligned.

    sample: the sampled ids, which stay as they are, an end included where it `ended`. The teacher's
    end is the one that the given answer has, else `teacher_end`; its side takes `longest` tokens.
    """
    begin, other_begin = answer_begins(row.student_labels), answer_begins(row.teacher_labels)
    assert begin is not None
    assert other_begin is not None
    said = text.text(sample[:-1] if ended else sample)
    if said is None:
        return None
    prompt, given = row.teacher_ids[:other_begin], row.teacher_ids[other_begin:]
    answer = text.behind(prompt, text.spaced_as(said, row.student_ids[begin:], given))
    if answer is None:
        return None
    if ended:
        end = end_of(row.teacher_ids, row.teacher_labels, text.teacher_special)
        answer = [*answer, teacher_end if end is None else end]
    pairs = text.pairs(sample, answer)
    if not pairs or len(prompt) + len(answer) > longest:
        return None
    ours, theirs = {i for i, _ in pairs}, {j for _, j in pairs}
    return Row(
        [*row.student_ids[:begin], *sample],
        [-100] * begin + [token if i in ours else -100 for i, token in enumerate(sample)],
        [*prompt, *answer],
        [-100] * len(prompt) + [token if j in theirs else -100 for j, token in enumerate(answer)],
        row.source,
        own=True,
    )


def given_labels(batch: dict[str, Tensor]) -> Tensor:
    """The labels of a batch, as (sequences, L), without what the student sampled."""
    labels, own = batch["labels"], batch.get(OWN_ROWS)
    if own is None:
        return labels
    # Counted, so that a device needn't say how many there are; padding counts none.
    places = batch["student_positions"][own] + 1
    lengths = batch["student_lengths"][own]
    counts = torch.arange(places.shape[1], device=places.device) < lengths.unsqueeze(1)
    ours = torch.zeros_like(labels).flatten()
    ours.scatter_add_(0, places.flatten(), counts.flatten().to(ours.dtype))
    return labels.masked_fill(ours.view_as(labels) > 0, -100)
