"""`dwakd plan`: what a recipe's distillation will take, before anything large is downloaded."""

from __future__ import annotations

import json
import math
import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

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
from dwakd_plugin.errors import UserError

if TYPE_CHECKING:
    from dwakd_plugin.plan import Lengths, Plan, Suggestion
    from dwakd_plugin.recipe import Recipe

GIB = 2**30
_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "white", "bright_blue")
_GLYPHS = "█▓▒░▚▞#=+:%o"  # parts stay apart without colour


def _share(value: float) -> float:
    if not 0.01 <= value <= 1:
        raise typer.BadParameter(f"{value:g} is not from 0.01 to 1.")
    return value


def plan(
    recipe: RecipeFile,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    teacher_cache: TeacherCache = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="What it should fit on: 24GB, A100-80GB, ..., or cpu.",
            show_default="the GPU found, else the CPU",
        ),
    ] = None,
    response_share: Annotated[
        float,
        typer.Option(
            metavar="X",
            callback=_share,
            help="How much of a row is response, 0.01 to 1; the rest is prompt.",
        ),
    ] = 1.0,
    data: Annotated[
        bool,
        typer.Option("--data", help="Tokenise the data and plan for its longest rows."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the parts (PNG).")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if it does not fit.")] = (
        False
    ),
    json_output: JsonReport = False,
) -> None:
    """Say what a run will take in memory and time, before anything large is downloaded.

    Needs both models' configs alone. Memory by part at the worst moment of a step, the largest
    micro-batch that fits, an estimate of the time, and what would help, in order of effect. Rows
    are taken to be as long as `sequence_len`, the worst case, unless --data.

    Exit codes: 0 planned, whether it fits or not; 1 an error; 3 with --strict, does not fit.
    """

    from dwakd_plugin.recipe import Recipe
    from dwakd_plugin.recipe.checks import check_recipe
    from dwakd_plugin.train.preflight import check_variant

    console = PlainConsole(stderr=json_output)
    given = of_teacher(teacher, load_in_8bit, load_in_4bit, teacher_cache)
    read = Recipe.read(recipe, given)
    check_recipe(read)
    check_variant(read)
    changes = list(read.changes)
    if read.has_engine:
        changes.append(
            "The figures are for a GPU that holds the whole student, as without FSDP and DeepSpeed"
        )
    if read.packs:
        changes.append(
            "A packed sequence is taken as one full row, the worst case; how many steps the rows "
            "make is not known before they are packed"
        )
        data = False
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with console.status("Building both models without their weights"):
        from dwakd_plugin import plan as memory_plan

        lengths = _measured_lengths(read) if data else None
        rows: dict[str, Any] = {"response_share": response_share, "lengths": lengths}
        card = memory_plan.card(gpu)
        now = memory_plan.plan(read, card, **rows)
        largest = memory_plan.largest_micro_batch(read, card, **rows)
    with console.status("Trying what would help"):
        helps = memory_plan.suggestions(read, now, **rows)
    report = _report(read, now, largest, helps, changes, measured=data)
    if plot is not None:
        _draw(now, plot)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        _show(report, now, helps, console)
    if strict and not now.fits:
        raise typer.Exit(3)


def _measured_lengths(recipe: Recipe) -> Lengths:
    """The longest rows of the data, tokenised for both models by axolotl."""
    from dwakd_plugin.models.batches import teacher_columns
    from dwakd_plugin.plan import Lengths
    from dwakd_plugin.train.open_run import open_rows

    longest, teachers = [0, 0, 0, 0], range(len(recipe.config.each_teacher))
    with open_rows(recipe) as (_, datasets, _):
        for dataset, number in product(filter(None, datasets), teachers):
            (ids, labels), own = teacher_columns(number), ("input_ids", "labels")
            columns = (own[0], ids, own[1], labels)
            for row in dataset.select_columns(list(columns)).with_format(None):
                sizes = [len(row[name]) for name in columns[:2]]
                sizes += [sum(label != -100 for label in row[name][1:]) for name in columns[2:]]
                longest = [max(pair) for pair in zip(longest, sizes, strict=True)]
    if min(longest) == 0:
        raise UserError("The data has no row with a response on both sides, so there is no length.")
    return Lengths(*longest)


