"""A training by axolotl as a part of another command: its log in a file, its steps heard."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from dwakd_plugin.errors import UserError
from dwakd_plugin.train import progress
from dwakd_plugin.train.child_process import execute
from dwakd_plugin.train.launch import axolotl_train

_LAST_LINES = 12  # of the log, where it fails


def train_logged(
    recipe: Path,
    log: Path,
    environment: Mapping[str, str],
    hear: Callable[[progress.Progress], None],
    folder: Path | None = None,
) -> None:
    """Trains a recipe's file to its end, and tells `hear` how far it is.

    Its relative paths begin in `folder`, by default the current one. Ctrl-C ends it at once, with
    KeyboardInterrupt: what it has saved by then stays. Raises UserError with the end of axolotl's
    log where it fails.
    """
    steps = log.with_suffix(".progress.jsonl").resolve()
    steps.unlink(missing_ok=True)
    with log.open("wb") as stream:
        code, stopped_by = execute(
            axolotl_train(str(recipe.resolve()), "python"),
            {**environment, progress.FILE: str(steps)},
            stream,
            can_save=lambda: False,
            meanwhile=lambda: hear(progress.read_progress(steps)),
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    if stopped_by is not None:
        raise KeyboardInterrupt
    if code != 0:
        raise UserError(f"axolotl ended with exit code {code} on {recipe}. {end_of(log)}")


def end_of(log: Path) -> str:
    """The last lines of a log, named as such."""
    text = log.read_bytes().decode(errors="replace")  # with each return of a carriage
    # A bar draws itself again and again, in one line.
    text = text.replace("\r\n", "\n").strip()
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    return f"The end of {log}:\n" + "\n".join(f"  {line}" for line in lines[-_LAST_LINES:])
