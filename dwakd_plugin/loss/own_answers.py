"""The loss of answers that the student sampled itself: the teacher judges, and no label does.

    own = Σ_i D(p_map,i ‖ p_s,i)       over positions of both sides that have read the same bytes

With the reverse KL, D = KL(p_s ‖ p_map) on what the student itself writes, as in MiniLLM
(arXiv 2306.08543) and GKD (arXiv 2306.13649), here across tokenizers. Sampled tokens are constants.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dwakd_plugin.loss.objective import LossTerms, dwakd_loss
from dwakd_plugin.loss.states import ResponseStates, response_index
from dwakd_plugin.recipe.blocks import OwnAnswersConfig
from dwakd_plugin.recipe.schema import LossConfig


def own_loss_config(own: OwnAnswersConfig, loss: LossConfig) -> LossConfig:
    """The settings of the loss on own answers, beside `loss` on the given ones."""
    divergence: dict[str, Any] = {"divergence": own.divergence} if own.matching == "mapped" else {}
    return LossConfig(
        matching=own.matching,
        **divergence,
        ce_weight=0.0,
        kd_weight=1.0,
        dtw_weight=0.0,
        temperature=1.0,
        student_weighting="none",
        teacher_weighting="none",
        chunk_size=loss.chunk_size,
    )


def own_answer_terms(
    student: ResponseStates, teacher: ResponseStates, loss: LossConfig
) -> LossTerms:
    """The terms of answers of the student's own, as sums; `t2s_correct` counts where both models
    have the same most likely token.

    Each sample has as many positions on both sides, (B, S) and (B, T), the k-th of one having read
    the same bytes as the k-th of the other. `loss` is `own_loss_config`'s; the student's labels say
    only which positions count.
    """
    ours, theirs = response_index(student), response_index(teacher)
    return dwakd_loss(
        replace(student, index=ours, pairs=ours, read=None, spelt=None, sampled=True),
        replace(teacher, index=theirs, pairs=theirs),
        None,
        loss=loss,
    )
