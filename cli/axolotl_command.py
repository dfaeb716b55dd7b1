"""`axolotl distill`: `dwakd train` within axolotl's own command line."""

from __future__ import annotations

from functools import wraps
from typing import Any

import typer

from dwakd_cli.boundary import error_boundary
from dwakd_cli.train import train


@wraps(train)
def _distill(*args: Any, **kwargs: Any) -> None:
    with error_boundary():
        train(*args, **kwargs)


_app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_app.command("distill", epilog="Example:  axolotl distill sft.yml --teacher Qwen/Qwen1.5-1.8B")(
    _distill
)
# A click command, which is what axolotl's entry-point group `axolotl.cli_commands` takes.
distill = typer.main.get_command(_app)
