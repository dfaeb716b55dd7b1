"""`dwakd train`: any axolotl recipe, checked and distilled, through axolotl's own launcher."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import (
    LoadIn4Bit,
    LoadIn8Bit,
    RecipeFile,
    Teacher,
    TeacherCache,
    of_teacher,
)
from dwakd_plugin.errors import UserError, without_credentials

if TYPE_CHECKING:
    from dwakd_plugin.train.launch import Launch

LOG_FILE = Path("dwakd") / "train.log"  # within the output folder


def train(
    recipe: RecipeFile,
    further: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- ARGUMENTS...]",
            help="For axolotl, as in `-- --learning-rate 1e-4`.",
            show_default=False,
        ),
    ] = None,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    teacher_cache: TeacherCache = None,
    adapt: Annotated[
        bool,
        typer.Option("--adapt", help="The teacher learns the rows first, as by `dwakd adapt`."),
    ] = False,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers",
            help="The teacher answers the prompts first, as by `dwakd answers`, and the student "
            "trains on that.",
        ),
    ] = False,
    with_labels: Annotated[
        bool, typer.Option("--with-labels", help="With --answers: on the rows' own answers too.")
    ] = False,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Overrides the recipe's: mapped, dskd, sft, ... (docs/baselines.md).",
        ),
    ] = None,
    launcher: Annotated[
        Literal["python", "accelerate", "torchrun"] | None,
        typer.Option(
            metavar="NAME",
            help="python, accelerate or torchrun. Default: python for one process, else accelerate "
            "(CPU: torchrun).",
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes on this machine; default: one a GPU."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show what would run, stop.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="A line for each line of the log, and no table.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print what ran as JSON; axolotl's output to stderr.")
    ] = False,
) -> None:
    """Train a recipe with a teacher, through axolotl.

    Any axolotl recipe for supervised fine-tuning will do: with --teacher it needs no edit. The
    plugin and the switch are added, everything is checked before a model is loaded, and what
    axolotl was given is kept in OUTPUT_DIR/dwakd/recipe.yml, and all that it says in
    OUTPUT_DIR/dwakd/train.log.

    What follows a `--` goes to axolotl, as in `-- --learning-rate 1e-4`; what follows a second `--`
    goes to its launcher.

    Ctrl-C lets axolotl save and stop; a second one kills it. Exit codes: axolotl's own; 1 for an
    error with a message; 130 and 143 when interrupted or terminated.
    """
    from dwakd_plugin.train.health import standing_in
    from dwakd_plugin.train.launch import prepare
    from dwakd_plugin.train.run_folder import RUN_FILE

    console = PlainConsole(stderr=json_output)
    given = of_teacher(teacher, load_in_8bit, load_in_4bit, teacher_cache)
    if adapt:
        given |= _adapted(recipe, given, resume, dry_run, console)
    if with_labels and not answers:
        raise UserError("--with-labels is for --answers: without it, labels are all there is.")
    data = _answered(recipe, given, dry_run, with_labels, console) if answers else {}
    launch = prepare(
        recipe,
        further or [],
        teacher=given,
        data=data,
        variant=variant,
        launcher=launcher,
        processes=nproc,
        resume=resume,
    )
    if dry_run:
        from dwakd_plugin.train.open_run import look_at_data

        with console.status("Looking at the data sets' first rows"):
            look_at_data(launch.seen)
        if json_output:
            print(json.dumps(_facts(launch), indent=1))
        else:
            console.print(_table(launch))
            console.print("Nothing was started or written: leave out --dry-run to train.")
        return
    for change in launch.recipe.changes:
        console.print(change, style="yellow")
    signed_before = launch.signature
    if json_output:
        code, stopped_by = _execute(launch, recipe.name, stdout=sys.stderr)
    else:
        code, stopped_by = _show(launch, recipe.name, console, plain=plain, resumes=resume)
    trained = launch.signature != signed_before  # else the report is of another run
    warnings = standing_in(launch.output) if trained else []
    if stopped_by is not None:
        console.print(_how_to_go_on(launch, stopped_by))
        for warning in warnings:  # of a run that ends by itself they are the last words
            console.print(Text(f"Until then: {warning}", style="yellow"))
        code = 128 + stopped_by
    elif code != 0 and json_output:
        console.print(f"axolotl ended with exit code {code}; its log is above.", style="red")
    elif code != 0:
        from dwakd_cli.logged_run import end_of

        console.print(f"axolotl ended with exit code {code}. ", style="red", end="")
        console.print(end_of(launch.output / LOG_FILE), soft_wrap=True)
    elif not launch.on_several_machines and launch.signature == signed_before:
        raise UserError(
            f"axolotl ended well, but dwakd's plugin was not part of it: {launch.output / RUN_FILE}"
            " was not written. What it trained had no teacher. Run `axolotl train "
            f"{launch.file}` and look for `Failed to load plugin` in its log."
        )
    if json_output:
        facts = {**_facts(launch), "exit_code": code, "warnings": warnings}
        print(json.dumps(facts, indent=1))
    sys.exit(code)


def _execute(launch: Launch, source: str, **further: Any) -> tuple[int, int | None]:
    """Runs axolotl to its end: exit code, and the signal that stopped it. Raises UserError.

    The recipe, which was made of `source`, is written when all else is ready: from then on Ctrl-C
    is heard as the run's.
    """
    from dwakd_plugin.train.child_process import execute
    from dwakd_plugin.train.launch import signals_of
    from dwakd_plugin.train.signals import MESSAGE

    signed_before = launch.signature
    with signals_of(launch) as signals:
        launch.write_recipe(source)
        code, stopped_by = execute(
            launch.command,
            launch.environment,
            # axolotl learns to stop when the models are loaded, right after the plugin signs.
            can_save=lambda: launch.on_several_machines or launch.signature != signed_before,
            signals=signals,
            **further,
        )
        if signals is not None and (signals / MESSAGE).exists():
            raise UserError((signals / MESSAGE).read_text(encoding="utf-8"))
    return code, stopped_by


def _show(
    launch: Launch, source: str, console: PlainConsole, *, plain: bool, resumes: bool
) -> tuple[int, int | None]:
    """As `_execute`, with axolotl's output in a file and the run's course on the console."""
    from dwakd_cli.run_display import RunDisplay
    from dwakd_plugin.io.files import explaining_writes
    from dwakd_plugin.train import progress

    log, keys = launch.output / LOG_FILE, launch.seen.keys
    with contextlib.ExitStack() as stack:
        told = launch.environment.get(progress.FILE)
        if not told:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dwakd-"))
            told = launch.environment[progress.FILE] = str(Path(folder) / "progress.jsonl")
        Path(told).unlink(missing_ok=True)
        display = RunDisplay(
            console,
            Path(told),
            plain=plain,
            evaluates=bool(keys.get("val_set_size") or keys.get("test_datasets")),
        )
        with explaining_writes("The output folder"):
            log.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(log.open("ab" if resumes else "wb"))
        console.print(f"Log: {log}", soft_wrap=True)
        with display:
            code, stopped_by = _execute(
                launch, source, stdout=stream, stderr=subprocess.STDOUT, meanwhile=display
            )
    if display.error is not None and stopped_by is None:
        raise UserError(display.error)
    return code, stopped_by


def _adapted(
    file: Path, given: dict[str, Any], resume: bool, dry_run: bool, console: PlainConsole
) -> dict[str, Any]:
    """The teacher's adapter as a key of `dwakd.teacher`, trained first where it isn't there."""
    from dwakd_cli.adapt import adapt_teacher
    from dwakd_plugin.recipe import Recipe
    from dwakd_plugin.train.adaptation import adaptation, adapter_folder
    from dwakd_plugin.train.preflight import check_all

    read = Recipe.read(file, given)
    read.check_one_teacher("dwakd train --adapt")
    if resume:
        read = read.but(auto_resume_from_checkpoints=True)
    check_all(read)
    keys = adaptation(read, adapter_folder(read))
    if dry_run:
        console.print(f"The teacher would learn the rows first: {keys['output_dir']}.")
        return {}
    return {"adapter": adapt_teacher(read, keys, console)["adapter"]}


def _answered(
    file: Path, given: dict[str, Any], dry_run: bool, with_labels: bool, console: PlainConsole
) -> dict[str, Any]:
    """The keys of the data, answered by the teacher, which does so first where it hasn't."""
    from dwakd_cli.answers import answers_for_training
    from dwakd_plugin.recipe import Recipe

    read = Recipe.read(file, given)
    read.check_one_teacher("dwakd train --answers")
    return answers_for_training(read, with_labels, dry_run, console)


