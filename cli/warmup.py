"""`dwakd warmup`: trains the projectors with both models frozen, before any distillation."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import (
    JsonReport,
    LoadIn4Bit,
    LoadIn8Bit,
    RecipeFile,
    Teacher,
    TeacherCache,
    of_teacher,
)
from dwakd_cli.terminal import work_stages
from dwakd_plugin.errors import UserError

# Titles of the report's figures, and how they are written.
FIGURES = {
    "t2s_ce": ("t2s cross-entropy (nats/token)", "{:.3f}"),
    "t2s_accuracy": ("t2s accuracy", "{:.1%}"),
    "s2t_kl": ("s2t KL (nats/token)", "{:.3f}"),
    "hidden_dtw": ("DTW of hidden states (/token)", "{:.4f}"),
    "embed_dtw": ("DTW of embeddings (/token)", "{:.4f}"),
}


def warmup(
    recipe: RecipeFile,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    teacher_cache: TeacherCache = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Epochs at most.")] = 10,
    patience: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Stop after so many epochs that improve nothing."),
    ] = 2,
    teacher_space: Annotated[
        bool,
        typer.Option("--teacher-space", help="Train s2t too, on the teacher-space KL; dear."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="The file; by default it lies beside OUTPUT_DIR and is named after it."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the course of training (PNG).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train again, and replace what lies at --output.")
    ] = False,
    json_output: JsonReport = False,
) -> None:
    """Train the projectors with both models frozen, before distillation begins.

    Each model reads each row once; every epoch after that trains on the states kept. Stops early
    on held-out rows (the recipe's, else 5 % of the data) and keeps the best epoch's projectors, for
    `dwakd.projectors.path` of the recipe.

    What is finished and has the same models, rows and settings is not repeated. Ctrl-C exits with
    130, and the same command then goes on after the last whole epoch.

    Exit codes: 0 the file is there; 1 an error; 130 interrupted.
    """
    from dwakd_plugin.recipe import Recipe

    console = PlainConsole(stderr=json_output)
    read = Recipe.read(recipe, of_teacher(teacher, load_in_8bit, load_in_4bit, teacher_cache))
    read.check_one_teacher("dwakd warmup")
    config = read.config
    if config.loss.kd_weight == 0:
        raise UserError(
            "dwakd.loss.kd_weight is 0, so a run would not use the student-space projectors that a "
            "warm-up trains. Give it a weight, or leave the warm-up out."
        )
    from dwakd_plugin.loss import projects_labels, trained_projectors

    if not trained_projectors(config.loss):
        raise UserError(
            f"Variant `{config.variant}` (loss.matching: {config.loss.matching}) has no projectors "
            "to train. Leave the warm-up out, or say `variant: paper`."
        )
    if not projects_labels(config.loss):
        raise UserError(
            f"Of variant `{config.variant}` (loss.matching: {config.loss.matching}) no projector "
            "learns the labels, by which a warm-up of its own is stopped. Warm up within the run: "
            "dwakd.projectors.warmup_steps: 100."
        )
    if output is None:
        folder = read.output_dir
        output = folder.with_name(f"{folder.name}-projectors.safetensors")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file.")
    settings = {"epochs": epochs, "patience": patience, "teacher_space": teacher_space}
    from dwakd_plugin.train.warmup_file import finished, inputs_fingerprint, make

    inputs = inputs_fingerprint(read, settings)
    report = None if force else finished(output, inputs)
    unchanged = report is not None
    if report is None:
        for change in read.changes:
            console.print(change, style="yellow")
        stages = partial(work_stages, console, "{task.description:<32}")
        report = make(read, output, inputs, settings, console.print, stages)
    report = {**report, "output": str(output), "unchanged": unchanged}
    if plot is not None:
        _plot(report, plot)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        _show(report, console, plot)


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

    from dwakd_plugin.io.files import explaining_writes, whole_file

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
    except ValueError as error:  # of a suffix that isn't an image format
        raise UserError(f"The plot {file} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
