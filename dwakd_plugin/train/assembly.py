"""The composition root: from a recipe and axolotl's trainer to everything a run distils with."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from torch import Tensor, nn

import dwakd_plugin
from dwakd_plugin.data.packing import check_packing
from dwakd_plugin.data.row_report import RowReport
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes, json_checksum, replace_file
from dwakd_plugin.loss import trained_projectors, variant_of
from dwakd_plugin.models.causal_lm import (
    causal_lm,
    check_positions,
    embedding_table,
    output_head,
    parameter_count,
)
from dwakd_plugin.models.projectors import (
    T2S_SCALE,
    HeadFollower,
    Projectors,
    head_signature,
    load_projectors,
    shared_vocabulary_init,
)
from dwakd_plugin.models.teacher.cached import cached_teacher, teacher_rows
from dwakd_plugin.models.teacher.loaded import Teacher, load_teacher
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.schema import DWAKDConfig, LossConfig
from dwakd_plugin.tokenizers.alignment import TokenAligner, first_tokens, token_map
from dwakd_plugin.tokenizers.findings import ENOUGH_SHARED_TOKENS
from dwakd_plugin.tokenizers.pair import shared_vocabulary
from dwakd_plugin.train.distillation import Distillation
from dwakd_plugin.train.run_folder import CHECKSUM, RUN_FILE, run_facts, run_identity
from dwakd_plugin.train.sharding import (
    describe_processes,
    from_first_rank,
    has_weights,
    is_sharded,
    tables,
    whole,
)
from dwakd_plugin.train.warmup import warm_up

LOG = get_logger("axolotl.dwakd")


def assemble(
    cfg: Any, recipe: Recipe, trainer: Any, rows: RowReport
) -> tuple[Distillation, dict[str, Any]]:
    """Loads the teacher, fills the cache, initialises the projectors, and signs the output folder.

    Returns the distillation and what `describe_run` says of its making. Raises UserError.
    """
    config, student = recipe.config, trainer.model
    check_positions(student, cfg.sequence_len, "sequence_len")
    first_rank = trainer.args.process_index == 0
    # A sharded student is not on its device before it is wrapped.
    place = trainer.args.device if is_sharded(trainer) else student.device
    device = "cpu" if place.type == "cpu" else str(place)  # accelerate numbers CPUs
    teacher_tokenizer = load_teacher_tokenizer(config.teacher)
    teacher: Teacher | None
    if not config.loss.needs_teacher:
        teacher = None
    elif config.teacher.cache is None:
        teacher = load_teacher(config.teacher, device)
    else:
        teacher, cache = cached_teacher(
            config.teacher,
            device,
            teacher_rows(trainer.train_dataset, trainer.eval_dataset),
            teacher_tokenizer,
            _progress("Teacher states", "token"),
            lambda text: LOG.info(text, main_process_only=False),
        )
        for collator in _collators(trainer):
            collator.teacher_cache = cache
    if teacher is not None and teacher.model is not None:
        length = config.teacher.sequence_len or cfg.sequence_len
        check_positions(teacher.model, length, "dwakd.teacher.sequence_len")
    if cfg.sample_packing:
        _prepare_packing(cfg, config, trainer, teacher)
    shared = shared_vocabulary(teacher_tokenizer, trainer.processing_class)
    facts = {
        "teacher_vocabulary": len(teacher_tokenizer),
        "student_vocabulary": len(trainer.processing_class),
        "shared_tokens": len(shared),
        "initialisation": "none",
        "processes": describe_processes(trainer),
    }
    variant, trained = variant_of(config.loss), trained_projectors(config.loss)
    if teacher is not None and variant.match.rows is not None:
        _pair_tokens(trainer, teacher, teacher_tokenizer, shared, config.loss)
    if teacher is None or not trained:
        return _signed(recipe, trainer, Distillation(config, teacher, None, rows, {})), facts
    pair, how, follower = {}, "", None
    with whole(tables(student)):
        seed = int(cfg.seed or 42)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projectors = Projectors(embedding_table(student).weight.shape[1], teacher.hidden_size)
        if has_weights(trainer):
            pair = {
                "student": str(cfg.base_model),
                "teacher": config.teacher.base_model,
                "student_head": head_signature(output_head(student).weight),
                "teacher_head": head_signature(teacher.head.weight),
            }
            how = _initialise(projectors, config, student, teacher, shared, pair)
        if variant.follows_head:  # s2t, which belongs to the heads, and follows one that trains
            head = output_head(student).weight
            follower = HeadFollower(shared, teacher.head.weight)
            follower.update(projectors.s2t, head)
            if not head.requires_grad:
                follower = None
    for name, layer in projectors.named_children():
        layer.requires_grad_(name in trained)
    projectors.to(device)
    # Where a run resumes, the checkpoint's projectors replace these before the first step. The
    # recipe of a sharded student, which cannot be warmed up with, has been refused before.
    if config.projectors.warmup_steps > 0 and determine_last_checkpoint(cfg) is None:
        how += "; " + str(
            warm_up(
                projectors,
                student,
                teacher,
                trainer.train_dataset,
                trainer.train_data_collator,
                config,
                batch_size=trainer.args.per_device_train_batch_size,
                seed=seed,
                progress=_progress("Projector warm-up", "step", shown=first_rank),
            )
        )
    pair, how = from_first_rank(projectors, pair, how)
    facts["initialisation"] = how
    distillation = Distillation(config, teacher, projectors, rows, pair, follower)
    return _signed(recipe, trainer, distillation), facts


def _signed(recipe: Recipe, trainer: Any, distillation: Distillation) -> Distillation:
    """The same, with the run's name in its output folder, and a look at who teaches whom."""
    teacher, own = distillation.teacher, parameter_count(causal_lm(trainer.model))
    if teacher is not None and teacher.parameters < own:
        LOG.warning(
            "The teacher has fewer parameters (%s) than the student (%s). Were the two swapped?",
            f"{teacher.parameters:,}",
            f"{own:,}",
        )
    if trainer.args.should_save:
        _sign(recipe)
    return distillation


