"""Pads both sides of a batch, and says where on each side the response positions are.

A *response position* is one whose shifted label counts: the model reads the token there and is
asked for the next one (D1). Its indices are found here, on the CPU, so that the training step never
waits for the device to count them.

Keys added to axolotl's batch (B samples, L tokens, S or T response positions; all int64):
    teacher_input_ids, teacher_attention_mask (B, L)
    student_positions (B, S), teacher_positions (B, T)   in order, right-padded with 0
    student_lengths (B,), teacher_lengths (B,)           how many of them count
    student_index (Ns,), teacher_index (Nt,)             their places in the flattened (B · S or T)
    source_row (B,)                                      where each row comes from
    teacher_hidden (B, T, D), float                      only where a teacher cache is in use
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from axolotl.utils.collators import DataCollatorForSeq2Seq
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dwakd_plugin.dual_tokenization import SOURCE_COLUMN
from dwakd_plugin.teacher_cache import TeacherCache

# What the collator adds to a batch; the student's own forward takes none of it.
DISTILLATION_KEYS = (
    "teacher_input_ids",
    "teacher_attention_mask",
    "student_positions",
    "teacher_positions",
    "student_lengths",
    "teacher_lengths",
    "student_index",
    "teacher_index",
    "teacher_hidden",
    SOURCE_COLUMN,
)


@dataclass
class DualCollator(DataCollatorForSeq2Seq):
    """axolotl's collator for the student's side, and the same for the teacher's."""

    teacher_cache: TeacherCache | None = None

    def __call__(
        self, features: list[dict[str, Any]], return_tensors: str | None = None
    ) -> dict[str, Tensor]:
        if "teacher_input_ids" not in features[0]:  # axolotl's own evaluation command
            return super().__call__(features, return_tensors)
        features = [dict(feature) for feature in features]
        teacher_ids = [torch.tensor(feature.pop("teacher_input_ids")) for feature in features]
        teacher_labels = [torch.tensor(feature.pop("teacher_labels")) for feature in features]
        source_rows = [feature.pop(SOURCE_COLUMN, -1) for feature in features]

        batch = super().__call__(features, return_tensors)
        batch.update(teacher_batch(teacher_ids, teacher_labels))
        if self.teacher_cache is not None:
            cached = map(self.teacher_cache.read, teacher_ids, teacher_labels)
            batch["teacher_hidden"] = pad_sequence(list(cached), batch_first=True)
        # The student's labels may be padded on the left; positions are found after padding.
        batch.update(response_positions("student", list(batch["labels"])))
        batch[SOURCE_COLUMN] = torch.tensor(source_rows)
        return batch


def teacher_batch(teacher_ids: list[Tensor], teacher_labels: list[Tensor]) -> dict[str, Tensor]:
    """The teacher's side of a batch, padded on the right, from rows of token ids and labels (L,).

    The padding's token id is 0, which every vocabulary has; the mask says that it does not count.
    """
    return {
        "teacher_input_ids": pad_sequence(teacher_ids, batch_first=True),
        "teacher_attention_mask": pad_sequence(
            [torch.ones_like(ids) for ids in teacher_ids], batch_first=True
        ),
        **response_positions("teacher", teacher_labels),
    }


def response_positions(side: str, labels: list[Tensor]) -> dict[str, Tensor]:
    """Where the shifted labels count, as the keys `{side}_positions`, `_lengths` and `_index`.

    S is at least 1, so that a batch without any response still has a shape.
    """
    rows = [torch.nonzero(row[1:] != -100).squeeze(1) for row in labels]
    lengths = torch.tensor([len(row) for row in rows])
    positions = pad_sequence(rows, batch_first=True)
    if positions.shape[1] == 0:
        positions = torch.zeros(len(rows), 1, dtype=torch.long)
    counts = torch.arange(positions.shape[1]) < lengths[:, None]
    return {
        f"{side}_positions": positions,
        f"{side}_lengths": lengths,
        f"{side}_index": counts.flatten().nonzero().squeeze(1),
    }
