"""`dwakd check`: is this pair of tokenizers fit for distillation, and what should be known of it?

Needs the tokenizers alone: no weights are loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import JsonReport
from dwakd_plugin.errors import UserError

if TYPE_CHECKING:
    from dwakd_plugin.tokenizers.pair import PairCut
    from dwakd_plugin.tokenizers.verdict import Side

_DRAWN_CHARACTERS = 240
_STYLES = {
    "good": "green",
    "workable": "yellow",
    "poor": "red",
    "info": "cyan",
    "warning": "yellow",
    "problem": "red",
}


def check(
    teacher: Annotated[
        str | None, typer.Argument(help="The teacher's folder or hub id; with --data the recipe's.")
    ] = None,
    student: Annotated[
        str | None, typer.Argument(help="The student's folder or hub id; with --data the recipe's.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE",
            help="Also compare what both models would be given of each of a recipe's rows.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Your data: one text a line, or JSONL with text, instruction/output or messages. "
            "Default: a built-in sample of 16 languages, code and numbers."
        ),
    ] = None,
    show: Annotated[
        str | None, typer.Option(help="Draw this text's tokens instead of the first text's.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the tokens into a PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it all as an HTML page.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if the verdict is poor.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let the tokenizers' repositories run code."),
    ] = False,
    json_output: JsonReport = False,
) -> None:
    """Tell whether two tokenizers are fit for distillation, before any weight is loaded.

    Compares the vocabularies and how both cut the same texts, in bytes; looks at special tokens,
    chat templates, normalisation, digits, white space and languages; says what to do about each
    finding, and draws both cuts of a text. Verdict: good, workable or poor.

    With --data both are the recipe's, and its rows are rendered by both chat templates: how many
    have the same answers on both sides, how the others differ, and an example each.

    Exit codes: 0 checked, whatever the verdict; 1 an error; 3 with --strict, a poor verdict.
    """
    from dwakd_plugin.io.files import explaining_writes, replace_file
    from dwakd_plugin.tokenizers.texts import read_texts, refuse_surrogates

    own = None if texts is None else read_texts(texts)
    recipe = None
    if data is not None:
        from dwakd_plugin.recipe import Recipe

        recipe = Recipe.read(data, {} if teacher is None else {"base_model": teacher})
        recipe.check_one_teacher("dwakd check --data", "TEACHER: ")
        named = recipe.config.teacher
        teacher, student = named.tokenizer or named.base_model, student or recipe.tokenizer
        trust_remote_code = trust_remote_code or named.trust_remote_code
    if teacher is None or student is None:
        raise UserError("Give TEACHER and STUDENT, or a recipe that names both: --data RECIPE.")
    if show is not None:
        refuse_surrogates(show, "The text of --show")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    # Without Rich's colours for any number: colour means something here.
    console = PlainConsole(stderr=json_output)
    with console.status("Loading both tokenizers"):
        from dwakd_plugin.tokenizers.loading import without_torch
        from dwakd_plugin.tokenizers.side import examine, load_side

        if recipe is None and not trust_remote_code:  # axolotl's strategies need it, own code may
            without_torch()
        teaching = load_side("teacher", teacher, trust_remote_code)
        learning = (
            teaching._replace(role="student")  # one load serves both
            if student == teacher
            else load_side("student", student, trust_remote_code)
        )
    with console.status("Cutting texts with both"):
        from dwakd_cli.sample_texts import SAMPLE

        report = {
            "teacher": teacher,
            "student": student,
            "texts_from": "built-in sample" if texts is None else str(texts),
            **examine(teaching, learning, own, SAMPLE),
        }
        pictures = pictures_of(teaching, learning, own, show)
    if recipe is not None:
        from dwakd_cli.row_check import rows_of

        with console.status("Rendering the rows for both"):
            report["rows"] = rows_of(recipe, learning.tokenizer, teaching.tokenizer)
    if not pictures and (png or html or show):
        raise UserError("There is no text to draw that both tokenizers have tokens for.")
    if png or html:
        from dwakd_cli.token_picture import html_page, png_image

        if png:
            with explaining_writes(png):
                replace_file(png, png_image(pictures[0][1], (teacher, student)))
        if html:
            tokenizers = (teaching.tokenizer, learning.tokenizer)
            page = html_page(report, figure_rows(report), pictures, tokenizers)
            with explaining_writes(html):
                replace_file(html, page)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        _show(report, pictures[0][1] if pictures else None, console)
        if recipe is not None:
            from dwakd_cli.row_check import show_rows

            show_rows(report["rows"], console)
    if strict and report["verdict"] == "poor":
        raise typer.Exit(3)


def pictures_of(
    teacher: Side, student: Side, texts: Sequence[str] | None, drawn_text: str | None
) -> list[tuple[str, PairCut]]:
    """(title, cut text) of the texts to draw: the one asked for, or the user's first ten, or the
    sample's first of each group; none that a tokenizer has no tokens for."""
    from dwakd_cli.sample_texts import SAMPLE
    from dwakd_plugin.tokenizers.pair import cut_both

    if drawn_text is not None:
        drawn = {"The text given": drawn_text}
    elif texts is not None:
        drawn = {f"Text {number}": text for number, text in enumerate(texts[:10], 1)}
    else:
        # The first is drawn in the terminal, and in numbers tokenizers differ most.
        drawn = {name: SAMPLE[name][0] for name in ["Numbers", *SAMPLE]}
    cuts = cut_both(
        teacher.cutter, student.cutter, [text[:_DRAWN_CHARACTERS] for text in drawn.values()]
    )
    return [
        (title, pair)
        for title, pair in zip(drawn, cuts, strict=True)
        if pair is not None and pair.teacher.ends and pair.student.ends
    ]


