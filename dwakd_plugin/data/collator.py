"""Lays out both sides of a batch, and says where on each side the response positions are.

A *response position* is one whose shifted label counts: the model reads the token there and is
asked for the next one (D1). Its indices are found here, on the CPU, so that the training step never
waits for the device to count them.

A batch has B samples. Unpacked, each is a sequence of its own, padded, with an attention mask.
Packed, axolotl's sampler gives lists of samples; each list becomes one sequence of the student's,
and the teacher's samples are packed again. Sequences then have position ids that start at 0 with
each sample, and no attention mask.

Keys added to axolotl's batch (B samples, S or T response positions, L tokens a sequence; int64):
    teacher_input_ids (sequences, L), with teacher_attention_mask or teacher_position_ids
    student_positions (B, S), teacher_positions (B, T)   places in the flattened sequences,
                                                         in order, right-padded with 0
    student_lengths (B,), teacher_lengths (B,)           how many of them count
    student_rows (B, 2), teacher_rows (B, 2)             where each sample begins and ends there
    student_index (Ns,), teacher_index (Nt,)             their places in the flattened (B · S or T)
    student_pairs (P,), teacher_pairs (P,)               places there of the positions that predict
                                                         the same bytes; only where the loss
                                                         matches by bytes
    student_read (P,)                                    what the student has read of the teacher's
                                                         token (`ResponseStates.read`)
    student_spelt (Q,), teacher_spelt (Q,)               places of the student's that the teacher
                                                         spells, and of the teacher's there; first
                                                         those with nothing of the spelling before
    student_spelt_read (R,)                              what of the spelling comes before the last
                                                         R (`ResponseStates.spelt_read`)
    source_row (B,)                                      where each row comes from
    teacher_hidden (B, T, D), float                      only where `teacher_states` are given;
    teacher_top (B, T, k, 2), int32                      the second where they are `TopTokens`
                                                         (`models.teacher.top_tokens.to_bits`)
    teacher_asked (B,)                                   instead, until a server has answered: the
                                                         numbers that `ServedTeacher.take` takes
    own_rows (k,)                                        samples whose answer is the student's own
    teacher_live                                         where `teacher_states` are given, of
                                                         `own_rows` alone: a mapping of the
                                                         teacher's keys from above, unpacked, and
                                                         `rows`, which they are; these have nothing
                                                         in `teacher_hidden`
Where there are several teachers, that is the first's side, and there are also
    further_teachers   a mapping for each of the others: the keys from above with its side
    taught_by          for each sample, the numbers of the teachers that it learns from
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from axolotl.utils.collators import DataCollatorForSeq2Seq
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dwakd_plugin.data.dual_tokenization import SOURCE_COLUMN
from dwakd_plugin.data.packing import LENGTH_COLUMN
from dwakd_plugin.data.sampled_rows import OWN_ANSWER, OWN_ROWS
from dwakd_plugin.models.batches import LIVE, response_positions, teacher_batch, teacher_columns
from dwakd_plugin.models.teacher.top_tokens import RowStates, TopTokens, to_bits
from dwakd_plugin.tokenizers.alignment import NumberedPairs, TokenAligner

FURTHER = "further_teachers"
TAUGHT_BY = "taught_by"

# What `TokenAligner.aligned` finds of a row: tokens of the same bytes, and spelt ones.
ALIGNED = (
    ("student_pairs", "teacher_pairs", "student_read"),
    ("student_spelt", "teacher_spelt", "student_spelt_read"),
)

# What is added to axolotl's batch; the student's own forward takes none of it.
DISTILLATION_KEYS = (
    "teacher_input_ids",
    "teacher_attention_mask",
    "teacher_position_ids",
    "student_positions",
    "teacher_positions",
    "student_lengths",
    "teacher_lengths",
    "student_index",
    "teacher_index",
    "student_pairs",
    "teacher_pairs",
    "student_read",
    "student_spelt",
    "teacher_spelt",
    "student_spelt_read",
    "teacher_hidden",
    "teacher_top",
    "teacher_asked",
    "student_rows",
    "teacher_rows",
    LIVE,
    "student_hidden",  # from a warm-up that has computed them before
    SOURCE_COLUMN,
    OWN_ROWS,
    FURTHER,
    TAUGHT_BY,
)


def split_batch(inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was added to axolotl's batch, and the rest: what the student's own forward takes."""
    added = {key: inputs[key] for key in DISTILLATION_KEYS if key in inputs}
    return added, {key: value for key, value in inputs.items() if key not in added}


