"""The `dwakd` command: its subcommands, and the one place where errors become messages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import dwakd_plugin
from dwakd_plugin.config import UserError

app = typer.Typer(
    name="dwakd",
    help="Cross-tokenizer knowledge distillation for axolotl.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dwakd {dwakd_plugin.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", is_eager=True)
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """`debug` and `version` act before any subcommand runs."""


@app.command(
    epilog="Example:  dwakd quickstart --folder /tmp/quickstart",
)
def quickstart(
    folder: Annotated[
        Path, typer.Option(help="Where models, data, recipes and results go.")
    ] = Path("quickstart"),
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of tables.")
    ] = False,
) -> None:
    """Distil a real teacher into a small student on this machine's CPU, in minutes.

    Prepares SmolLM2-135M-Instruct as the teacher and a 5M-parameter student with a tokenizer of its
    own, takes Python's own documentation as data, and trains with axolotl: once without a teacher,
    once with. Ends with a table of the student's held-out loss before and after each. A second call
    goes on where the first one stopped.
    """
    from dwakd_cli.quickstart import run

    run(folder, json_output=json_output)


@app.command(
    epilog="Example:  dwakd check Qwen/Qwen1.5-1.8B openai-community/gpt2 --texts train.jsonl",
)
def check(
    teacher: Annotated[str, typer.Argument(help="The teacher's folder or hub id.")],
    student: Annotated[str, typer.Argument(help="The student's folder or hub id.")],
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
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page with all.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if the verdict is poor.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let the tokenizers' repositories run code."),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Tell whether two tokenizers are fit for distillation, before any weight is loaded.

    Compares the vocabularies and how both cut the same texts, in bytes; looks at special tokens,
    chat templates, normalisation, digits, white space and languages; says what to do about each
    finding, and draws both cuts of a text. Verdict: good, workable or poor.

    Exit codes: 0 checked, whatever the verdict; 1 an error; 3 with --strict, a poor verdict.
    """
    from dwakd_cli.check import run

    verdict = run(
        teacher,
        student,
        texts_file=texts,
        drawn_text=show,
        png=png,
        html=html,
        trust_remote_code=trust_remote_code,
        json_output=json_output,
    )
    if strict and verdict == "poor":
        raise typer.Exit(3)


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 an error with a message, 130 interrupted."""
    try:
        app()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.secho("Interrupted.", err=True)
        sys.exit(130)
