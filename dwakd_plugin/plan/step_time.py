"""How long a step takes, roughly: products, passes over logits, and soft-DTW's cells."""

from __future__ import annotations

from dwakd_plugin.plan.loss_trace import SPELT_SHARE
from dwakd_plugin.plan.model_sizes import FLOAT
from dwakd_plugin.plan.parts import Parts
from dwakd_plugin.plan.soft_dtw import serial_seconds, shapes

VOCABULARY_PASSES = 12  # times that a chunk's logits are read or written, per head, in float32
CPU_CELLS_PER_SECOND = 5e8  # of soft-DTW: measured (docs/performance.md)
CUDA_STEP = 5e-7  # seconds of one of soft-DTW's steps, each waiting for the one before; assumed


def seconds_per_step(run: Parts, *, body: bool = True) -> float:
    """Of one optimizer step: products, passes over logits, and soft-DTW's cells.

    body: with the student's own, which goes once whatever number of teachers there is.
    """
    lengths, B = run.lengths, run.batch
    full = not run.lora
    student, teacher = run.student, run.teacher
    passes = (6 if full else 4) + (2 if run.recipe.get("gradient_checkpointing") else 0)
    flops = body * passes * student.body_parameters * B * lengths.student
    if run.has_teacher:
        flops += 2 * teacher.body_parameters * run.live_share * B * lengths.teacher
    S = B * lengths.student_response
    T = B * lengths.teacher_response if run.kept_tokens is None else 0  # through its head
    sizes = [each.head_rows * each.hidden_size for each in (student, teacher)]
    ordinary, also_spelt = (run.head_traces(spelt=each)[0].products for each in (False, True))
    # Traced with spellings, each position goes through as one that begins and one that goes on too.
    heads = sum(
        size * (tokens * once + SPELT_SHARE / 2 * T * (thrice - once))
        for size, tokens, once, thrice in zip(sizes, (S, T), ordinary, also_spelt, strict=True)
    )
    logits = S * student.head_rows + T * teacher.head_rows
    micro = (
        (flops + 2 * heads) / run.card.flops
        + logits * FLOAT * VOCABULARY_PASSES / run.card.bandwidth
        + _soft_dtw(run)
    )
    return micro * int(run.recipe.get("gradient_accumulation_steps") or 1)


def _soft_dtw(run: Parts) -> float:
    if not run.warps:
        return 0.0
    sizes = run.batch, run.lengths.student_response, run.lengths.teacher_response
    if run.card.kind == "cuda":
        return serial_seconds(*sizes, CUDA_STEP)
    return sum(B * rows * columns for B, rows, columns in shapes(*sizes)) / CPU_CELLS_PER_SECOND
