"""How long a step takes, roughly: products, passes over logits, and soft-DTW's cells."""

from __future__ import annotations

from dwakd_plugin.plan.model_sizes import FLOAT
from dwakd_plugin.plan.parts import Parts

VOCABULARY_PASSES = 12  # times that a chunk's logits are read or written, per head, in float32
DTW_CELLS_PER_SECOND = {"cpu": 5e8, "cuda": 5e9}  # cpu: measured (docs/performance.md)


def seconds_per_step(run: Parts) -> float:
    """Of one optimizer step: products, passes over logits, and soft-DTW's cells."""
    lengths, B = run.lengths, run.batch
    full = not run.lora
    student, teacher = run.student, run.teacher
    passes = (6 if full else 4) + (2 if run.recipe.get("gradient_checkpointing") else 0)
    flops = passes * student.body_parameters * B * lengths.student
    if not run.cached:
        flops += 2 * teacher.body_parameters * B * lengths.teacher
    S = B * lengths.student_response
    T = B * lengths.teacher_response if run.kept_tokens is None else 0  # through its head
    # Two products in each space, and in backward one per input and one for a trained head.
    heads = S * student.head_rows * student.hidden_size * (5 if full else 4)
    heads += T * teacher.head_rows * teacher.hidden_size * 3
    logits = S * student.head_rows + T * teacher.head_rows
    cells = (
        2
        * B
        * sum(
            a * b
            for a, b in (
                (lengths.student_response, lengths.teacher_response),
                (lengths.student_response,) * 2,
                (lengths.teacher_response,) * 2,
            )
        )
    )
    if run.config.loss.dtw_weight == 0:
        cells = 0
    micro = (
        (flops + 2 * heads) / run.card.flops
        + logits * FLOAT * VOCABULARY_PASSES / run.card.bandwidth
        + cells / DTW_CELLS_PER_SECOND[run.card.kind]
    )
    return micro * int(run.recipe.get("gradient_accumulation_steps") or 1)
