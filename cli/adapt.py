"""`dwakd adapt`: the teacher learns the recipe's rows first, by LoRA, through axolotl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import JsonReport, LoadIn4Bit, LoadIn8Bit, RecipeFile, Teacher, of_teacher
from dwakd_cli.terminal import progress_bar
from dwakd_plugin.errors import UserError

if TYPE_CHECKING:
    from dwakd_plugin.recipe import Recipe
    from dwakd_plugin.train.progress import Progress

LOG_FILE, RECIPE_FILE = "adapt.log", "adapt.yml"


def adapt(
    recipe: RecipeFile,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the adapter. By default it lies beside OUTPUT_DIR and is named after "
            "it."
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(metavar="X", help="Default: the recipe's num_epochs, at most 3."),
    ] = None,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="Of the LoRA.")] = 2e-4,
    rank: Annotated[int, typer.Option(metavar="N", help="Of the LoRA.")] = 16,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the recipe, stop.")
    ] = False,
    json_output: JsonReport = False,
) -> None:
    """Let the teacher learn the recipe's rows before it teaches them.

    Trains a LoRA of the teacher on the same rows in its own chat template, in 8 or 4 bit where the
    recipe holds it so, by axolotl, on a recipe that is kept beside the adapter. Says what held-out
    responses cost the teacher before and after, and the ends of responses apart. Does nothing where
    the adapter is there and what it was made of has not changed; after Ctrl-C, the same command
    goes on from the last checkpoint.
    """
    from dwakd_plugin.recipe import Recipe
    from dwakd_plugin.train.adaptation import adaptation, adapter_folder
    from dwakd_plugin.train.preflight import check_all

    for name, given in (("epochs", epochs), ("learning-rate", learning_rate), ("rank", rank)):
        if given is not None and not 0 < given < float("inf"):
            raise UserError(f"--{name} {given}: give a number above 0.")
    console = PlainConsole(stderr=json_output, soft_wrap=True)
    read = Recipe.read(recipe, of_teacher(teacher, load_in_8bit, load_in_4bit, None))
    read.check_one_teacher("dwakd adapt")
    folder = output or adapter_folder(read)
    # All but the output folder, which isn't written to: one that is not there is always free.
    check_all(read.but(output_dir=str(folder / "none")))
    keys = adaptation(read, folder, epochs=epochs, learning_rate=learning_rate, rank=rank)
    if dry_run:
        print(yaml.safe_dump(keys, sort_keys=False, allow_unicode=True), end="")
        return
    report = adapt_teacher(read, keys, console)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        _show(report, console)


def adapt_teacher(recipe: Recipe, keys: dict[str, Any], console: PlainConsole) -> dict[str, Any]:
    """The adapter's report, after a training on `keys` where it isn't there. Raises UserError."""
    from dwakd_plugin.train.adaptation import fingerprint, finished, keep_report, with_held_out

    started = time.monotonic()
    folder = Path(keys["output_dir"])
    made_of = fingerprint(keys)
    if (report := finished(folder, made_of)) is not None:
        return report | {"skipped": True}
    _refuse_others(folder, made_of)
    rows, before = _measured(with_held_out(recipe, keys), None, None, console, "before")
    _train(keys, made_of, folder, console)
    _, after = _measured(recipe, folder, rows, console, "after")
    report = {
        "teacher": recipe.config.teacher.base_model,
        "adapter": str(folder),
        "recipe": str(folder / RECIPE_FILE),
        "before": before._asdict(),
        "after": after._asdict(),
        "seconds": round(time.monotonic() - started, 1),
    }
    keep_report(folder, made_of, report)
    return report | {"skipped": False}


def _refuse_others(folder: Path, made_of: str) -> None:
    """Raises UserError where the folder holds something that isn't this adapter, begun or whole."""
    from dwakd_plugin.train.adaptation import REPORT_FILE

    if not folder.exists() or not any(folder.iterdir()):
        return
    begun = folder / RECIPE_FILE
    if begun.is_file() and made_of in begun.read_text(encoding="utf-8").partition("\n")[0]:
        return
    if (folder / REPORT_FILE).is_file() or begun.is_file():
        raise UserError(
            f"{folder} holds an adapter of other rows, another teacher or other settings. Remove "
            "it, or give another --output."
        )
    raise UserError(f"{folder} holds something else. Give another --output.")


