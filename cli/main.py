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
