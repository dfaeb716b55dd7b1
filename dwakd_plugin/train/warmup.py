"""Projector warm-up: training for the projectors alone, before the student learns from them.

Early distillation through untrained projectors teaches noise, and what the student unlearns then it
does not get back. Here both models are frozen and the projectors train on the terms that concern
them: the t2s cross-entropy, the two DTW terms and the cosine of hidden states, as far as the loss
has them, and if asked for the teacher-space KL.

There are two ways to it: `warm_up`, some steps at the start of a run, and `train_projectors`,
epochs over states that are computed once, with early stopping on held-out rows (`dwakd warmup`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from dwakd_plugin.data.collator import split_batch
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import LossTerms, ResponseStates, dwakd_loss, projects_labels
from dwakd_plugin.models.causal_lm import embedding_table
from dwakd_plugin.models.projectors import Projectors, read_projectors, save_projectors
from dwakd_plugin.models.student import student_states
from dwakd_plugin.models.teacher.cache import SHARD_BYTES, TeacherCache
from dwakd_plugin.models.teacher.kept_states import row_key
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.recipe.schema import DWAKDConfig, LossConfig

Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
Progress = Callable[[int, int], None]

# The report's figures are means over this many batches at either end, each seen before its update.
REPORTED_BATCHES = 10


# The step that both ways share ---------------------------------------------------------------


def _optimizer(projectors: Projectors, config: DWAKDConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        projectors.parameters(), lr=config.projectors.warmup_learning_rate, weight_decay=0.0
    )


def _terms(
    projectors: Projectors,
    student: ResponseStates,
    teacher: ResponseStates,
    config: DWAKDConfig,
    *,
    teacher_space: bool,
) -> LossTerms:
    """The loss's terms with both models as constants."""
    # Terms of weight 0 cost nothing; without a t2s_ce no projector learns by what kd_weight weighs.
    needless = ["ce_weight"] if projects_labels(config.loss) else ["ce_weight", "kd_weight"]
    return dwakd_loss(
        student.detached(),
        teacher,
        projectors,
        loss=config.loss.model_copy(update=dict.fromkeys(needless, 0.0)),
        soft_dtw=config.soft_dtw,
        teacher_space=teacher_space,
    )


def _step(
    projectors: Projectors,
    optimizer: torch.optim.Optimizer,
    student: ResponseStates,
    teacher: ResponseStates,
    config: DWAKDConfig,
    *,
    teacher_space: bool = False,
) -> LossTerms:
    """One update of the projectors, on one batch.

    The teacher-space term is the most expensive, and would train `s2t` alone: off unless asked for.
    """
    terms = _terms(projectors, student, teacher, config, teacher_space=teacher_space)
    total = terms.t2s_ce + config.loss.dtw_weight * (terms.hidden_dtw + terms.embed_dtw)
    total = total + config.loss.cosine_weight * terms.hidden_cosine
    if teacher_space:
        total = total + terms.teacher_kd
    optimizer.zero_grad()
    (total / terms.distilled_tokens.clamp(min=1)).backward()
    nn.utils.clip_grad_norm_(projectors.parameters(), 1.0)
    optimizer.step()
    return terms


def both_sides(
    student: Any, teacher: Teacher, inputs: dict[str, Tensor]
) -> tuple[ResponseStates, ResponseStates]:
    """What the loss needs of both models for a collated batch."""
    inputs = {key: value.to(student.device) for key, value in inputs.items()}
    batch, own = split_batch(inputs)
    with torch.no_grad():
        return student_states(student, batch, **own), teacher.states(batch)


# Some steps at the start of a run ------------------------------------------------------------


def _reported(loss: LossConfig) -> dict[str, tuple[str, str, str]]:
    """What is told of a warm-up, in words: a sum, the count that it is divided by, its format."""
    if projects_labels(loss):
        return {
            "t2s cross-entropy": ("t2s_ce", "distilled_tokens", ".2f"),
            "accuracy": ("t2s_correct", "paired_tokens", ".0%"),
        }
    told = {}
    if loss.cosine_weight > 0:
        told["distance of hidden states"] = ("hidden_cosine", "hidden_pairs", ".2f")
    if loss.dtw_weight > 0:
        told["soft-DTW of hidden states"] = ("hidden_dtw", "distilled_tokens", ".2f")
    return told


