"""The student's own answers: sampled in each step, judged by the teacher, counted for the log."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from dwakd_plugin.data.sampled_rows import (
    Row,
    answer_begins,
    answered,
    end_of,
    prompt_of,
    rows_of,
)
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import ResponseStates, own_answer_terms, own_loss_config
from dwakd_plugin.models.batches import pack
from dwakd_plugin.models.out_of_memory import explain_out_of_memory
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.recipe.blocks import OwnAnswersConfig
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.tokenizers.alignment import first_tokens
from dwakd_plugin.tokenizers.sampled import SampledText
from dwakd_plugin.train.own_sampling import FromCopy, FromItself, backend_of

# The number of a row that no step has, for what chooses among them: less the process's number.
_CHOICE = 2**32 - 1
_SUMS = ("answers", "tokens", "ended", "unaligned", "divergence", "compared", "agreed", "seconds")


class OwnAnswers:
    """Replaces given answers by sampled ones, and has the teacher judge these.

    What is drawn depends on seed, step and the row's number in the step alone (`models.sampling`),
    with several processes on theirs too: there is no state to save, and a resumed run draws what it
    would have drawn.
    """

    def __init__(
        self,
        config: DWAKDConfig,
        own: OwnAnswersConfig,
        tokenizers: tuple[Any, Any],
        teacher: Teacher,
        collate: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]],
        *,
        ends: frozenset[int],
        paired: Mapping[int, int],
        lengths: tuple[int, int],
        seed: int,
        packed_len: int | None = None,
        rank: tuple[int, int] = (0, 1),
        sampler: FromItself | FromCopy | None = None,
    ) -> None:
        """tokenizers and lengths (of sequences, in tokens) are the student's and the teacher's;
        ends are the student's tokens that end an answer, beside the given answer's own; paired, the
        teacher's token that ends one, and the student's; packed_len, the tokens of a sequence that
        packed rows are laid out in again, None where a batch is one sequence; rank, the number of
        this process, and of how many; sampler, what answers, by default transformers."""
        student_tokenizer, teacher_tokenizer = tokenizers
        self._own = own
        self._loss = own_loss_config(own, config.loss)
        self._text = SampledText(student_tokenizer, teacher_tokenizer, paired)
        self._teacher_end = next(iter(paired), int(teacher_tokenizer.eos_token_id))
        head = teacher.head.weight
        if own.matching != "mapped":
            self._token_map = None
        elif config.loss.matching == "mapped":
            self._token_map = teacher.token_map
        else:
            ids = first_tokens(*reversed(tokenizers), head.shape[0], paired)
            self._token_map = torch.tensor(ids, device=head.device)
        self._collate = collate
        self._ends = ends
        self._student_len, self._teacher_len = lengths
        self._seed, self._packed_len = seed, packed_len
        self._rank, self._ranks = rank
        self.sampler = sampler or FromItself(own)
        self._sums: dict[str, Any] = defaultdict(float)  # since the last log line

    # Sampling ------------------------------------------------------------------------------------

    def put_into(
        self, batches: list[dict[str, Tensor]], step: int, student: Any
    ) -> list[dict[str, Tensor]]:
        """The batches of an optimizer step, with sampled answers in place of a share of theirs.

        A row whose sample cannot be aligned keeps its given answer. `step` is how many are done.
        """
        if step < self._own.start_after:
            return batches
        rows = [rows_of(batch) for batch in batches]
        flat = [row for of_batch in rows for row in of_batch]
        chosen = self._choose(flat, step)
        if not chosen:
            return batches
        own: dict[int, Row] = {}
        for number, (sample, ended) in self._sample(flat, chosen, step, student).items():
            row = answered(
                flat[number], sample, ended, self._text, self._teacher_end, self._teacher_len
            )
            self._sums["unaligned"] += row is None
            if row is not None:
                own[number] = row
        result, first = [], 0
        for batch, of_batch in zip(batches, rows, strict=True):
            numbers = range(first, first + len(of_batch))
            if any(n in own for n in numbers):
                batch = self._laid_out([own.get(n, flat[n]) for n in numbers], batch)
            result.append(batch)
            first = numbers.stop
        return result

    def _laid_out(self, rows: list[Row], before: dict[str, Tensor]) -> dict[str, Any]:
        """The rows as a batch of the kind, and on the device, that they were `before`.

        Packed ones are packed again: answers are longer or shorter than those that they replace.
        """
        features: list[Any] = [row.feature() for row in rows]
        if "position_ids" in before:
            lengths = [len(row.student_ids) for row in rows]
            packs = pack(lengths, self._packed_len or sum(lengths))
            features = [[features[place] for place in places] for places in packs]
        return send_to_device(dict(self._collate(features)), before["input_ids"].device)

    def _choose(self, rows: list[Row], step: int) -> list[int]:
        """Numbers of the rows to sample for, in order: on average the share of all of them."""
        room = self._student_len - self._own.max_new_tokens
        fit = [
            number
            for number, row in enumerate(rows)
            if (prompt := prompt_of(row)) is not None and len(prompt) <= room
        ]
        key = np.array([self._seed, _key(step, _CHOICE - self._rank)], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(key=key))
        count = int(self._own.share * len(rows) + random.random())
        return sorted(random.permutation(fit)[:count].tolist())

    def _sample(
        self, rows: list[Row], chosen: list[int], step: int, student: Any
    ) -> dict[int, tuple[list[int], bool]]:
        """A sample for each chosen row, by its number, and whether it ended."""
        begun = time.perf_counter()
        special = self._text.student_special
        prompts = {number: prompt_of(rows[number]) or [] for number in chosen}
        given = {end_of(rows[n].student_ids, rows[n].student_labels, special) for n in chosen}
        stop = sorted(self._ends | {end for end in given if end is not None})
        samples: dict[int, tuple[list[int], bool]] = {}
        with (
            explain_out_of_memory("sampling the student's own answers"),
            self.sampler.generator(student, stop, step) as generate,
        ):
            for begin in range(0, len(chosen), self.sampler.at_once):
                part = chosen[begin : begin + self.sampler.at_once]
                # Of all processes' rows no two have a number in common.
                numbers = [number * self._ranks + self._rank for number in part]
                keys = [(self._seed, _key(step, number)) for number in numbers]
                drawn = generate([prompts[n] for n in part], keys, self._own.max_new_tokens)
                for number, sample in zip(part, drawn, strict=True):
                    samples[number] = sample.tokens, sample.tokens[-1] in stop
        self._sums["seconds"] += time.perf_counter() - begun
        self._sums["answers"] += len(samples)
        self._sums["ended"] += sum(ended for _, ended in samples.values())
        self._sums["tokens"] += sum(len(sample) for sample, _ in samples.values())
        return samples

    # Judging -------------------------------------------------------------------------------------

    def set_apart(
        self, student: ResponseStates, teacher: ResponseStates, own: Tensor
    ) -> tuple[ResponseStates, ResponseStates, Tensor]:
        """The states of the given rows, and the loss of the student's `own` (k,), as a sum."""
        given = torch.ones_like(student.lengths, dtype=torch.bool)
        given[own] = False
        others = given.nonzero().squeeze(1)
        judged = replace(teacher.samples(own), token_map=self._token_map)
        terms = own_answer_terms(student.samples(own), judged, self._loss)
        loss = terms.total(self._loss)
        self._sums["divergence"] += loss.detach()
        self._sums["compared"] += terms.paired_tokens
        self._sums["agreed"] += terms.t2s_correct
        return student.samples(others), teacher.samples(others), loss

    def logged(self, accelerator: Any = None) -> dict[str, float]:
        """What a log line says of the answers since the last one; empty where there were none.

        Of all processes of the accelerator's, which must all take part; the seconds are their mean.
        """
        sums = {name: float(self._sums[name]) for name in _SUMS}
        self._sums.clear()
        if accelerator is not None and accelerator.num_processes > 1:
            values = torch.tensor([*sums.values()], dtype=torch.float64, device=accelerator.device)
            sums = dict(zip(_SUMS, accelerator.reduce(values, "sum").tolist(), strict=True))
            sums["seconds"] /= accelerator.num_processes
        if not sums["answers"]:
            return {}
        per_answer = {"length": "tokens", "ended": "ended", "unaligned": "unaligned"}
        figures = {name: sums[key] / sums["answers"] for name, key in per_answer.items()}
        if sums["compared"]:
            figures["divergence"] = sums["divergence"] / sums["compared"]
            if self._token_map is not None:
                figures["agreement"] = sums["agreed"] / sums["compared"]
        figures["seconds"] = sums["seconds"]
        return {f"own_{name}": round(value, 5) for name, value in figures.items()}