def _local_rows(recipe: Recipe) -> int | None:
    """Rows of the training data, where all of it lies in local files that are quickly counted."""
    total = 0
    for dataset in recipe.datasets:
        file = Path(str(dataset.get("path")))
        if not file.is_file():
            return None
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                total += sum(bool(line.strip()) for line in lines)
        elif file.suffix == ".parquet":
            from pyarrow import parquet

            total += parquet.ParquetFile(file).metadata.num_rows
        else:
            return None
    held_out = recipe.keys.get("val_set_size") or 0
    return total - int(held_out * total if held_out < 1 else held_out)


def _steps(recipe: Recipe, rows: int | None) -> int | None:
    """Optimizer steps of one process; None where the recipe and local data do not say."""
    if (steps := int(recipe.keys.get("max_steps") or 0)) > 0:
        return steps
    if rows is None or recipe.packs:
        return None
    per_step = recipe.micro_batch_size * recipe.accumulation_steps
    return math.ceil(rows / per_step * float(recipe.keys.get("num_epochs") or 1))


def _report(
    recipe: Recipe,
    now: Plan,
    largest: int,
    helps: list[Suggestion],
    changes: list[str],
    *,
    measured: bool,
) -> dict[str, Any]:
    rows = _local_rows(recipe)
    steps = _steps(recipe, rows)
    lengths = now.lengths
    several = {
        name: {
            "teacher": own.model,
            "weight_bytes": round(own.weights),
            "parameters": own.parameters,
            "cache_bytes_per_row": round(own.cache_bytes_per_row),
        }
        for name, own in now.teachers.items()
    }
    return {
        "student": recipe.base_model,
        "teacher": now.teacher_name,
        "fits": now.fits,
        "total_bytes": round(now.total),
        "parts": {name: round(size) for name, size in now.parts.items()},
        "largest_micro_batch": largest,
        "micro_batch": now.micro_batch,
        "peak": now.peak,
        "parts_at_most": {name: round(size) for name, size in now.largest.items()},
        "card": now.card.name,
        "card_bytes": now.card.capacity,
        "usable_bytes": round(now.card.usable),
        "student_parameters": now.student_parameters,
        "trained_parameters": now.trained_parameters,
        "teacher_parameters": now.teacher_parameters,
        **({"teachers": several} if several else {}),
        "tokens": {
            "student": lengths.student,
            "teacher": lengths.teacher,
            "student_response": lengths.student_response,
            "teacher_response": lengths.teacher_response,
            "from": "the longest rows of the data" if measured else "sequence_len: the worst case",
        },
        "seconds_per_step": round(now.seconds_per_step, 4),
        "steps": steps,
        "hours": None if steps is None else round(steps * now.seconds_per_step / 3600, 3),
        "cache_bytes_per_row": round(now.cache_bytes_per_row),
        "cache_bytes": None if rows is None else round(rows * now.cache_bytes_per_row),
        "suggestions": [
            {
                "title": one.title,
                "saves_bytes": round(one.saves),
                "yaml": one.yaml,
                "fits": one.fits,
            }
            for one in helps
        ],
        "assumptions": [now.card.note, *now.assumptions, *changes],
    }


# What is shown ------------------------------------------------------------------------------


