"""Where the rows of one side stand in a batch: its sequences, and the positions that answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dwakd_plugin.errors import UserError

LIVE = "teacher_live"  # of a batch whose other rows are known: what the teacher itself is to read


def teacher_columns(number: int) -> tuple[str, str]:
    """The columns of a row's token ids and labels by the teacher with this number, from 0.

    >>> teacher_columns(0), teacher_columns(1)
    (('teacher_input_ids', 'teacher_labels'), ('teacher_input_ids_2', 'teacher_labels_2'))
    """
    suffix = f"_{number + 1}" if number else ""
    return f"teacher_input_ids{suffix}", f"teacher_labels{suffix}"


def teacher_batch(
    teacher_ids: list[Tensor],
    teacher_labels: list[Tensor],
    packed: bool = False,
    sequence_len: int | None = None,
) -> dict[str, Tensor]:
    """The teacher's side of a batch, padded on the right, from rows of token ids and labels (L,).

    `packed` puts rows into sequences of `sequence_len` tokens, or all into one where that is None.
    The padding's token id is 0, which every vocabulary has; the mask says that it does not count,
    or positions that start again.
    """
    lengths = [len(ids) for ids in teacher_ids]
    if packed:
        sequences = pack(lengths, sum(lengths) if sequence_len is None else sequence_len)
    else:
        sequences = [[place] for place in range(len(lengths))]
    ids = pad_sequence(
        [torch.cat([teacher_ids[place] for place in places]) for places in sequences],
        batch_first=True,
    )
    starts = [0] * len(lengths)
    position_ids, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, places in enumerate(sequences):
        start = 0
        for place in places:
            starts[place] = index * ids.shape[1] + start
            position_ids[index, start : start + lengths[place]] = torch.arange(lengths[place])
            start += lengths[place]
        mask[index, :start] = 1
        position_ids[index, start:] = torch.arange(ids.shape[1] - start)
    return {
        "teacher_input_ids": ids,
        **({"teacher_position_ids": position_ids} if packed else {"teacher_attention_mask": mask}),
        **response_positions("teacher", teacher_labels, starts),
    }


def known_and_read(batch: dict[str, Any], read: Tensor) -> Tensor:
    """A batch's teacher states (B, T, D): of its `LIVE` rows those that were `read`, (k, L, D), of
    the others those that it has. In the dtype of `read`."""
    hidden = read.new_zeros(*batch["teacher_positions"].shape, read.shape[-1])
    if (known := batch.get("teacher_hidden")) is not None:
        hidden[:, : known.shape[1]] = known
    hidden[batch[LIVE]["rows"], : read.shape[1]] = read
    return hidden


def response_positions(side: str, labels: list[Tensor], starts: list[int]) -> dict[str, Tensor]:
    """Where the shifted labels count, as the keys `{side}_positions`, `_lengths` and `_index`; and
    where the samples stand, as `{side}_rows`.

    `starts` are the places of the samples' first tokens in the flattened sequences. S is at least
    1, so that a batch without any response still has a shape.
    """
    rows = [
        torch.nonzero(row[1:] != -100).squeeze(1) + start
        for row, start in zip(labels, starts, strict=True)
    ]
    lengths = torch.tensor([len(row) for row in rows])
    positions = pad_sequence(rows, batch_first=True)
    if positions.shape[1] == 0:
        positions = torch.zeros(len(rows), 1, dtype=torch.long)
    counts = torch.arange(positions.shape[1]) < lengths[:, None]
    return {
        f"{side}_positions": positions,
        f"{side}_lengths": lengths,
        f"{side}_index": counts.flatten().nonzero().squeeze(1),
        f"{side}_rows": torch.tensor(
            [(start, start + len(row)) for row, start in zip(labels, starts, strict=True)]
        ),
    }


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Places in `lengths`, by sequence: the longest first, each into the first with room (FFD).

    What is longer than `capacity` has a sequence of its own.
    """
    # axolotl's pack_group gives the same packs, and is compiled again in each process: 2.7 s.
    sequences: list[list[int]] = []
    rooms: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        index = next((i for i, room in enumerate(rooms) if lengths[place] <= room), len(rooms))
        if index == len(rooms):
            rooms.append(capacity)
            sequences.append([])
        rooms[index] -= lengths[place]
        sequences[index].append(place)
    return sequences


def check_ids(rows: Iterable[Tensor], size: int, teacher: str, tokens: Any) -> None:
    """Raises UserError where a row has a token beyond the teacher's embeddings, of `size` rows.

    tokens: the teacher's tokenizer, which has tokens that were never added to its model.
    """
    largest = max((int(ids.max()) for ids in rows if len(ids)), default=0)
    if largest >= size:
        token = largest if tokens is None else repr(tokens.convert_ids_to_tokens(largest))
        raise UserError(
            f"The teacher {teacher} has embeddings of {size:,} tokens, and its side of the data "
            f"has the token {largest} ({token}), which was added to its tokenizer and not to the "
            "model. Give the tokenizer that it was trained with "
            "(dwakd.teacher.tokenizer), or a chat template without that token "
            "(dwakd.teacher.chat_template)."
        )