def _how_to_go_on(launch: Launch, stopped_by: int) -> str:
    words = [f"Stopped by {signal.Signals(stopped_by).name}."]
    if any(launch.output.glob("*.safetensors")):
        words.append(f"The student as it was then is in {launch.output}.")
    if any(launch.output.glob("checkpoint-*/trainer_state.json")):
        words.append("`--resume` goes on from the last checkpoint.")
    else:
        words.append("There is no checkpoint to go on from.")
    return " ".join(words)


def _facts(launch: Launch) -> dict[str, Any]:
    config, recipe = launch.seen.config, launch.recipe
    each = [
        {"teacher": one.called, "teacher_precision": one.precision, "teacher_cache": one.cache}
        for one in config.each_teacher
    ]
    several = [
        {"name": one.name, "weight": one.weight, "datasets": one.datasets} | own
        for one, own in zip(config.each_teacher, each, strict=True)
    ]
    return {
        "student": recipe.base_model,
        "adapter": recipe.adapter,
        **(each[0] if len(each) == 1 else {"teachers": several}),
        "datasets": [
            without_credentials(f"{data.get('path')} ({data.get('type')})")
            for data in recipe.datasets
        ],
        "output_dir": str(launch.output),
        "recipe": str(launch.file),
        "changes": list(recipe.changes),
        "launcher": launch.launcher,
        "processes": launch.processes or "one a GPU",
        "command": launch.command,
    }


def _table(launch: Launch) -> Table:
    table = Table(title="What would run", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(launch).items():
        if name == "command":
            value = " ".join(["python", *value[1:]])
        elif name == "teachers":
            value = "\n".join(map(_in_words, value))
        elif isinstance(value, list):
            value = "\n".join(value)
        if value:
            table.add_row(name.replace("_", " "), str(value))
    return table


def _in_words(teacher: dict[str, Any]) -> str:
    """One of several teachers in a line."""
    cache = f", cache {teacher['teacher_cache']}" if teacher["teacher_cache"] else ""
    return (
        f"{teacher['name']}: {teacher['teacher']}, {teacher['teacher_precision']}{cache}; weight "
        f"{teacher['weight']:g}, of {', '.join(teacher['datasets'] or ['all rows'])}"
    )
