"""What the projectors are before their first step: as the recipe says, for this pair of models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import trained_projectors, variant_of
from dwakd_plugin.models.causal_lm import embedding_table, output_head
from dwakd_plugin.models.projectors import (
    T2S_SCALE,
    HeadFollower,
    Projectors,
    head_signature,
    load_projectors,
    shared_vocabulary_init,
)
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.tokenizers.findings import ENOUGH_SHARED_TOKENS


def start_projectors(
    config: DWAKDConfig,
    student: nn.Module,
    student_name: str,
    teacher: Teacher,
    shared: list[tuple[int, int]],
    seed: int,
    *,
    readable: bool,
) -> tuple[Projectors, dict[str, str], str, HeadFollower | None]:
    """Projectors on the CPU, which models they belong to, how they start, and what `s2t` follows.

    `shared` are (teacher id, student id) of the tokens in both vocabularies. Where the student's
    weights are not `readable` on this rank the projectors stay random, for another's to replace.
    Raises UserError where they cannot start as asked.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projectors = Projectors(embedding_table(student).weight.shape[1], teacher.hidden_size)
    pair, how, follower = {}, "", None
    if readable:
        pair = {
            "student": student_name,
            "teacher": config.teacher.base_model,
            "student_head": head_signature(output_head(student).weight),
            "teacher_head": head_signature(teacher.head.weight),
        }
        how = _initialise(projectors, config, student, teacher, shared, pair)
    if variant_of(config.loss).follows_head:  # s2t, which belongs to the heads
        head = output_head(student).weight
        follower = HeadFollower(shared, teacher.head.weight)
        follower.update(projectors.s2t, head)
        if not head.requires_grad:
            follower = None
    for name, layer in projectors.named_children():
        layer.requires_grad_(name in trained_projectors(config.loss))
    return projectors, pair, how, follower


def _initialise(
    projectors: Projectors,
    config: DWAKDConfig,
    student: nn.Module,
    teacher: Teacher,
    shared: list[tuple[int, int]],
    pair: dict[str, str],
) -> str:
    """Sets projectors, which are random yet, as the recipe says. Returns how."""
    head, table = output_head(student), embedding_table(student)
    how = config.projectors.init
    if config.projectors.path is not None:
        load_projectors(projectors, Path(config.projectors.path), pair)
        how = f"from {config.projectors.path}"
    elif how == "random" or (how == "auto" and len(shared) < ENOUGH_SHARED_TOKENS):
        how = f"random ({len(shared):,} shared tokens)" if how == "auto" else "random"
    elif not shared:
        raise UserError(
            "dwakd.projectors.init is shared_vocab, and the two vocabularies share no token. "
            "Use `init: random`."
        )
    else:
        teacher_ids, student_ids = torch.tensor(shared).T
        shared_vocabulary_init(
            projectors,
            student_head=_rows(head.weight, student_ids),
            teacher_head=_rows(teacher.head.weight, teacher_ids),
            student_embeddings=_rows(table.weight, student_ids) * table.scale,
            teacher_embeddings=_rows(teacher.embeddings.weight, teacher_ids)
            * teacher.embeddings.scale,
            # Attention's values are scaled by N; what pairs positions projects the raw g.
            t2s_scale=T2S_SCALE if variant_of(config.loss).match.rows is None else 1.0,
        )
        how = f"shared_vocab ({len(shared):,} shared tokens)"
    if not all(parameter.isfinite().all() for parameter in projectors.parameters()):
        raise UserError(
            f"The projectors start with values that are not finite ({how}): the embeddings or the "
            "head of teacher or student hold NaN or infinity. Check both checkpoints."
        )
    return how


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    return table.detach()[ids.to(table.device)].float().cpu()