def _measured(
    recipe: Recipe, adapter: Path | None, rows: Any, console: PlainConsole, when: str
) -> tuple[Any, Any]:
    """Held-out rows of the teacher, and what their responses cost it."""
    import torch

    from dwakd_plugin.models.teacher.cached import teacher_rows
    from dwakd_plugin.models.teacher.loaded import load_teacher
    from dwakd_plugin.train.adaptation import response_loss
    from dwakd_plugin.train.open_run import open_rows

    if rows is None:
        console.print("Preparing the rows ...")
        with open_rows(recipe) as (_, datasets, _):
            rows = teacher_rows(datasets[1])
        if not rows:
            raise UserError(
                "No row is held out to measure the teacher on. Give the recipe a `val_set_size` or "
                "`test_datasets`, or more rows."
            )
    config = recipe.config.teacher
    if adapter is not None:
        config = config.model_copy(update={"adapter": str(adapter)})
    teacher = load_teacher(config, "cuda:0" if torch.cuda.is_available() else "cpu")
    with progress_bar(console) as progress:
        task = progress.add_task(f"The teacher's loss {when}", total=len(rows))
        loss = response_loss(
            teacher, rows, lambda done, total: progress.update(task, completed=done, total=total)
        )
    del teacher
    torch.cuda.empty_cache()  # its training is another process's
    return rows, loss


def _train(keys: dict[str, Any], made_of: str, folder: Path, console: PlainConsole) -> None:
    """Runs axolotl on the keys. Raises UserError with the log's end where it fails."""
    from dwakd_cli.logged_run import train_logged
    from dwakd_cli.stages import curve
    from dwakd_plugin.io.files import explaining_writes, replace_file
    from dwakd_plugin.train.launch import axolotl_environment
    from dwakd_plugin.train.run_folder import set_incomplete_checkpoints_aside

    file = folder / RECIPE_FILE
    with explaining_writes("The adapter's folder"):
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)
        replace_file(file, f"# The teacher learns the task: dwakd adapt, {made_of}\n{text}")
        set_incomplete_checkpoints_aside(folder)  # what Ctrl-C left of one that was being written
    with progress_bar(console, "{task.description} {task.fields[note]}") as bars:
        bar = bars.add_task("The teacher learns", total=None, note="")

        def tell(heard: Progress) -> None:
            note = f"loss {curve(heard.losses)}" if heard.losses else ""
            bars.update(bar, completed=heard.step, total=heard.steps or None, note=note)

        try:
            train_logged(file, folder / LOG_FILE, axolotl_environment(), tell)
        except KeyboardInterrupt:
            console.print("The same command goes on from the last checkpoint, if there is one.")
            raise


def _show(report: dict[str, Any], console: PlainConsole) -> None:
    before, after = report["before"], report["after"]
    if report["skipped"]:
        console.print(f"Nothing to do: {report['adapter']} was made of just this.")
    table = Table(
        title=f"What {before['tokens'] + before['ends']:,} held-out tokens cost the teacher, nats"
    )
    table.add_column("")
    for title in ("before", "after"):
        table.add_column(title, justify="right")
    for title, key in (("a token", "per_token"), ("an end of a response", "per_end")):
        table.add_row(title, f"{before[key]:.3f}", f"{after[key]:.3f}")
    console.print(table)
    if after["per_token"] > before["per_token"]:
        console.print(
            "The teacher is worse at these rows than before: fewer --epochs or a lower "
            "--learning-rate.",
            style="yellow",
        )
    console.print("Put this into the recipe; `dwakd train --adapt` does it by itself:")
    adapter = json.dumps(report["adapter"])
    console.print(f"dwakd:\n  teacher:\n    adapter: {adapter}", soft_wrap=True)
