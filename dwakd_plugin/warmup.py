"""Projector warm-up: some steps for the projectors alone, before the student learns from them.

Early distillation through untrained projectors teaches noise, and what the student unlearns then it
does not get back. Here both models are frozen and the projectors train on the terms that
concern them in the student's space: the t2s cross-entropy and the two DTW terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dwakd_plugin.collator import DISTILLATION_KEYS
from dwakd_plugin.config import DWAKDConfig
from dwakd_plugin.loss import dwakd_loss
from dwakd_plugin.projectors import Projectors
from dwakd_plugin.student import student_states
from dwakd_plugin.teacher import Teacher

# The report's figures are means over this many batches at either end, each seen before its update.
REPORTED_BATCHES = 10


@dataclass
class WarmupReport:
    """The t2s cross-entropy (nats per token) and accuracy, at the start and at the end."""

    steps: int
    t2s_ce: tuple[float, float]
    t2s_accuracy: tuple[float, float]

    def __str__(self) -> str:
        (ce, ce_after), (accuracy, accuracy_after) = self.t2s_ce, self.t2s_accuracy
        return (
            f"warmed up for {self.steps} steps: t2s cross-entropy {ce:.2f} to {ce_after:.2f}, "
            f"accuracy {accuracy:.0%} to {accuracy_after:.0%}"
        )


def warm_up(
    projectors: Projectors,
    student: nn.Module,
    teacher: Teacher,
    dataset: Any,
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    config: DWAKDConfig,
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WarmupReport:
    """Trains the projectors for `projectors.warmup_steps` batches of the data set, in place.

    The student stays as it is, and so does its mode. Batches are drawn with `seed`, the same on
    every rank.
    """
    settings = config.projectors
    # Terms of weight 0 cost nothing; the teacher's space, the dearest, would train s2t alone.
    loss = config.loss.model_copy(update={"ce_weight": 0.0})
    optimizer = torch.optim.AdamW(
        projectors.parameters(), lr=settings.warmup_learning_rate, weight_decay=0.0
    )
    figures = []
    was_training = student.training
    student.eval()
    try:
        batches = _batches(dataset, collator, batch_size, seed)
        for step in range(settings.warmup_steps):
            inputs = {key: value.to(student.device) for key, value in next(batches).items()}
            batch = {key: inputs.pop(key) for key in DISTILLATION_KEYS if key in inputs}
            with torch.no_grad():
                states = student_states(student, batch, **inputs)
            terms = dwakd_loss(
                states,
                teacher.states(batch),
                projectors,
                loss=loss,
                soft_dtw=config.soft_dtw,
                teacher_space=False,
            )
            total = terms.t2s_ce + config.loss.dtw_weight * (terms.hidden_dtw + terms.embed_dtw)
            optimizer.zero_grad()
            (total / terms.distilled_tokens.clamp(min=1)).backward()
            nn.utils.clip_grad_norm_(projectors.parameters(), 1.0)
            optimizer.step()
            figures.append(
                torch.stack([terms.t2s_ce.detach(), terms.t2s_correct, terms.distilled_tokens])
            )
            progress(step + 1, settings.warmup_steps)
    finally:
        student.train(was_training)
        projectors.zero_grad(set_to_none=True)
    start, end = (
        torch.stack(part).double().sum(0)
        for part in (figures[:REPORTED_BATCHES], figures[-REPORTED_BATCHES:])
    )
    ce, accuracy = (
        ((start[index] / start[2]).item(), (end[index] / end[2]).item()) for index in (0, 1)
    )
    return WarmupReport(settings.warmup_steps, ce, accuracy)


def _batches(
    dataset: Any,
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    batch_size: int,
    seed: int,
) -> Iterator[dict[str, Tensor]]:
    """The data set's batches in a shuffled order, over and over."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, batch_size, shuffle=True, collate_fn=collator, generator=generator)
    while True:
        yield from loader
