"""The student's side of the loss: its states at response positions, with their graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwakd_plugin.loss import ResponseStates
from dwakd_plugin.models.causal_lm import (
    embedding_table,
    gather_positions,
    hidden_states,
    output_head,
)


def student_states(
    student: Any,
    batch: dict[str, Tensor],
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    embeds: bool = True,
    **inputs: Tensor,
) -> ResponseStates:
    """What the loss needs of the student, for a collated batch; one forward through its body.

    `batch` holds what the collator found out about positions; input_ids, labels and attention_mask
    are (sequences, L), and further inputs go to the body as they are. Where `batch` has
    `student_hidden` (B, S, d), the states at those positions are known and the body is left alone.
    Where the loss reads no `embeds`, none are looked up: their backward, zeros, would be a gradient
    of the whole embedding table's size.
    """
    positions, lengths = batch["student_positions"], batch["student_lengths"]
    targets = gather_positions(labels, positions + 1)
    real = torch.arange(positions.shape[1], device=positions.device) < lengths.unsqueeze(1)
    hidden = batch.get("student_hidden")
    if hidden is None:
        hidden = hidden_states(student, input_ids, attention_mask, **inputs)
        hidden = gather_positions(hidden, positions)
    table = embedding_table(student) if embeds else None
    input_embeds, target_embeds = (
        hidden[..., :0].detach() if table is None else table(gather_positions(input_ids, places))
        for places in (positions, positions + 1)
    )
    return ResponseStates(
        input_embeds=input_embeds,
        target_embeds=target_embeds,
        hidden=hidden,
        lengths=lengths,
        head=output_head(student),
        labels=targets.where(real, -100),
        index=batch.get("student_index"),
        pairs=batch.get("student_pairs"),
        read=batch.get("student_read"),
        spelt=batch.get("student_spelt"),
        spelt_read=batch.get("student_spelt_read"),
    )