def own_answers(
    cfg: Any,
    config: DWAKDConfig,
    trainer: Any,
    teacher: Teacher | None,
    teacher_tokenizer: Any,
    teacher_len: int,
    paired: Mapping[int, int],
) -> OwnAnswers | None:
    """What a run samples with, where the recipe asks for it; see `check_own_answers`.

    paired: the teacher's token that ends an answer, and the student's (`paired_ends`)."""
    own = config.sampled_answers
    if own is None:
        return None
    assert teacher is not None
    return OwnAnswers(
        config,
        own,
        (trainer.processing_class, teacher_tokenizer),
        teacher,
        trainer.train_data_collator,
        ends=_ends(cfg, trainer.processing_class),
        paired=paired,
        lengths=(cfg.sequence_len, teacher_len),
        seed=trainer.args.seed,
        packed_len=cfg.sequence_len if trainer.args.multipack_real_batches else None,
        rank=(trainer.args.process_index, trainer.args.world_size),
        sampler=_sampler(cfg, own, trainer),
    )


def _sampler(cfg: Any, own: OwnAnswersConfig, trainer: Any) -> FromItself | FromCopy:
    student, args = trainer.model, trainer.args
    if backend_of(own, student) == "transformers":
        return FromItself(own)
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    with trainer.accelerator.autocast():
        return FromCopy(own, student, half or student.dtype, cfg.sequence_len, args.world_size)


