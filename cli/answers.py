"""`dwakd answers`: the teacher answers the prompts of a recipe's rows, and they become rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.table import Table

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import JsonReport, LoadIn4Bit, LoadIn8Bit, RecipeFile, Teacher, of_teacher
from dwakd_cli.terminal import progress_bar

if TYPE_CHECKING:
    from dwakd_plugin.evaluate.teacher_answers import Begin, Order
    from dwakd_plugin.recipe import Recipe

_FEW_END = 0.5  # share of answers below which the report says what may be wrong


def answers(
    recipe: RecipeFile,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the rows, ending in .jsonl. By default it lies beside OUTPUT_DIR and is "
            "named after it."
        ),
    ] = None,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    samples: Annotated[
        int, typer.Option("--samples", "-n", metavar="N", help="Answers to each prompt.")
    ] = 1,
    keep: Annotated[
        Literal["all", "shortest", "likeliest"],
        typer.Option(
            metavar="WHICH",
            help="Of a prompt's answers: all, the shortest (tokens), or the likeliest (highest "
            "mean log-probability a token).",
        ),
    ] = "all",
    keep_unended: Annotated[
        bool, typer.Option("--keep-unended", help="Keep answers that never came to an end.")
    ] = False,
    with_labels: Annotated[
        bool,
        typer.Option("--with-labels", help="Write each row's own answer beside the teacher's."),
    ] = False,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="From 0, which takes the most likely token.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(metavar="X", help="From 0.01 to 1, which samples from all tokens.")
    ] = 0.95,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest answer in the teacher's tokens.")
    ] = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="Another one draws other answers.")] = 42,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Answers made at once. Default: 64 on a GPU, 8 on a CPU."
        ),
    ] = None,
    backend: Annotated[
        Literal["auto", "transformers", "vllm"],
        typer.Option(
            metavar="NAME",
            help="transformers or vllm (run on CPUs). auto: vllm where it is installed.",
        ),
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Replace answers that were made otherwise.")
    ] = False,
    json_output: JsonReport = False,
) -> None:
    """Let the teacher answer the recipe's prompts, as rows to train on.

    The rows come out as they went in, with the teacher's answer in place of their own: the last
    turn of a conversation, the output field of an instruction. All else in them stays, so that the
    recipe trains on them unchanged. Rows that the recipe evaluates on are never answered.

    Ends with the lines for the recipe; `dwakd train --answers` does both. Samples are kept as they
    are made: after Ctrl-C or a kill the same command goes on, to the same file. Does nothing where
    the rows are there and what they were made of has not changed.

    Exit codes: 0 answered; 1 an error; 130 interrupted.
    """
    console = PlainConsole(stderr=json_output, soft_wrap=True)
    with console.status("Looking at the recipe and the teacher"):
        from dwakd_plugin.evaluate.teacher_answers import Order
        from dwakd_plugin.models.sampling import Sampling
        from dwakd_plugin.recipe import Recipe

        read = Recipe.read(recipe, of_teacher(teacher, load_in_8bit, load_in_4bit, None))
        read.check_one_teacher("dwakd answers")
        order = Order(
            recipe=_checked(read),
            out=out or default_out(read),
            samples=samples,
            sampling=Sampling(temperature, top_p, max_new_tokens),
            seed=seed,
            keep=keep,
            keep_unended=keep_unended,
            with_labels=with_labels,
            batch_size=batch_size,
            backend=backend,
            force=force,
        )
    report = answer_rows(order, console)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        _show(report, console)


def default_out(recipe: Recipe) -> Path:
    """Where the rows go unless told otherwise: beside the recipe's output folder."""
    return recipe.output_dir.with_name(f"{recipe.output_dir.name}-answers.jsonl")


def _checked(recipe: Recipe) -> Recipe:
    """The recipe, if a run could begin with it: in another folder, as this one isn't written to."""
    from dwakd_plugin.train.preflight import check_all

    check_all(recipe.but(output_dir=str(recipe.output_dir.with_name("none") / "none")))
    return recipe