def _size(size: float) -> str:
    if size >= GIB / 10:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _show(
    report: dict[str, Any], now: Plan, helps: list[Suggestion], console: PlainConsole
) -> None:
    verdict = Text("fits", "green") if now.fits else Text("does not fit", "bold red")
    console.print(
        Text(f"{_size(now.total)} for a micro-batch of {now.micro_batch}: ")
        + verdict
        + f" in {_size(now.card.usable)} usable of {now.card.name} ({_size(now.card.capacity)})."
    )
    console.print(_bar(now, max(20, min(console.width, 100) - 2)))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("part")
    table.add_column("at the peak", justify="right")
    table.add_column("at most", justify="right")
    for index, (name, most) in enumerate(now.largest.items()):
        glyph = Text(_GLYPHS[index % len(_GLYPHS)], style=_COLOURS[index % len(_COLOURS)])
        size = now.parts.get(name, 0)
        table.add_row(glyph, name, _size(size) if size else "–", _size(most))
    console.print(table)
    console.print(f"The peak is {now.peak}.")
    console.print(
        f"Largest micro-batch that fits: {report['largest_micro_batch'] or 'none'}."
        + (" (The search ends there.)" if report["largest_micro_batch"] >= 4096 else "")
    )
    _show_facts(report, now, console)
    if helps:
        console.print("\nWhat would help, each by itself:")
        for one in helps:
            fits = "" if now.fits else ("; then it fits" if one.fits else "; not enough alone")
            console.print(f"{_size(one.saves):>9}  {one.title}{fits}")
            console.print(Text("\n".join(" " * 11 + line for line in one.yaml.splitlines())))
        console.print()
    console.print("Assumed: " + "; ".join(report["assumptions"]) + ".", style="dim")


def _show_facts(report: dict[str, Any], now: Plan, console: PlainConsole) -> None:
    step = f"{now.seconds_per_step:.2g} s an optimizer step"
    if report["steps"] is not None:
        step += f", {report['steps']:,} steps, about {_hours(report['hours'])} in all"
    console.print(f"Time: {step}; a rough estimate, rather too short.")
    lengths = now.lengths
    console.print(
        f"Rows of {lengths.student} student and {lengths.teacher} teacher tokens "
        f"({lengths.student_response} and {lengths.teacher_response} of response), from "
        f"{report['tokens']['from']}."
    )
    cache = f"{_size(now.cache_bytes_per_row)} a row"
    if report["cache_bytes"] is not None:
        cache += f", {_size(report['cache_bytes'])} in all"
    whose = "A teacher cache" if not now.teachers else "Caches of all teachers"
    console.print(f"{whose} would take {cache} on disk, at most.")


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _bar(now: Plan, width: int) -> Text:
    """The parts side by side, against what the card has."""
    scale = width / max(now.total, now.card.usable)
    bar, drawn, reached = Text(), 0, 0.0
    names = list(now.largest)
    for name, size in now.parts.items():
        reached += size
        cells = round(reached * scale) - drawn
        index = names.index(name)
        bar.append(_GLYPHS[index % len(_GLYPHS)] * cells, style=_COLOURS[index % len(_COLOURS)])
        drawn += cells
    limit = round(now.card.usable * scale)
    if drawn < limit:
        bar.append("·" * (limit - drawn), style="dim")
    bar.append("\n" + " " * max(0, limit - 1) + "┘", style="dim")
    return bar


def _draw(now: Plan, file: Path) -> None:
    """The same picture as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from dwakd_plugin.io.files import explaining_writes, whole_file

    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    left = 0.0
    for name, size in now.parts.items():
        axes.barh(0, size / GIB, left=left, label=f"{name}, {_size(size)}")
        left += size / GIB
    axes.axvline(now.card.usable / GIB, color="black", linestyle="--", label="usable")
    axes.set(yticks=[], xlabel="GiB", title=f"{_size(now.total)} on {now.card.name}")
    figure.legend(ncols=3, fontsize="small", loc="outside lower center")
    try:
        with explaining_writes(f"--plot {file}"), whole_file(file) as partial:
            figure.savefig(partial, format="png", dpi=150)
    finally:
        pyplot.close(figure)
