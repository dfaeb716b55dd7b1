"""`dwakd cache`: the teacher reads each row once, and what it says is kept for training."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import JsonReport, LoadIn4Bit, LoadIn8Bit, RecipeFile, Teacher, of_teacher
from dwakd_cli.terminal import progress_bar
from dwakd_plugin.errors import UserError

if TYPE_CHECKING:
    from dwakd_plugin.recipe.schema import TeacherConfig


def cache(
    recipe: RecipeFile,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the states; overrides the recipe's. By default it lies beside "
            "OUTPUT_DIR and is named after it.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float8_e4m3"] | None,
        typer.Option(help="How to keep the states; auto: as computed.", show_default="auto"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep so many of the likeliest tokens of each position, 6 bytes each, instead of "
            "states: for variant `mapped`.",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that the teacher reads at once.", show_default="2048"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute nothing: compare every checksum.")
    ] = False,
    json_output: JsonReport = False,
) -> None:
    """Let the teacher read every row once, and keep its states or likeliest tokens for training.

    Training from the cache loads the teacher's head and embeddings and never its body; with
    --top-k, which keeps probabilities, nothing but its tokenizer. Says what it takes on disk before
    it begins. Ctrl-C exits with 130; the same command goes on from there,
    and adds the rows that the recipe has got since.

    Of several teachers those that name a cache, one after another; all, where none does.
    """
    from dwakd_plugin.recipe import Recipe

    given = of_teacher(teacher, load_in_8bit, load_in_4bit, teacher_cache)
    if dtype:
        given["cache_dtype"] = dtype
    if top_k:
        given["top_k"] = top_k
    console = PlainConsole(stderr=json_output, soft_wrap=True)
    read = Recipe.read(recipe, given)
    for change in read.changes:
        console.print(change, style="yellow")
    named = read.written("teachers") is not None
    if all(one.cache is None for one in read.config.each_teacher):
        for number, one in enumerate(read.config.each_teacher):
            own = f"{read.output_dir.name}-{one.name}-cache"  # the only one is called `teacher`
            read = read.with_teacher(number, cache=str(read.output_dir.with_name(own)))
    console.print("Preparing the rows ...")
    from dwakd_plugin.train.open_run import open_rows

    reports = {}
    with open_rows(read) as (config, datasets, _):
        from dwakd_plugin.models.teacher.cached import teacher_rows

        for number, one in enumerate(config.each_teacher):
            if one.cache is not None:
                rows = teacher_rows(*datasets, number=number)
                reports[one.name] = _cache(one, rows, batch_tokens, verify, console)
                gc.collect()  # its body goes before the next one comes
    if json_output:
        (only, *others) = reports.values()
        print(json.dumps({"teachers": reports} if others else only, indent=1))
        return
    for report in reports.values():
        _show(report, console)
    if not verify:
        _show_lines(reports, given, named, console)


def _cache(
    config: TeacherConfig,
    rows: list[Any],
    batch_tokens: int | None,
    verify: bool,
    console: PlainConsole,
) -> dict[str, Any]:
    """Fills or verifies with a teacher's ids and labels of all rows; returns the report."""
    import torch

    from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
    from dwakd_plugin.models.teacher.cached import (
        BATCH_TOKENS,
        check_disk,
        disk_need,
        fill,
        missing_rows,
        open_cache,
        readable_size,
        token_bytes,
    )

    started = time.monotonic()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    tokenizer = load_teacher_tokenizer(config)
    cache = open_cache(config, device, tokenizer)
    missing = missing_rows(cache, rows)
    report: dict[str, Any] = {
        "folder": str(cache.folder),
        "teacher": config.called,
        "precision": cache.identity["precision"],
        "attention": None,
    }
    if verify:
        if not cache.has_weights:
            raise UserError(
                f"There is no teacher cache in {cache.folder} to verify. Run the command without "
                "--verify to make it."
            )
        with _progress(console, "Checksums (files)") as on_progress:
            cache.verify(on_progress)
    elif missing or not cache.has_weights:
        need = disk_need(config, device, cache, missing)
        free = check_disk(cache, need)
        console.print(
            f"{config.called}: {len(missing):,} of {len(rows):,} rows to compute. They take "
            f"{readable_size(need)} on disk, {token_bytes(config, device, cache):,} bytes a "
            f"response token; {readable_size(free)} are free."
        )
        with (
            cache.writing(wait=False),
            _words_when_stopped(cache, console),
            _progress(console, "What the teacher says (tokens)") as on_progress,
        ):
            # Another may have written some since.
            missing = missing_rows(cache, rows)
            loaded = fill(
                config,
                device,
                cache,
                missing,
                on_progress,
                batch_tokens or BATCH_TOKENS,
                tokenizer=tokenizer,
                say=console.print,
            )
        if loaded is not None:
            report |= {"precision": loaded.precision, "attention": loaded.attention}
    tokens = sum(int(labels[1:].ne(-100).sum()) for _, labels in rows)
    return report | {
        "dtype": None if cache.top_k else cache.dtype,
        "top_k": cache.top_k,
        "rows": len(rows),
        "rows_computed": 0 if verify else len(missing),
        "rows_missing": len(missing) if verify else 0,
        "response_tokens": tokens,
        "bytes": cache.bytes,
        "verified": verify,
        "seconds": round(time.monotonic() - started, 1),
    }


@contextmanager
def _progress(console: PlainConsole, title: str) -> Iterator[Any]:
    with progress_bar(console, count="{task.completed:,.0f}/{task.total:,.0f}") as progress:
        task = progress.add_task(title, total=1)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _words_when_stopped(cache: Any, console: PlainConsole) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print(
            f"Stopped. {len(cache):,} rows are in {cache.folder}; the same command goes on."
        )
        raise


def _show(report: dict[str, Any], console: PlainConsole) -> None:
    from dwakd_plugin.models.teacher.cached import readable_size

    size = readable_size(report["bytes"])
    console.print(
        f"Teacher    {report['teacher']}, {report['precision']}"
        + (f", attention {report['attention']}" if report["attention"] else "")
    )
    console.print(
        f"Cache      {report['folder']}: {report['rows'] - report['rows_missing']:,} of "
        f"{report['rows']:,} rows, {report['response_tokens']:,} response tokens, {size}"
    )
    if report["verified"]:
        console.print("Checksums  all match")
        if report["rows_missing"]:
            console.print(
                f"{report['rows_missing']:,} rows of the recipe are missing; the command "
                "without --verify adds them.",
                style="yellow",
            )
        return
    console.print(
        f"Computed   {report['rows_computed']:,} rows in {report['seconds']:.0f} s\n"
        if report["rows_computed"]
        else "Nothing to do: every row is there.\n"
    )


def _show_lines(
    reports: dict[str, Any], given: dict[str, Any], named: bool, console: PlainConsole
) -> None:
    """The recipe's lines; what the command line said of the teacher, the run has to know too.

    named: whether the recipe has `teachers`, whose names `--teacher` takes.
    """
    kept = all(report["top_k"] for report in reports.values())
    part = "nothing of the teacher is" if kept else "the teacher's body is not"
    console.print(f"Put this into the recipe, and {part} loaded in training:")
    console.print("dwakd:\n  teachers:" if named else "dwakd:\n  teacher:")
    for name, report in reports.items():
        lines = {"cache": report["folder"]} | given
        if named:
            lines = {"name": name} | lines
            lines.pop("base_model", None)
        block = yaml.safe_dump([lines] if named else lines, sort_keys=False)
        console.print(indent(block, "    "), end="")