def warm_up(
    projectors: Projectors,
    student: nn.Module,
    teacher: Teacher,
    dataset: Any,
    collator: Collator,
    config: DWAKDConfig,
    *,
    batch_size: int,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> str:
    """Trains the projectors for `projectors.warmup_steps` batches of the data set, in place.

    The student stays as it is, and so does its mode. Batches are drawn with `seed`, the same on
    every rank. Returns how it went in words: figures at the start and at the end.
    """
    steps, reported = config.projectors.warmup_steps, _reported(config.loss)
    optimizer = _optimizer(projectors, config)
    figures = []
    was_training = student.training
    student.eval()
    try:
        batches = _batches(dataset, collator, batch_size, seed)
        for step in range(steps):
            sides = both_sides(student, teacher, next(batches))
            terms = _step(projectors, optimizer, *sides, config)
            names = (name for *both, _ in reported.values() for name in both)
            figures.append(torch.stack([getattr(terms, name).detach() for name in names]))
            progress(step + 1, steps)
    finally:
        student.train(was_training)
        projectors.zero_grad(set_to_none=True)
    start, end = (
        torch.stack(part).double().sum(0).view(-1, 2)
        for part in (figures[:REPORTED_BATCHES], figures[-REPORTED_BATCHES:])
    )
    means = ((sums[:, 0] / sums[:, 1]).tolist() for sums in (start, end))
    said = (
        f"{words} {before:{form}} to {after:{form}}"
        for (words, (*_, form)), before, after in zip(reported.items(), *means, strict=True)
    )
    return f"warmed up for {steps} steps: {', '.join(said)}"


def _batches(
    dataset: Any, collator: Collator, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """The data set's batches in a shuffled order, over and over."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, batch_size, shuffle=True, collate_fn=collator, generator=generator)
    while True:
        yield from loader


# Epochs over states that are computed once ---------------------------------------------------


class FrozenPair:
    """Both models as sources of states that do not change: the student's from a cache on disk too.

    The teacher's come with the collator's batches where it has a cache of its own.
    """

    def __init__(
        self, student: Any, teacher: Teacher, collator: Collator, student_cache: TeacherCache
    ) -> None:
        self.student, self.teacher = student, teacher
        self.collator, self.cache = collator, student_cache

    def fill(self, datasets: list[Any], progress: Progress, tokens_per_batch: int = 2048) -> None:
        """Computes the student's states of all rows that the cache lacks, shortest row first."""
        missing = {}
        for dataset in datasets:
            for row in dataset:
                key = row_key(torch.tensor(row["input_ids"]), torch.tensor(row["labels"]))
                if key not in self.cache:
                    missing[key] = row
        keys = sorted(missing, key=lambda key: (len(missing[key]["input_ids"]), key))
        self._check_disk(missing.values())
        was_training = self.student.training
        self.student.eval()
        pending: dict[str, Tensor] = {}
        done = 0
        progress(done, len(keys))
        while done < len(keys):
            length = len(missing[keys[done]]["input_ids"])
            batch_keys = keys[done : done + max(1, tokens_per_batch // length)]
            inputs = self.collator([missing[key] for key in batch_keys])
            states, _ = both_sides(self.student, self.teacher, inputs)
            counts = states.lengths.tolist()
            for key, hidden, count in zip(batch_keys, states.hidden, counts, strict=True):
                pending[key] = hidden[:count].clone()
            done += len(batch_keys)
            size = sum(tensor.numel() * tensor.element_size() for tensor in pending.values())
            if size >= SHARD_BYTES or done >= len(keys):
                self.cache.append(pending)
                pending = {}
            progress(done, len(keys))
        self.student.train(was_training)

    def _check_disk(self, missing: Iterable[dict[str, Any]]) -> None:
        """Raises UserError where the states of these rows will not fit."""
        tokens = sum(int(torch.tensor(row["labels"])[1:].ne(-100).sum()) for row in missing)
        weight = embedding_table(self.student).weight
        need = tokens * weight.shape[1] * weight.element_size()
        free = shutil.disk_usage(self.cache.folder.parent).free
        if need > free:
            raise UserError(
                f"The student's states of {tokens:,} response tokens will take {need / 1e9:.2f} GB "
                f"in {self.cache.folder}, and {free / 1e9:.2f} GB are free. Free some, or give "
                "--output on another disk."
            )

    def states(self, rows: list[dict[str, Any]]) -> tuple[ResponseStates, ResponseStates]:
        """Both sides of a batch of rows, from the caches."""
        inputs = self.collator(rows)
        known = [
            self.cache.read(torch.tensor(row["input_ids"]), torch.tensor(row["labels"]))
            for row in rows
        ]
        inputs["student_hidden"] = pad_sequence(known, batch_first=True)
        return both_sides(self.student, self.teacher, inputs)


@dataclass
class Course:
    """How a training of projectors went; all figures are means per token of held-out rows.

    `before` and `after` have t2s_ce, t2s_accuracy, s2t_kl, hidden_dtw and embed_dtw; a line of
    `history` has the epoch, its mean training t2s_ce, and the held-out figures but s2t_kl.
    `best_epoch` is 0 where no epoch was better than the start.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def epoch(self) -> int:
        return len(self.history)


def train_projectors(
    projectors: Projectors,
    pair: FrozenPair,
    rows: Any,
    held_out: Any,
    config: DWAKDConfig,
    *,
    epochs: int,
    patience: int,
    batch_size: int,
    seed: int,
    teacher_space: bool,
    state_file: Path,
    progress: Progress = lambda done, total: None,
    on_epoch: Callable[[Course], None] = lambda course: None,
) -> Course:
    """Trains the projectors in place, and leaves them as they were in the best epoch.

    Best is the lowest held-out t2s cross-entropy; training stops `patience` epochs after it, or
    after `epochs`. After each epoch `state_file` holds all that is needed to go on, and where it
    exists already the training goes on from it, to the same end: an epoch's order depends on
    `seed` and its number alone. `progress` hears steps, of all epochs that there may be.
    """
    optimizer = _optimizer(projectors, config)
    steps = -(-len(rows) // batch_size)
    progress(0, epochs * steps)
    if state_file.is_file():
        course, best = _load_state(state_file, projectors, optimizer)
    else:
        course = Course(before=_measure(projectors, pair, held_out, config, batch_size))
        best = _copy(projectors)
    lowest = min([course.before["t2s_ce"], *(line["t2s_ce"] for line in course.history)])
    progress(course.epoch * steps, epochs * steps)
    while course.epoch < epochs and course.epoch - course.best_epoch < patience:
        epoch = course.epoch + 1
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(rows), generator=generator).tolist()
        ce = tokens = torch.zeros((), dtype=torch.float64)
        for step in range(steps):
            batch = [rows[index] for index in order[step * batch_size : (step + 1) * batch_size]]
            states = pair.states(batch)
            terms = _step(projectors, optimizer, *states, config, teacher_space=teacher_space)
            ce = ce + terms.t2s_ce.detach().double().cpu()
            tokens = tokens + terms.distilled_tokens.cpu()
            progress(course.epoch * steps + step + 1, epochs * steps)
        found = _measure(projectors, pair, held_out, config, batch_size, teacher_space=False)
        course.history.append({"epoch": epoch, "train_t2s_ce": (ce / tokens).item(), **found})
        if found["t2s_ce"] < lowest:
            lowest, best, course.best_epoch = found["t2s_ce"], _copy(projectors), epoch
        _save_state(state_file, course, projectors, best, optimizer)
        on_epoch(course)
    projectors.zero_grad(set_to_none=True)
    projectors.load_state_dict(best)
    course.after = _measure(projectors, pair, held_out, config, batch_size)
    return course


@torch.no_grad()
def _measure(
    projectors: Projectors,
    pair: FrozenPair,
    rows: Any,
    config: DWAKDConfig,
    batch_size: int,
    *,
    teacher_space: bool = True,
) -> dict[str, float]:
    """The terms' means per token over all rows."""
    sums: dict[str, float] = {}
    for start in range(0, len(rows), batch_size):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        terms = _terms(projectors, *pair.states(batch), config, teacher_space=teacher_space)
        for name, value in vars(terms).items():
            sums[name] = sums.get(name, 0.0) + value.item()
    student_tokens = max(1.0, sums["distilled_tokens"])
    figures = {
        "t2s_ce": sums["t2s_ce"] / student_tokens,
        "t2s_accuracy": sums["t2s_correct"] / max(1.0, sums["paired_tokens"]),
        "hidden_dtw": sums["hidden_dtw"] / student_tokens,
        "embed_dtw": sums["embed_dtw"] / student_tokens,
    }
    if teacher_space:
        figures["s2t_kl"] = sums["teacher_kd"] / max(1.0, sums["teacher_tokens"])
    return figures


# What is kept after each epoch ---------------------------------------------------------------


def _copy(projectors: Projectors) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in projectors.state_dict().items()}


def _save_state(
    file: Path,
    course: Course,
    projectors: Projectors,
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {f"now.{name}": tensor for name, tensor in projectors.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    save_projectors(tensors, file, {"course": json.dumps(asdict(course))})


def _load_state(
    file: Path, projectors: Projectors, optimizer: torch.optim.Optimizer
) -> tuple[Course, dict[str, Tensor]]:
    """The course so far and the best projectors; sets projectors and optimizer to where it was."""
    tensors, metadata = read_projectors(file)
    parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    projectors.load_state_dict(parts["now"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, rest = name.split(".", 1)
        state.setdefault(int(index), {})[rest] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return Course(**json.loads(metadata["course"])), parts["best"]
