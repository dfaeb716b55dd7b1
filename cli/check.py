"""`dwakd check`: is this pair of tokenizers fit for distillation, and what should be known of it?

Needs the tokenizers alone: no weights are loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_cli.sample_texts import SAMPLE
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes, replace_file, user_path

if TYPE_CHECKING:
    from dwakd_plugin.tokenizers.pair import PairCut
    from dwakd_plugin.tokenizers.verdict import Side

# What a folder with a tokenizer has at least one of.
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")
_DRAWN_CHARACTERS = 240
_STYLES = {
    "good": "green",
    "workable": "yellow",
    "poor": "red",
    "info": "cyan",
    "warning": "yellow",
    "problem": "red",
}


def run(
    teacher_name: str,
    student_name: str,
    *,
    texts_file: Path | None,
    drawn_text: str | None,
    png: Path | None,
    html: Path | None,
    trust_remote_code: bool,
    json_output: bool,
) -> str:
    """Checks the pair, reports and draws; returns the verdict.

    Raises UserError for a tokenizer that cannot be loaded or compared, for a texts file that cannot
    be read, and for a picture that cannot be drawn or written.
    """
    texts = None if texts_file is None else read_texts(texts_file)
    if drawn_text is not None:
        _refuse_surrogates(drawn_text, "The text of --show")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    # Without Rich's colours for any number: colour means something here.
    console = PlainConsole(stderr=json_output)
    with console.status("Loading both tokenizers"):
        teacher = load_side("teacher", teacher_name, trust_remote_code)
        student = load_side("student", student_name, trust_remote_code)
    with console.status("Cutting texts with both"):
        names = {"teacher": teacher_name, "student": student_name}
        source = "built-in sample" if texts_file is None else str(texts_file)
        report = names | {"texts_from": source} | examine(teacher, student, texts)
        pictures = pictures_of(teacher, student, texts, drawn_text)
    if not pictures and (png or html or drawn_text):
        raise UserError("There is no text to draw that both tokenizers have tokens for.")
    if png or html:
        from dwakd_cli.token_picture import html_page, png_image

        if png:
            with explaining_writes(png):
                replace_file(png, png_image(pictures[0][1], (teacher_name, student_name)))
        if html:
            tokenizers = (teacher.tokenizer, student.tokenizer)
            page = html_page(report, figure_rows(report), pictures, tokenizers)
            with explaining_writes(html):
                replace_file(html, page)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        show(report, pictures[0][1] if pictures else None, console)
    verdict: str = report["verdict"]
    return verdict


def load_side(role: Literal["teacher", "student"], name: str, trust_remote_code: bool) -> Side:
    """Loads one side's tokenizer from a folder or the hub, and reads the rows of its model's head
    where a config.json lies beside it.

    Raises UserError where there is no tokenizer, or none that can be compared.
    """
    folder = user_path(name)
    if folder.is_dir():
        if not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
            raise UserError(
                f"The {role}'s folder {name} has no tokenizer (no tokenizer.json, tokenizer.model "
                "or vocabulary). Give the folder that `tokenizer.save_pretrained` wrote to, or a "
                "hub id."
            )
        name = str(folder)
    elif folder.exists():
        raise UserError(f"The {role} {name} is a file. Give the folder that it lies in.")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"The {role}'s folder {name} does not exist. Give a folder or a hub id.")

    from transformers.utils import logging

    from dwakd_plugin.tokenizers.loading import load_tokenizer
    from dwakd_plugin.tokenizers.pair import ByteCutter
    from dwakd_plugin.tokenizers.verdict import Side

    logging.set_verbosity_error()
    title = f"The {role}'s tokenizer `{name}`"
    tokenizer = load_tokenizer(
        name,
        title,
        "Give a folder that AutoTokenizer can load, or a hub id (name/model).",
        trust_remote_code=trust_remote_code,
    )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{title} ({type(tokenizer).__name__}) is a slow one, in Python "
            "alone. Convert it to a tokenizer.json first (transformers' convert_slow_tokenizer), "
            "or choose a model that ships one."
        )
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
        raise UserError(
            f"{title} has no vocabulary but its special tokens: its "
            "tokenizer.json or vocabulary file is missing."
        )
    return Side(role, tokenizer, ByteCutter(tokenizer, role), head_rows(name))


def head_rows(name: str) -> int | None:
    """`vocab_size` of the config.json beside a tokenizer; None where there is none."""
    from transformers.utils import cached_file

    file = cached_file(
        name,
        "config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is no model configuration: it holds no JSON object.")
    text_config = config.get("text_config") or {}
    rows = config.get("vocab_size", text_config.get("vocab_size"))
    return rows if isinstance(rows, int) else None


def read_texts(file: Path) -> list[str]:
    """Texts of a file: one a line, or JSONL with `text`, `instruction`/`input`/`output` or
    `messages`. Lines without a text in plain files are passed over.

    Raises UserError for a file that cannot be read, is not UTF-8, has no text, or has a JSONL line
    without one.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line}. Convert it first, "
            "for example with iconv."
        ) from error
    lines = [
        (number, line.removesuffix("\r"))
        for number, line in enumerate(content.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise UserError(f"{file} has no text: it is empty.")
    if file.suffix.lower() not in (".jsonl", ".ndjson") and not _is_row(lines[0][1]):
        return [line for _, line in lines]
    texts = [_text_of_row(file, number, line) for number, line in lines]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{file} has no text: all of its rows are empty.")
    return texts


def _is_row(line: str) -> bool:
    """Whether a line of a file of any name is a JSONL row (and not, say, code that is the text)."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint(("text", "output", "messages"))


def _text_of_row(file: Path, number: int, line: str) -> str:
    wanted = (
        'A row is one JSON object a line with a `text`, for example {"text": "One text."}; '
        "instruction/input/output and messages are read too."
    )
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"Line {number} of {file} is not JSON: {error}. {wanted}") from error
    parts: list[Any] = []
    if isinstance(row, dict):
        if "text" in row:
            parts = [row["text"]]
        elif "output" in row:
            parts = [row.get(key) or "" for key in ("instruction", "input")] + [row["output"]]
        elif isinstance(row.get("messages"), list):
            parts = [each.get("content") for each in row["messages"] if isinstance(each, dict)]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise UserError(f"Line {number} of {file} has no text. {wanted}")
    text = "\n".join(part for part in parts if part)
    _refuse_surrogates(text, f"Line {number} of {file}")
    return text


def _refuse_surrogates(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has a lone surrogate ({text[error.start]!r}), which is no character and has "
            "no bytes. Leave it out, or write the character out."
        ) from error


def examine(teacher: Side, student: Side, texts: Sequence[str] | None) -> dict[str, Any]:
    """All figures, findings and the verdict; texts None: over the built-in sample."""
    from dwakd_plugin.tokenizers.figures import measure, vocabulary_figures
    from dwakd_plugin.tokenizers.findings import findings_of
    from dwakd_plugin.tokenizers.verdict import verdict_of

    vocabulary = vocabulary_figures(teacher.tokenizer, student.tokenizer)
    groups = {
        name: measure(teacher.cutter, student.cutter, group) for name, group in SAMPLE.items()
    }
    all_sample = [text for group in SAMPLE.values() for text in group]
    figures = measure(teacher.cutter, student.cutter, all_sample if texts is None else texts)
    findings = findings_of(
        teacher, student, vocabulary, figures, groups, own_texts=texts is not None
    )
    totals = figures.as_dict()
    verdict, reasons = verdict_of(totals, findings)
    sample = {}
    for name, group in groups.items():
        counted = group.as_dict()
        sample[name] = {key: counted[key] for key in ("teacher_tokens", "student_tokens")} | {
            "length_ratio": (counted["length_ratio"] or {}).get("corpus"),
            "identical_span_share": counted["identical_span_share"],
        }
    return {
        "verdict": verdict,
        "verdict_reasons": reasons,
        **vocabulary,
        "teacher_head_rows": teacher.head_rows,
        "student_head_rows": student.head_rows,
        **totals,
        "sample": sample,
        "findings": [finding._asdict() for finding in findings],
    }


def pictures_of(
    teacher: Side, student: Side, texts: Sequence[str] | None, drawn_text: str | None
) -> list[tuple[str, PairCut]]:
    """(title, cut text) of the texts to draw: the one asked for, or the user's first ten, or the
    sample's first of each group; none that a tokenizer has no tokens for."""
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
            f"({report['shared_tokens_bytes_share_of_student']:.0%} of the student's)",
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


def show(report: dict[str, Any], drawn: PairCut | None, console: PlainConsole) -> None:
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