def _pair_tokens(
    trainer: Any,
    teacher: Teacher,
    teacher_tokenizer: Any,
    shared: list[tuple[int, int]],
    loss: LossConfig,
) -> None:
    """Has batches pair tokens by their bytes. Raises UserError where no vocabulary allows it."""
    if not shared:
        raise UserError(
            f"dwakd.loss.matching is {loss.matching}, and the two vocabularies share no token, so "
            "that no prediction of the teacher has a counterpart. Use a variant that attends."
        )
    head, whole = teacher.head.weight, variant_of(loss).match.rows == "token"
    counterparts = token_map if whole else first_tokens
    ids = counterparts(teacher_tokenizer, trainer.processing_class, head.shape[0])
    teacher.token_map = torch.tensor(ids, device=head.device)
    aligner = TokenAligner(trainer.processing_class, teacher_tokenizer, whole=whole)
    for collator in _collators(trainer):
        collator.aligner = aligner


def _collators(trainer: Any) -> tuple[Any, ...]:
    return trainer.data_collator, trainer.train_data_collator, trainer.eval_data_collator


def _prepare_packing(cfg: Any, config: DWAKDConfig, trainer: Any, teacher: Teacher | None) -> None:
    """Sees that packed rows stay apart in both models; raises UserError where they don't."""
    sequences = cfg.micro_batch_size if trainer.args.multipack_real_batches else 1
    if not is_sharded(trainer):  # whose weights are not whole before it is wrapped
        with trainer.accelerator.autocast():
            check_packing(
                trainer.model,
                "The student",
                "Set `sample_packing: false`, or an attn_implementation that keeps them apart.",
                sequences,
            )
    if teacher is None or teacher.model is None:
        return
    # Flash attention tells rows apart in a single sequence only; others build a mask of L x L.
    flash = "flash" in causal_lm(teacher.model).config._attn_implementation
    check_packing(
        teacher.model,
        "The teacher",
        "Set `sample_packing: false`, another dwakd.teacher.attn_implementation, or "
        "dwakd.teacher.cache, which packs nothing on the teacher's side.",
        1 if flash else 2,
    )
    for collator in _collators(trainer):
        collator.teacher_sequence_len = (
            None if flash else config.teacher.sequence_len or cfg.sequence_len
        )


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
            t2s_scale=1.0 if variant_of(config.loss).match.rows == "token" else T2S_SCALE,
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


def _progress(title: str, unit: str, *, shown: bool = True) -> Any:
    """A progress bar with ETA, made when the first pieces are done."""
    from tqdm import tqdm

    bar: list[Any] = []

    def show(done: int, total: int) -> None:
        if not bar:
            # The terminal itself: where axolotl is kept quiet, what takes long still shows.
            stream = sys.__stderr__
            bar.append(tqdm(total=total, desc=title, unit=unit, file=stream, disable=not shown))
        bar[0].update(done - bar[0].n)
        if done >= total:
            bar[0].close()

    return show


def _sign(recipe: Recipe) -> None:
    """Says in the output folder whose run it holds, and with what settings."""
    file = recipe.output_dir / RUN_FILE
    content: dict[str, Any] = {
        "identity": run_identity(recipe),
        "version": dwakd_plugin.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": recipe.config.model_dump(),
        **run_facts(recipe),
    }
    with explaining_writes(file, "Free some space, and run it again."):
        file.parent.mkdir(parents=True, exist_ok=True)
        content[CHECKSUM] = json_checksum(json.loads(json.dumps(content)))
        replace_file(file, json.dumps(content, indent=1))
