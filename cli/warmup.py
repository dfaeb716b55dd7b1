"""`dwakd warmup`: trains the projectors with both models frozen, before any distillation."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from dwakd_cli.console import PlainConsole
from dwakd_cli.terminal import progress_bar
from dwakd_cli.train import read_recipe, with_distillation
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes, whole_file
from dwakd_plugin.io.locks import release, take
from dwakd_plugin.recipe.schema import DWAKDConfig, parse_recipe
from dwakd_plugin.train.run_folder import output_folder

HELD_OUT_SHARE = 0.05
HELD_OUT_ROWS = 8  # at least, where the share is less
# Keys of a recipe that change nothing about what the projectors learn.
NO_INPUT = ("output_dir", "dataset_prepared_path", "auto_resume_from_checkpoints")

# Titles of the report's figures, and how they are written.
FIGURES = {
    "t2s_ce": ("t2s cross-entropy (nats/token)", "{:.3f}"),
    "t2s_accuracy": ("t2s accuracy", "{:.1%}"),
    "s2t_kl": ("s2t KL (nats/token)", "{:.3f}"),
    "hidden_dtw": ("DTW of hidden states (/token)", "{:.4f}"),
    "embed_dtw": ("DTW of embeddings (/token)", "{:.4f}"),
}


def run(
    recipe_file: Path,
    *,
    teacher: dict[str, Any],
    epochs: int,
    patience: int,
    teacher_space: bool,
    output: Path | None,
    plot: Path | None,
    force: bool,
    json_output: bool,
) -> None:
    """Trains, unless a file for the same inputs is there, and reports. Raises UserError."""
    console = PlainConsole(stderr=json_output)
    recipe, changes = with_distillation(read_recipe(recipe_file), teacher)
    config = parse_recipe(recipe)
    assert config is not None  # with_distillation turned it on
    if config.loss.kd_weight == 0:
        raise UserError(
            "dwakd.loss.kd_weight is 0, so a run would not use the student-space projectors that a "
            "warm-up trains. Give it a weight, or leave the warm-up out."
        )
    if not config.loss.trained_projectors:
        raise UserError(
            f"Variant `{config.variant}` (loss.matching: {config.loss.matching}) has no projectors "
            "to train. Leave the warm-up out."
        )
    if output is None:
        folder = output_folder(recipe)
        output = folder.with_name(f"{folder.name}-projectors.safetensors")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file.")
    settings = {"epochs": epochs, "patience": patience, "teacher_space": teacher_space}
    inputs = inputs_fingerprint(recipe, settings)
    report = None if force else _finished(output, inputs)
    unchanged = report is not None
    if report is None:
        for change in changes:
            console.print(change, style="yellow")
        report = _train(recipe, config, output, inputs, settings, console)
    report = {**report, "output": str(output), "unchanged": unchanged}
    if plot is not None:
        _plot(report, plot)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        _show(report, console, plot)


# What was done already -----------------------------------------------------------------------


def inputs_fingerprint(recipe: dict[str, Any], settings: dict[str, Any]) -> str:
    """Names all that the projectors' training depends on: settings, and what paths hold.

    Every file and folder that the recipe names counts with its contents, and a hub id by its name.
    """
    from dwakd_plugin.models.folder import fingerprint_of_folder

    recipe = {key: value for key, value in recipe.items() if key not in NO_INPUT}
    block = dict(recipe["dwakd"])
    if isinstance(block["teacher"], dict):
        block["teacher"] = {k: v for k, v in block["teacher"].items() if k != "cache"}
    recipe["dwakd"] = block
    contents = {}
    for text in sorted(set(_texts(recipe))):
        path = Path(text)
        if len(text) < 4096 and "\n" not in text and path.is_file():
            with path.open("rb") as stream:
                contents[text] = hashlib.file_digest(stream, "sha256").hexdigest()
        elif len(text) < 4096 and "\n" not in text and text and path.is_dir():
            contents[text] = fingerprint_of_folder(path)
    everything = json.dumps([recipe, settings, contents], sort_keys=True, default=str)
    return hashlib.sha256(everything.encode()).hexdigest()[:32]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _finished(output: Path, inputs: str) -> dict[str, Any] | None:
    """The report of a finished warm-up of the same inputs; None where there is none.

    Raises UserError where something else lies at `output`.
    """
    from dwakd_plugin.models.projectors import read_projectors

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


# Training ------------------------------------------------------------------------------------


def _train(
    recipe: dict[str, Any],
    config: DWAKDConfig,
    output: Path,
    inputs: str,
    settings: dict[str, Any],
    console: PlainConsole,
) -> dict[str, Any]:
    """Opens the run, trains on states that are computed once, and writes the file."""
    work = _work_folder(output, inputs)
    started = time.monotonic()
    with _alone(work, output), _words_when_stopped(work, console):
        if config.teacher.cache is None:
            # The teacher reads each row once and is let go; the next epochs read what it wrote.
            block = recipe["dwakd"]
            own = block["teacher"]
            own = {"base_model": own} if isinstance(own, str) else own
            own = own | {"cache": str(work / "teacher")}
            recipe = recipe | {"dwakd": block | {"teacher": own}}
        console.print(f"Loading {recipe['base_model']} and {config.teacher.base_model} ...")
        from dwakd_plugin.train.open_run import open_run

        with open_run(recipe) as opened:
            report, tensors, pair = _train_opened(opened, work, settings, console)
        report["seconds"] = round(time.monotonic() - started, 1)
        from dwakd_plugin.models.projectors import save_projectors

        save_projectors(tensors, output, pair | {"inputs": inputs, "warmup": json.dumps(report)})
        shutil.rmtree(work)
    return report


def _train_opened(
    opened: Any, work: Path, settings: dict[str, Any], console: PlainConsole
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The report, the projectors' tensors, and the pair that they belong to."""
    from dwakd_plugin.models.causal_lm import embedding_table
    from dwakd_plugin.models.teacher.cache import TeacherCache
    from dwakd_plugin.train.warmup import FrozenPair, train_projectors

    trainer, distillation = opened.trainer, opened.distillation
    seed = int(opened.cfg.seed or 42)
    rows, held_out = split_rows(trainer.train_dataset, trainer.eval_dataset, seed)
    width = embedding_table(trainer.model).weight.shape[1]
    cache = TeacherCache(work / "student", {"side": "student", "hidden_size": width})
    pair = FrozenPair(trainer.model, distillation.teacher, trainer.data_collator, cache)
    batch_size = trainer.args.per_device_train_batch_size
    with progress_bar(console, "{task.description:<32}") as progress:
        filling = progress.add_task("The student's states (rows)", total=None)
        pair.fill(
            [rows, held_out],
            lambda done, total: progress.update(filling, completed=done, total=total),
        )
        progress.remove_task(filling)
        training = progress.add_task("Projectors (steps)", total=None)

        def on_epoch(course: Any) -> None:
            line = course.history[-1]
            best = "  best so far" if course.best_epoch == course.epoch else ""
            console.print(
                f"epoch {course.epoch}: held-out t2s cross-entropy {line['t2s_ce']:.3f}, "
                f"accuracy {line['t2s_accuracy']:.1%}{best}",
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
            progress=lambda done, total: progress.update(training, completed=done, total=total),
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
    import torch

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
def _words_when_stopped(work: Path, console: PlainConsole) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = "epochs" if (work / "state.safetensors").is_file() else "states"
        console.print(
            f"Stopped. The same command goes on: the {kept} so far are kept in {work}.",
        )
        raise


# The report ----------------------------------------------------------------------------------


def _show(report: dict[str, Any], console: PlainConsole, plot: Path | None) -> None:
    rows, history = report["rows"], report["history"]
    if report["unchanged"]:
        console.print(
            f"Nothing to do: {report['output']} was made from the same models, rows and settings. "
            "--force repeats it.",
        )
    table = Table(
        title=f"Projectors on {rows['held_out']:,} held-out rows",
        caption=f"{rows['train']:,} rows trained on; {rows['held_out']:,} held out, "
        f"{rows['held_out_from']}",
    )
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, (title, form) in FIGURES.items():
        table.add_row(title, *(form.format(report[when][name]) for when in ("before", "after")))
    console.print(table)
    best = report["best_epoch"]
    if best == 0:
        console.print(
            "No epoch was better than the start: the file holds the projectors as they "
            "were. A lower dwakd.projectors.warmup_learning_rate may help.",
            style="yellow",
        )
    elif best == report["settings"]["epochs"]:
        console.print(f"The last of {best} epochs was the best: more may help (--epochs).")
    else:
        console.print(f"Epoch {best} of {len(history)} was the best, and is what was kept.")
    if plot is not None:
        console.print(f"The course of training is drawn in {plot}.")
    console.print(
        "To start from them, put this into the recipe, and leave warmup_steps out:\n"
        f"  dwakd:\n    projectors:\n      path: {report['output']}",
        soft_wrap=True,
    )


def _plot(report: dict[str, Any], file: Path) -> None:
    """Held-out cross-entropy and accuracy by epoch, as an image in the format of the suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = report["history"]
    epochs = [0, *(line["epoch"] for line in history)]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name in zip(axes, ("t2s_ce", "t2s_accuracy"), strict=True):
        values = [report["before"][name], *(line[name] for line in history)]
        axis.plot(epochs, values, marker="o", markersize=3, label="held out")
        axis.axvline(report["best_epoch"], color="grey", linestyle=":", label="kept")
        axis.set_xlabel("epoch")
        axis.set_title(FIGURES[name][0])
    axes[0].plot(
        epochs[1:], [line["train_t2s_ce"] for line in history], linestyle="--", label="training"
    )
    axes[0].legend()
    try:
        with explaining_writes(f"The plot {file}"), whole_file(file) as partial:
            figure.savefig(partial, dpi=120)
    except ValueError as error:  # of a suffix that is no format of images
        raise UserError(f"The plot {file} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