def answer_rows(order: Order, console: PlainConsole) -> dict[str, Any]:
    """The report, after the answering where the rows aren't there. Raises UserError."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    with console.status("Looking at the recipe and the teacher"):
        from transformers.utils import logging

        from dwakd_plugin.evaluate.teacher_answers import answer, check_order

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        check_order(order)
    with _stages(console) as begin:
        try:
            return answer(order, begin)
        except KeyboardInterrupt:
            kept = order.files.samples
            if kept.exists():
                console.print(f"Stopped. The same command goes on: {kept} has the samples so far.")
            raise


def answers_for_training(
    recipe: Recipe, with_labels: bool, dry_run: bool, console: PlainConsole
) -> dict[str, Any]:
    """Keys of a recipe that trains on the teacher's answers, which are made where they lack.

    Answers of the same teacher and rows stay, whatever they were sampled with. Raises UserError.
    """
    from dwakd_plugin.evaluate.teacher_answers import Order, made_before

    order = Order(recipe=_checked(recipe), out=default_out(recipe), with_labels=with_labels)
    if dry_run:
        console.print(f"The teacher would answer the rows' prompts first: {order.out}.")
        return {}
    report = answer_rows(replace(made_before(order), with_labels=with_labels), console)
    if not report["skipped"]:
        _show(report, console, lines=False)
    return keys_of(report)


def keys_of(report: dict[str, Any]) -> dict[str, Any]:
    """A recipe's keys to train on the answers of a report, and to evaluate on what was held out."""
    keys: dict[str, Any] = {"datasets": report["datasets"]}
    if report["test_datasets"]:
        keys |= {"test_datasets": report["test_datasets"], "val_set_size": 0}
    return keys


@contextmanager
def _stages(console: PlainConsole) -> Iterator[Begin]:
    """One bar at a time, with words of its own behind the time left."""
    with progress_bar(console, "{task.description} {task.fields[note]}") as bars:
        shown: list[Any] = []

        def begin(title: str) -> Callable[..., None]:
            if shown:
                bars.remove_task(shown.pop())
            shown.append(bars.add_task(title, total=None, note=""))
            bar = shown[0]
            return lambda done, total, note="": bars.update(
                bar, completed=done, total=total, note=note
            )

        yield begin
        if shown:
            bars.remove_task(shown.pop())


def _show(report: dict[str, Any], console: PlainConsole, lines: bool = True) -> None:
    if report["skipped"]:
        console.print(f"Nothing to do: {report['out'][0]} was made of just this.")
    table = Table(title=f"Answers of {report['teacher']} to {report['prompts']:,} prompts")
    for title in ("", "sampled", "kept"):
        table.add_column(title, justify="right" if title else "left")

    def row(title: str, of: Callable[[str], str]) -> None:
        table.add_row(title, of(""), of("_kept"))

    table.add_row("answers", f"{report['answers']:,}", f"{report['kept']:,}")
    table.add_row("came to an end", f"{report['ended']:.1%}", "")
    row("tokens, mean", lambda which: f"{report['tokens' + which]['mean']:,.0f}")
    row("quartiles", lambda which: _quartiles(report["tokens" + which]["quartiles"]))
    row("longest", lambda which: f"{report['tokens' + which]['longest']:,}")
    row("log-probability a token", lambda which: f"{report['log_probability' + which]:.3f}")
    console.print(table)
    for line in _remarks(report):
        console.print(line, style="yellow")
    if report["tokens_per_second"]:
        console.print(f"{report['tokens_per_second']:,.0f} tokens/s, by {report['backend']}.")
    if lines:
        console.print(
            "Put this into the recipe in place of its own keys, or beside its `datasets` to train "
            "on both; `dwakd train --answers` does it by itself:"
            if not report["test_datasets"]
            else "Put this into the recipe in place of its own keys (--with-labels for both kinds "
            "of answers); `dwakd train --answers` does it by itself:"
        )
        print(yaml.safe_dump(keys_of(report), sort_keys=False, allow_unicode=True), end="")


def _quartiles(values: list[float]) -> str:
    return " / ".join(f"{value:,.0f}" for value in values)


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    """What was left out, and what looks wrong."""
    from dwakd_plugin.evaluate.answer_choice import DROPPED

    dropped = [
        f"{count:,} {DROPPED[reason]}" for reason, count in report["dropped"].items() if count
    ]
    if dropped:
        yield f"Of the answers, left out: {', '.join(dropped)}."
    if report["prompts_without_answer"]:
        yield f"Prompts without an answer to keep: {report['prompts_without_answer']:,}."
    left_out = [
        f"{count:,} {_LEFT_OUT[reason]}"
        for reason, count in report["rows_left_out"].items()
        if count
    ]
    if left_out:
        yield f"Rows left out: {', '.join(left_out)}."
    if report["ended"] < _FEW_END:
        yield (
            f"Only {report['ended']:.0%} of the answers came to an end: raise --max-new-tokens, or "
            "look whether this teacher was trained for chats (`dwakd adapt` teaches it the rows)."
        )


_LEFT_OUT = {
    "too_long": "with a prompt too long for sequence_len",
    "not_rendered": "whose last answer the teacher's chat template leaves out",
    "tool_call": "answered by a call of a tool",
}
