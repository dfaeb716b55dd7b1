"""A warm-up of projectors as a file: made once for its inputs, taken up where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes
from dwakd_plugin.io.locks import release, take
from dwakd_plugin.models.causal_lm import embedding_table
from dwakd_plugin.models.folder import fingerprint_of_folder
from dwakd_plugin.models.projectors import read_projectors, save_projectors
from dwakd_plugin.models.teacher.cache import TeacherCache
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.train.open_run import open_run
from dwakd_plugin.train.warmup import Course, FrozenPair, train_projectors

# Begins a stage of the work by its title; what it returns hears (done, total).
Begin = Callable[[str], Callable[[int, int], None]]

HELD_OUT_SHARE = 0.05
HELD_OUT_ROWS = 8  # at least, where the share is less
# Keys of a recipe that change nothing about what the projectors learn.
NO_INPUT = ("output_dir", "dataset_prepared_path", "auto_resume_from_checkpoints")


def inputs_fingerprint(recipe: Recipe, settings: dict[str, Any]) -> str:
    """Names all that the projectors' training depends on: settings, and what paths hold.

    Every file and folder that the recipe names counts with its contents, and a hub id by its name.
    """
    keys = dict(recipe.but(*NO_INPUT).keys)
    block = keys["dwakd"]
    own = {key: _uncached(block[key]) for key in ("teacher", "teachers") if key in block}
    keys["dwakd"] = block | own
    contents = {}
    for text in sorted(set(_texts(keys))):
        path = Path(text)
        if len(text) < 4096 and "\n" not in text and path.is_file():
            with path.open("rb") as stream:
                contents[text] = hashlib.file_digest(stream, "sha256").hexdigest()
        elif len(text) < 4096 and "\n" not in text and text and path.is_dir():
            contents[text] = fingerprint_of_folder(path)
    everything = json.dumps([keys, settings, contents], sort_keys=True, default=str)
    return hashlib.sha256(everything.encode()).hexdigest()[:32]


def _uncached(teacher: Any) -> Any:
    """What a recipe says of a teacher, or of several, but for the cache."""
    if isinstance(teacher, list):
        return [_uncached(one) for one in teacher]
    if not isinstance(teacher, dict):
        return teacher
    return {key: value for key, value in teacher.items() if key != "cache"}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def finished(output: Path, inputs: str) -> dict[str, Any] | None:
    """The report of a finished warm-up of the same inputs; None where there is none.

    Raises UserError where something else lies at `output`.
    """
    if not output.exists():
        return None
    try:
        _, metadata = read_projectors(output)
    except UserError as error:
        raise UserError(f"{error}\n--force replaces the file; --output names another.") from error
    if "warmup" not in metadata:
        raise UserError(
            f"{output} was not written by `dwakd warmup`. --force replaces it; --output names "
            "another file."
        )
    report: dict[str, Any] = json.loads(metadata["warmup"])
    return report if metadata.get("inputs") == inputs else None


def make(
    recipe: Recipe,
    output: Path,
    inputs: str,
    settings: dict[str, Any],
    say: Callable[[str], None],
    stages: Callable[[], AbstractContextManager[Begin]],
) -> dict[str, Any]:
    """Opens the run, trains on states that are computed once, and writes the file.

    Returns the report, which the file holds too. Raises UserError; what Ctrl-C stops is taken up by
    the next call for the same inputs.
    """
    work = _work_folder(output, inputs)
    started = time.monotonic()
    with _alone(work, output), _words_when_stopped(work, say):
        if recipe.config.teacher.cache is None:
            # The teacher reads each row once and is let go; the next epochs read what it wrote.
            recipe = recipe.with_teacher(cache=str(work / "teacher"))
        say(f"Loading {recipe.base_model} and {recipe.config.teacher.base_model} ...")
        with open_run(recipe) as opened:
            report, tensors, pair = _train_opened(opened, work, settings, say, stages)
        report["seconds"] = round(time.monotonic() - started, 1)
        save_projectors(tensors, output, pair | {"inputs": inputs, "warmup": json.dumps(report)})
        shutil.rmtree(work)
    return report


def _train_opened(
    opened: Any,
    work: Path,
    settings: dict[str, Any],
    say: Callable[[str], None],
    stages: Callable[[], AbstractContextManager[Begin]],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The report, the projectors' tensors, and the pair that they belong to."""
    trainer, distillation = opened.trainer, opened.distillation
    seed = int(opened.cfg.seed)
    rows, held_out = split_rows(trainer.train_dataset, trainer.eval_dataset, seed)
    width = embedding_table(trainer.model).weight.shape[1]
    cache = TeacherCache(work / "student", {"side": "student", "hidden_size": width})
    pair = FrozenPair(trainer.model, distillation.teacher, trainer.data_collator, cache)
    batch_size = trainer.args.per_device_train_batch_size
    with stages() as begin:
        pair.fill([rows, held_out], begin("The student's states (rows)"))

        def on_epoch(course: Course) -> None:
            line = course.history[-1]
            best = "  best so far" if course.best_epoch == course.epoch else ""
            say(
                f"epoch {course.epoch}: held-out t2s cross-entropy {line['t2s_ce']:.3f}, "
                f"accuracy {line['t2s_accuracy']:.1%}{best}"
            )

        course = train_projectors(
            distillation.projectors,
            pair,
            rows,
            held_out,
            opened.config,
            **settings,
            batch_size=batch_size,
            seed=seed,
            state_file=work / "state.safetensors",
            progress=begin("Projectors (steps)"),
            on_epoch=on_epoch,
        )
    report = {
        "student": distillation.pair["student"],
        "teacher": distillation.pair["teacher"],
        "rows": {
            "train": len(rows),
            "held_out": len(held_out),
            "held_out_from": "the recipe's evaluation rows"
            if trainer.eval_dataset is not None
            else "split from the training rows",
        },
        "settings": settings
        | {
            "batch_size": batch_size,
            "learning_rate": opened.config.projectors.warmup_learning_rate,
            "seed": seed,
        },
        **asdict(course),
    }
    return report, distillation.projectors.state_dict(), distillation.pair


