"""The composition root: from a recipe and axolotl's trainer to everything a run distils with."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from torch import Tensor

from dwakd_plugin.data.collator import TeacherLayout
from dwakd_plugin.data.packing import TEACHER_REMEDY, check_packing
from dwakd_plugin.data.row_report import RowReport
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import ContinuationTable, SpellingTable, trained_projectors, variant_of
from dwakd_plugin.models.batches import check_ids, teacher_columns
from dwakd_plugin.models.causal_lm import (
    causal_lm,
    check_logits,
    check_positions,
    embedding_table,
    output_head,
    parameter_count,
)
from dwakd_plugin.models.teacher.cached import (
    cached_teacher,
    teacher_of_probabilities,
    teacher_rows,
)
from dwakd_plugin.models.teacher.loaded import Teacher, load_teacher
from dwakd_plugin.models.teacher.served import ServedTeacher
from dwakd_plugin.models.teacher.top_tokens import RowStates
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.schema import DWAKDConfig, LossConfig
from dwakd_plugin.tokenizers.alignment import TokenAligner, firsts, student_cuts, token_map
from dwakd_plugin.tokenizers.continuations import continuations
from dwakd_plugin.tokenizers.ends import COLUMNS, paired_ends
from dwakd_plugin.tokenizers.pair import shared_vocabulary
from dwakd_plugin.tokenizers.spellings import spellings
from dwakd_plugin.train.distillation import Distillation, Facts
from dwakd_plugin.train.own_answers import check_own_answers, own_answers
from dwakd_plugin.train.progress import tell
from dwakd_plugin.train.projector_start import start_projectors
from dwakd_plugin.train.served_rows import warn
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


def assemble(cfg: Any, recipe: Recipe, trainer: Any, rows: RowReport) -> Distillation:
    """Loads the teacher, fills the cache, and makes the projectors. Raises UserError.

    Nothing of the trainer changes but its collators, which are made again for the teacher's side.
    """
    config, student, student_tokenizer = recipe.config, trainer.model, trainer.processing_class
    tell(doing="Loading the teacher" if config.loss.needs_teacher else "Preparing the run")
    check_positions(student, cfg.sequence_len, "sequence_len")
    check_own_answers(cfg, config, trainer)
    if cfg.revision_of_model:  # what loads the adapter again has to find the same base
        for adapter in getattr(student, "peft_config", {}).values():
            adapter.revision = cfg.revision_of_model
    with whole(tables(student)):
        # What they are multiplied by is watched in the student's own forward, once: before an
        # engine wraps it, as a forward within its forward would shard its weights again.
        output_head(student)
        embedding_table(student)
    if not is_sharded(trainer):  # whose weights are not whole before it is wrapped
        with trainer.accelerator.autocast():
            check_logits(student, "The student")
    # A sharded student is not on its device before it is wrapped.
    place = trainer.args.device if is_sharded(trainer) else student.device
    device = "cpu" if place.type == "cpu" else str(place)  # accelerate numbers CPUs
    if cfg.sample_packing:
        _check_packing_of_student(cfg, config, trainer)
    # Those that fill a cache come first: their bodies go before the others', which stay, are there.
    numbered = list(enumerate(config.each_teacher))
    in_turn = sorted(numbered, key=lambda each: each[1].cache is None)
    found = {
        number: _taught(cfg, config.of(one), number, trainer, device) for number, one in in_turn
    }
    first, *others = [found[number] for number, _ in numbered]
    teacher, shared = first.teacher, first.shared
    further = [each.layout for each in others if each.teacher is not None]
    for name in ("data_collator", "train_data_collator", "eval_data_collator"):
        collator = replace(
            getattr(trainer, name),
            teacher_states=first.layout.states,
            teacher_sequence_len=first.layout.sequence_len,
            aligner=first.layout.aligner,
            further=tuple(further),
        )
        setattr(trainer, name, collator)
    facts = Facts(
        teacher_vocabulary=len(first.tokenizer),
        student_vocabulary=len(student_tokenizer),
        shared_tokens=len(shared),
        processes=describe_processes(trainer),
        further=tuple((len(each.tokenizer), len(each.shared)) for each in others),
    )
    teacher_len = config.teacher.sequence_len or cfg.sequence_len
    own = own_answers(cfg, config, trainer, teacher, first.tokenizer, teacher_len, first.ends)
    if teacher is None or not trained_projectors(config.loss):
        loaded = tuple(each.teacher for each in others if each.teacher is not None)
        return Distillation(config, rows, facts, teacher, own_answers=own, further=loaded)
    seed = int(cfg.seed)
    with whole(tables(student)):
        readable, name = has_weights(trainer), str(cfg.base_model)
        projectors, pair, how, follower = start_projectors(
            config, student, name, teacher, shared, seed, readable=readable
        )
    projectors.to(device)
    # Where a run resumes, the checkpoint's projectors replace these before the first step. The
    # recipe of a sharded student, which cannot be warmed up with, has been refused before.
    if config.projectors.warmup_steps > 0 and determine_last_checkpoint(cfg) is None:
        first_rank = trainer.args.process_index == 0
        report = warm_up(
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
        how += f"; {report}"
    pair, how = from_first_rank(projectors, pair, how)
    facts = replace(facts, initialisation=how)
    return Distillation(config, rows, facts, teacher, projectors, pair, follower, own)


@dataclass(frozen=True)
class _Taught:
    """A teacher as a run has it; None of it where no term asks for one."""

    teacher: Teacher | None
    tokenizer: Any
    shared: list[tuple[int, int]]  # tokens that both vocabularies have
    layout: TeacherLayout
    ends: dict[int, int]  # the teacher's token that ends an answer, and the student's


def _taught(cfg: Any, config: DWAKDConfig, number: int, trainer: Any, device: str) -> _Taught:
    """One teacher of the recipe, `config` being the settings with it alone."""
    tokenizer, student_tokenizer = load_teacher_tokenizer(config.teacher), trainer.processing_class
    shared = shared_vocabulary(tokenizer, student_tokenizer)
    ends = _ends(trainer.train_dataset, number, student_tokenizer, tokenizer)
    teacher, states_of_row = _teacher(config, trainer, device, tokenizer, number)
    if teacher is None:
        return _Taught(None, tokenizer, shared, TeacherLayout(), ends)
    length = config.teacher.sequence_len or cfg.sequence_len
    _check_sizes(teacher, trainer.model, length)
    _say_if_same(config.teacher.called, tokenizer, student_tokenizer)
    packs = cfg.sample_packing and teacher.model is not None and states_of_row is None
    if packs:
        check_packing(teacher.model, "The teacher", TEACHER_REMEDY, 1 if _is_flash(teacher) else 2)
    aligner = None
    if variant_of(config.loss).match.rows is not None:
        teacher, aligner = _pair_tokens(
            teacher,
            tokenizer,
            student_tokenizer,
            causal_lm(trainer.model).config.get_text_config().vocab_size,
            shared,
            ends,
            config.loss,
        )
    own_length = length if packs and not _is_flash(teacher) else None
    layout = TeacherLayout(states_of_row, own_length, aligner)
    return _Taught(teacher, tokenizer, shared, layout, ends)


def _teacher(
    config: DWAKDConfig, trainer: Any, device: str, tokenizer: Any, number: int
) -> tuple[Teacher | None, RowStates | None]:
    """The teacher, where a term asks for one; and its states by row, where there is a cache."""
    if not config.loss.needs_teacher:
        return None, None
    rows = teacher_rows(trainer.train_dataset, trainer.eval_dataset, number=number)
    if config.teacher.cache is None and config.teacher.server is not None:
        longest = max(len(ids) for ids, _ in rows)
        served = ServedTeacher(config.teacher, tokenizer, longest, warn)
        # Rows are asked for in the process that waits for them, when they are laid out: one batch
        # ahead of the step.
        trainer.args.dataloader_num_workers = 0
        trainer.args.dataloader_prefetch_factor = None
        trainer.args.dataloader_persistent_workers = False
        size = served.vocabulary
        return teacher_of_probabilities(size, device, str(served), None, served), served.want
    if config.teacher.cache is None:
        teacher = load_teacher(config.teacher, device)
        size = teacher.embeddings.weight.shape[0]
        check_ids((ids for ids, _ in rows), size, config.teacher.called, tokenizer)
        return teacher, None
    own = config.sampled_answers
    if own is not None and own.share == 1 and own.start_after == 0:
        warn(
            f"dwakd.teacher.cache ({config.teacher.cache}) serves next to nothing: with "
            "dwakd.own_answers of share: 1 and start_after: 0 every answer is the student's own, "
            "which the teacher reads itself. Remove the cache, or raise start_after."
        )
    teacher, cache = cached_teacher(
        config.teacher,
        device,
        rows,
        tokenizer,
        _progress("Teacher states", "token"),
        lambda text: LOG.info(text, main_process_only=False),
        live=own is not None,
    )
    return teacher, cache.read


def _say_if_same(teacher: str, tokenizer: Any, student_tokenizer: Any) -> None:
    if tokenizer.get_vocab() == student_tokenizer.get_vocab():
        LOG.info(
            "The teacher %s has the student's own tokenizer. That works; plain distillation, token "
            "by token, would do as well.",
            teacher,
        )


def _check_sizes(teacher: Teacher, student: Any, teacher_len: int) -> None:
    """Raises UserError where the teacher cannot read `teacher_len` tokens; warns if it is small."""
    if teacher.model is not None:
        check_positions(teacher.model, teacher_len, "dwakd.teacher.sequence_len")
    own = parameter_count(causal_lm(student))
    if teacher.parameters is not None and teacher.parameters < own:
        LOG.warning(
            "The teacher has fewer parameters (%s) than the student (%s). Were the two swapped?",
            f"{teacher.parameters:,}",
            f"{own:,}",
        )


def _pair_tokens(
    teacher: Teacher,
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    student_rows: int,
    shared: list[tuple[int, int]],
    ends: dict[int, int],
    loss: LossConfig,
) -> tuple[Teacher, TokenAligner]:
    """The teacher with the student's counterparts of its tokens, and what pairs rows by bytes.

    Raises UserError where no vocabulary allows it.
    """
    if not shared:
        raise UserError(
            f"dwakd.loss.matching is {loss.matching}, and the two vocabularies share no token, so "
            "that no prediction of the teacher has a counterpart. Use a variant that attends."
        )
    head = teacher.head.weight
    rows = teacher_tokenizer, student_tokenizer, head.shape[0]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=head.device)

    if variant_of(loss).match.rows == "token":
        aligner = TokenAligner(student_tokenizer, teacher_tokenizer, ends=ends)
        return replace(teacher, token_map=tensor(token_map(*rows, ends))), aligner
    cuts = student_cuts(*rows, ends)
    teacher = replace(teacher, token_map=tensor(firsts(cuts)))
    if loss.inside_tokens == "label":
        return teacher, TokenAligner(student_tokenizer, teacher_tokenizer, whole=False, ends=ends)
    inside, spelt = continuations(cuts), None
    teacher = replace(teacher, continuations=ContinuationTable(*map(tensor, inside.table())))
    if teacher.top_k is None and teacher.hidden_size > 0:  # it says all of its probabilities
        back = {own: theirs for theirs, own in ends.items()}
        theirs = student_cuts(student_tokenizer, teacher_tokenizer, student_rows, back)
        spelt = spellings(theirs, firsts(cuts))
        teacher = replace(teacher, spellings=SpellingTable(*map(tensor, spelt.table())))
    sides = student_tokenizer, teacher_tokenizer
    further = {"continuations": inside, "spellings": spelt, "ends": ends}
    return teacher, TokenAligner(*sides, whole=False, **further)


def _ends(
    dataset: Any, number: int, student_tokenizer: Any, teacher_tokenizer: Any
) -> dict[int, int]:
    _, labels = teacher_columns(number)
    rows = dataset.select_columns(["labels", labels]).rename_columns(
        dict(zip(("labels", labels), COLUMNS, strict=True))
    )
    rows = rows.with_format(None)
    return paired_ends(rows, student_tokenizer, teacher_tokenizer)


def _is_flash(teacher: Teacher) -> bool:
    """Flash attention tells rows apart in a single sequence only; others build a mask of L x L."""
    return "flash" in causal_lm(teacher.model).config._attn_implementation


def _check_packing_of_student(cfg: Any, config: DWAKDConfig, trainer: Any) -> None:
    """Sees that packed rows stay apart in the student; raises UserError where they don't."""
    sequences = cfg.micro_batch_size if trainer.args.multipack_real_batches else 1
    if trainer.args.multipack_real_batches and config.sampled_answers is not None:
        sequences += 1  # answers may be longer than those that they replace
    if not is_sharded(trainer):  # whose weights are not whole before it is wrapped
        with trainer.accelerator.autocast():
            check_packing(
                trainer.model,
                "The student",
                "Set `sample_packing: false`, or an attn_implementation that keeps them apart.",
                sequences,
            )


def _progress(title: str, unit: str, *, shown: bool = True) -> Any:
    """A progress bar with ETA, made when the first pieces are done."""
    from tqdm import tqdm

    bar: list[Any] = []
    told = 0.0

    def show(done: int, total: int) -> None:
        nonlocal told
        if shown and time.monotonic() > told + 1:
            told = time.monotonic()
            tell(doing=f"{title}: {done:,} of {total:,} {unit}s")
        if not bar:
            # The terminal itself: where axolotl is kept quiet, what takes long still shows.
            stream = sys.__stderr__
            bar.append(tqdm(total=total, desc=title, unit=unit, file=stream, disable=not shown))
        bar[0].update(done - bar[0].n)
        if done >= total:
            bar[0].close()

    return show
