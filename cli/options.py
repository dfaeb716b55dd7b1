"""Arguments and options that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument


def _keep_help(init: Callable[..., None]) -> Callable[..., None]:
    """Since 8.5, click's arguments have a `help` too, and typer 0.25 loses its own to it."""

    @wraps(init)
    def keeping(self: Any, *, help: str | None = None, **settings: Any) -> None:
        init(self, help=help, **settings)
        self.help = help

    return keeping


TyperArgument.__init__ = _keep_help(TyperArgument.__init__)  # type: ignore[method-assign]

RecipeFile = Annotated[Path, typer.Argument(help="An axolotl recipe (YAML).")]
Teacher = Annotated[
    str | None, typer.Option(help="Hub id or folder of the teacher; overrides the recipe's.")
]
LoadIn8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="Hold the teacher in 8 bit.")]
LoadIn4Bit = Annotated[
    bool, typer.Option("--load-in-4bit", help="Hold the teacher in 4 bit (nf4).")
]
TeacherCache = Annotated[Path | None, typer.Option(help="Folder for the teacher's hidden states.")]
JsonReport = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]
TrustModels = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the models' repositories run code.")
]


def of_teacher(
    base_model: str | None, load_in_8bit: bool, load_in_4bit: bool, cache: Path | None
) -> dict[str, Any]:
    """What the command line says of the teacher, as keys of `dwakd.teacher`."""
    given = {
        "base_model": base_model,
        "load_in_8bit": load_in_8bit or None,
        "load_in_4bit": load_in_4bit or None,
        "cache": str(cache) if cache else None,
    }
    return {key: value for key, value in given.items() if value is not None}