def sides_of_teachers(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Each teacher's side of a collated batch, in the recipe's order; the first's is the batch."""
    return [batch, *batch.get(FURTHER, ())]


@dataclass(frozen=True)
class TeacherLayout:
    """How a teacher's side is laid out: see `DualCollator`."""

    states: RowStates | None = None
    sequence_len: int | None = None
    aligner: TokenAligner | None = None


@dataclass
class DualCollator(DataCollatorForSeq2Seq):
    """axolotl's collator for the student's side, and the same for the teacher's.

    teacher_states: the teacher's hidden states (response positions, D) of a row, or its
    `TopTokens`, by the row's teacher token ids and labels (L,); None where the step computes them.
    teacher_sequence_len: tokens of a packed sequence of the teacher's; None for as many as come.
    aligner: finds the positions of both sides that `student_pairs` and `teacher_pairs` hold.
    further: the same three for each teacher but the first.
    """

    teacher_states: RowStates | None = None
    teacher_sequence_len: int | None = None
    aligner: TokenAligner | None = None
    further: tuple[TeacherLayout, ...] = ()

    def __call__(self, features: list[Any], return_tensors: str | None = None) -> dict[str, Tensor]:
        packed = isinstance(features[0], list)
        sequences = features if packed else [[feature] for feature in features]
        rows = [dict(row) for sequence in sequences for row in sequence]
        has_teacher = "teacher_input_ids" in rows[0]
        first = TeacherLayout(self.teacher_states, self.teacher_sequence_len, self.aligner)
        layouts = [first, *self.further]
        sides = [
            [[torch.tensor(row.pop(name, [])) for row in rows] for name in teacher_columns(number)]
            for number in range(len(layouts))
        ]
        source_rows = [row.pop(SOURCE_COLUMN, -1) for row in rows]
        own_rows = [place for place, row in enumerate(rows) if row.pop(OWN_ANSWER, False)]
        for row in rows:
            row.pop(LENGTH_COLUMN, None)
            for name in [name for name in row if name.startswith("teacher_")]:
                del row[name]  # of teachers that no term asks for
            # Nothing predicts a row's first token, whatever is packed or padded before it.
            row["labels"] = [-100, *row["labels"][1:]]

        student = _concatenated(sequences, rows) if packed else rows
        lengths = [len(sequence["input_ids"]) for sequence in student]
        labels = [torch.tensor(row["labels"]) for row in rows]
        batch = super().__call__(student, return_tensors)
        if not has_teacher:  # axolotl's own evaluation command
            return batch
        width = batch["input_ids"].shape[1]
        starts = []
        for index, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            start = index * width
            if self.tokenizer.padding_side == "left":
                start += width - length
            for row in sequence:
                starts.append(start)
                start += len(row["input_ids"])
        batch.update(response_positions("student", labels, starts))
        own, *further = (
            _side(layout, rows, labels, side, packed, batch, own_rows)
            for layout, side in zip(layouts, sides, strict=True)
        )
        batch.update(own)
        if further:
            batch[FURTHER] = further
            taught = [side["teacher_lengths"].tolist() for side in (own, *further)]
            batch[TAUGHT_BY] = [
                [number for number, length in enumerate(lengths) if length]
                for lengths in zip(*taught, strict=True)
            ]
        batch[SOURCE_COLUMN] = torch.tensor(source_rows)
        if own_rows:
            batch[OWN_ROWS] = torch.tensor(own_rows)
        return batch


def _side(
    layout: TeacherLayout,
    rows: list[dict[str, Any]],
    labels: list[Tensor],
    side: list[list[Tensor]],
    packed: bool,
    batch: dict[str, Tensor],
    own_rows: list[int],
) -> dict[str, Tensor]:
    """A teacher's side of a batch that has the student's: `side` has each row's ids and labels, and
    nobody has the teacher's states of `own_rows`."""
    result = teacher_batch(*side, packed, layout.sequence_len)
    if layout.states is not None:
        result |= _said_before(layout.states, side, own_rows)
    if layout.aligner is not None:
        find = layout.aligner.aligned
        found = [
            find(row["input_ids"], own.tolist(), ids.tolist(), theirs.tolist())
            for row, own, ids, theirs in zip(rows, labels, *side, strict=True)
        ]
        for keys, pairs in zip(ALIGNED, zip(*found, strict=True), strict=True):
            result |= aligned_positions(pairs, {**batch, **result}, keys)
        result |= first_before_further(result)
    return result


def _said_before(
    states: RowStates, side: list[list[Tensor]], own_rows: list[int]
) -> dict[str, Any]:
    """What the teacher has said of a batch's rows before, and those that it is still to read."""
    if not own_rows:
        return said_of_rows(map(states, *side))
    rows = enumerate(zip(*side, strict=True))
    said = [None if place in own_rows else states(*row) for place, row in rows]
    unread = [[column[place] for place in own_rows] for column in side]
    live = {LIVE: {"rows": torch.tensor(own_rows), **teacher_batch(*unread)}}
    known = next((row for row in said if isinstance(row, Tensor)), None)
    if known is None:
        return live
    return live | said_of_rows(known[:0] if row is None else row for row in said)


def said_of_rows(rows: Iterable[Tensor | TopTokens | int]) -> dict[str, Tensor]:
    """What the teacher says of each row, padded: the key of its states, or of its tokens; or the
    numbers that a served one was asked by."""
    found = list(rows)
    if isinstance(found[0], int):
        return {"teacher_asked": torch.tensor(found)}
    bits = [to_bits(row) for row in found if isinstance(row, TopTokens)]
    name = "teacher_top" if bits else "teacher_hidden"
    return {name: pad_sequence(bits or found, batch_first=True)}


def _concatenated(
    sequences: list[list[Any]], rows: list[dict[str, Any]]
) -> list[dict[str, list[int]]]:
    """One sequence for each list of rows; `rows` are theirs, one after another."""
    result = []
    remaining = iter(rows)
    for places in sequences:
        own = list(islice(remaining, len(places)))
        result.append(
            {
                "input_ids": [token for row in own for token in row["input_ids"]],
                "labels": [label for row in own for label in row["labels"]],
                "position_ids": [place for row in own for place in range(len(row["input_ids"]))],
            }
        )
    return result


def aligned_positions(
    pairs: Sequence[NumberedPairs], batch: dict[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """Each sample's pairs of response positions as places in the flattened (B · S), (B · T), and
    their numbers, by the three names."""
    places = [
        (
            sample * batch["student_positions"].shape[1] + i,
            sample * batch["teacher_positions"].shape[1] + j,
            read,
        )
        for sample, found in enumerate(pairs)
        for i, j, read in found
    ]
    columns = torch.tensor(places, dtype=torch.long).view(-1, 3).T.contiguous()
    return dict(zip(names, columns, strict=True))


def first_before_further(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The spelt places with those first that have nothing of the spelling before. Numbers are left
    of the others alone, so that the tensors' sizes say where these begin."""
    read = batch["student_spelt_read"]
    order = (read > 0).long().argsort(stable=True)
    places = {name: batch[name][order] for name in ("student_spelt", "teacher_spelt")}
    return {**places, "student_spelt_read": read[read > 0]}