def split_rows(train: Any, evaluation: Any, seed: int) -> tuple[Any, Any]:
    """Rows to train on, and held-out rows: the recipe's, or else a share of the training rows.

    Raises UserError where there are too few to hold any out.
    """
    if evaluation is not None and len(evaluation):
        return train, evaluation
    count = max(HELD_OUT_ROWS, round(HELD_OUT_SHARE * len(train)))
    if len(train) < 2 * count:
        raise UserError(
            f"The data hold {len(train)} rows, too few to hold {count} out for early stopping. Add "
            "rows, or `test_datasets` to the recipe."
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return train.select(sorted(order[count:])), train.select(sorted(order[:count]))


def _work_folder(output: Path, inputs: str) -> Path:
    """Where an unfinished warm-up of these inputs keeps its states; those of others are removed."""
    work = output.parent / f".{output.name}.work-{inputs[:12]}"
    for other in output.parent.glob(f".{output.name}.work-*"):
        if other != work:
            with _alone(other, output):
                shutil.rmtree(other)
    with explaining_writes(output, "--output names a place."):
        work.mkdir(parents=True, exist_ok=True)
    return work


@contextmanager
def _alone(work: Path, output: Path) -> Iterator[None]:
    """Keeps a work folder for this process. Raises UserError where another has it."""
    with explaining_writes(output, "--output names a place."):
        lock = take(
            work / "lock",
            lambda holder: (
                f"{output} is being made by {holder}. Let it finish, or stop it and run this "
                "again: what it has done is kept."
            ),
        )
    try:
        yield
    finally:
        release(lock)


@contextmanager
def _words_when_stopped(work: Path, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = "epochs" if (work / "state.safetensors").is_file() else "states"
        say(f"Stopped. The same command goes on: the {kept} so far are kept in {work}.")
        raise