def check_own_answers(cfg: Any, config: DWAKDConfig, trainer: Any) -> None:
    """Raises UserError where answers cannot be sampled in this run, before a teacher is loaded."""
    own = config.sampled_answers
    if own is None:
        return
    backend_of(own, trainer.model)
    if not _ends(cfg, trainer.processing_class):
        raise UserError(
            "dwakd.own_answers: the student's tokenizer has no end-of-sequence token, so a sampled "
            "answer would have no end. Name one in the recipe as `special_tokens: {eos_token: "
            "...}`."
        )
    shortest = None
    for row in trainer.train_dataset:
        begin = answer_begins(row["labels"])
        if begin is None or answer_begins(row["teacher_labels"]) is None:
            continue
        shortest = begin if shortest is None else min(shortest, begin)
        if shortest + own.max_new_tokens <= cfg.sequence_len:
            return
    if shortest is None:
        raise UserError(
            "dwakd.own_answers: no row has a prompt and an answer on both sides, so there is "
            "nothing to sample. "
            + (
                "With train_on_inputs all of a row is learnt, and nothing is left to be asked: "
                "remove it, or dwakd.own_answers."
                if cfg.train_on_inputs
                else "`dwakd train --dry-run` says what became of the rows."
            )
        )
    raise UserError(
        f"dwakd.own_answers.max_new_tokens is {own.max_new_tokens}, and sequence_len is "
        f"{cfg.sequence_len}: with the shortest prompt, of {shortest} tokens, no answer has room. "
        f"Raise sequence_len to {shortest + own.max_new_tokens} at least, or lower max_new_tokens."
    )


def _ends(cfg: Any, tokenizer: Any) -> frozenset[int]:
    """What ends the student's turns: its end of sequence, and the recipe's `eot_tokens`."""
    turns = tokenizer.convert_tokens_to_ids(list(cfg.eot_tokens or ()))
    return frozenset(index for index in (tokenizer.eos_token_id, *turns) if index is not None)


def _key(step: int, row: int) -> int:
    """A number of its own for each row of each step."""
    return (step << 32) | row