def figure_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The main figures as people read them."""

    def share(name: str) -> str:
        return "-" if report[name] is None else f"{report[name]:.1%}"

    def head(side: str) -> str:
        rows = report[f"{side}_head_rows"]
        return "" if rows is None else f", head {rows:,} rows"

    ratio = report["length_ratio"]
    left_out = ", ".join(
        f"{report[f'texts_{what}']:,} {how}"
        for what, how in (("normalised", "as normalised"), ("left_out", "left out"))
        if report[f"texts_{what}"]
    )
    return [
        ("teacher's tokens", f"{report['teacher_vocab_size']:,}{head('teacher')}"),
        ("student's tokens", f"{report['student_vocab_size']:,}{head('student')}"),
        (
            "shared tokens, as bytes",
            f"{report['shared_tokens_bytes']:,} "
            f"({report['shared_tokens_bytes_share_of_student']:.0%} of the student's); "
            f"{report['shared_tokens_read']:,} of them in the student's own cuts",
        ),
        ("shared tokens, as strings", f"{report['shared_tokens_exact']:,}"),
        (
            "texts compared",
            f"{report['texts_compared']:,} from {report['texts_from']}"
            + (f" ({left_out})" if left_out else ""),
        ),
        (
            "student tokens per teacher token",
            f"{ratio['mean']:.2f} (90 % of texts: {ratio['p5']:.2f} to {ratio['p95']:.2f})"
            if ratio
            else "-",
        ),
        ("student's token ends shared", share("boundary_agreement_student")),
        ("teacher's token ends shared", share("boundary_agreement_teacher")),
        ("student's tokens identical in place", share("identical_span_share")),
    ]


def _show(report: dict[str, Any], drawn: PairCut | None, console: PlainConsole) -> None:
    """Figures, languages, a picture, findings, and the verdict last, where the eye is."""
    from dwakd_cli.token_picture import terminal_rows

    table = Table(title="Tokenizer pair", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    table.add_row("teacher", report["teacher"])
    table.add_row("student", report["student"])
    for row in figure_rows(report):
        table.add_row(*row)
    console.print(table)
    if report["texts_from"] == "built-in sample":
        languages = Table(
            title="Tokens by language and format",
            box=box.SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
        )
        languages.add_column("", overflow="fold")
        for column in ("teacher", "student", "ratio", "same"):
            languages.add_column(column, justify="right", no_wrap=True)
        for name, group in report["sample"].items():
            ratio, identical = group["length_ratio"], group["identical_span_share"]
            languages.add_row(
                name,
                str(group["teacher_tokens"]),
                str(group["student_tokens"]),
                "-" if ratio is None else f"{ratio:.2f}",
                "-" if identical is None else f"{identical:.0%}",
            )
        console.print(languages)
    if drawn is not None:
        console.print()
        for line in terminal_rows(drawn, console.width):
            console.print(line, no_wrap=True, overflow="crop")
        plain = console.no_color or console.color_system is None
        colours = "" if plain else "; green: the same token on both sides"
        console.print(f"│ ends a token, ┆ within a character{colours}\n")
    for finding in report["findings"]:
        console.print(
            Text(f"{finding['severity']}  ", style=_STYLES[finding["severity"]])
            + Text(finding["message"], style="default")
            + Text(f"  [{finding['code']}]", style="dim")
        )
    verdict = report["verdict"]
    console.print(Text(f"\nVerdict: {verdict}", style=f"bold {_STYLES[verdict]}"))
    for reason in report["verdict_reasons"]:
        console.print(f"  {reason}")
    if report["texts_from"] == "built-in sample":
        console.print("  The sample has many languages: --texts FILE measures your own data.")
