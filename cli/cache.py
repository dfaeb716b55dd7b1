"""`dwakd cache`: the teacher reads each row once, and its hidden states are kept for training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dwakd_cli.console import PlainConsole
from dwakd_cli.terminal import progress_bar
from dwakd_cli.train import read_recipe, with_distillation
from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.schema import TeacherConfig, parse_recipe
from dwakd_plugin.train.run_folder import output_folder


def run(
    recipe_file: Path,
    *,
    teacher: dict[str, Any],
    batch_tokens: int | None,
    verify: bool,
    json_output: bool,
) -> None:
    """Fills the cache of a recipe's teacher, or verifies it, and reports. Raises UserError.

    `teacher` holds what the command line says of it. Without a folder there or in the recipe, the
    cache goes beside the output folder.
    """
    console = PlainConsole(stderr=json_output, soft_wrap=True)
    recipe, changes = with_distillation(read_recipe(recipe_file), teacher)
    for change in changes:
        console.print(change, style="yellow")
    config = parse_recipe(recipe)
    assert config is not None  # with_distillation turned it on
    if config.teacher.cache is None:
        output = output_folder(recipe)
        teacher = teacher | {"cache": str(output.with_name(f"{output.name}-teacher-cache"))}
        recipe, _ = with_distillation(recipe, teacher)
    console.print("Preparing the rows ...")
    from dwakd_plugin.train.open_run import open_rows

    with open_rows(recipe) as (config, datasets):
        report = _cache(config.teacher, datasets, batch_tokens, verify, console)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        _show(report, teacher, console)


def _cache(
    config: TeacherConfig,
    datasets: list[Any],
    batch_tokens: int | None,
    verify: bool,
    console: PlainConsole,
) -> dict[str, Any]:
    """Fills or verifies; returns the report."""
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
        teacher_rows,
    )

    started = time.monotonic()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    cache = open_cache(config, device, load_teacher_tokenizer(config))
    rows = teacher_rows(*datasets)
    missing = missing_rows(cache, rows)
    report: dict[str, Any] = {
        "folder": str(cache.folder),
        "teacher": config.base_model,
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
            f"{len(missing):,} of {len(rows):,} rows to compute. They take {readable_size(need)} "
            f"on disk; {readable_size(free)} are free."
        )
        with (
            cache.writing(wait=False),
            _words_when_stopped(cache, console),
            _progress(console, "Teacher states (tokens)") as on_progress,
        ):
            # Another may have written some since.
            missing = missing_rows(cache, rows)
            loaded = fill(config, device, cache, missing, on_progress, batch_tokens or BATCH_TOKENS)
        if loaded is not None:
            report |= {"precision": loaded.precision, "attention": loaded.attention}
    tokens = sum(int(labels[1:].ne(-100).sum()) for _, labels in rows)
    return report | {
        "dtype": cache.dtype,
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


def _show(report: dict[str, Any], teacher: dict[str, Any], console: PlainConsole) -> None:
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
    # What the command line said of the teacher, the run has to know too.
    lines = {"cache": report["folder"]} | teacher
    console.print("Put this into the recipe, and the teacher's body is not loaded in training:")
    block = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in lines.items())
    console.print(f"dwakd:\n  teacher:\n{block}", end="")
