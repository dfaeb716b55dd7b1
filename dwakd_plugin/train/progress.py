"""How far a run is, for whoever started it: a line of JSON at a time in the file that they name.

    {"step": 3, "steps": 60, "time": 1785.2, "loss": 2.41, "ce": 2.3}
    {"doing": "Loading the teacher"}
    {"said": "Distillation is on ..."}

A step has the seconds since 1970 at which it ended, and the figures that the trainer logs or
evaluates after it. `labels` are tokens trained on since the last such line; `warning` and `error`
are words for a person.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

FILE = "DWAKD_PROGRESS"  # in the environment: where the lines go


class Progress(NamedTuple):
    """What the lines say so far: steps done and to do, and the losses logged, in order."""

    step: int
    steps: int
    losses: list[float]

    @property
    def share(self) -> float:
        return self.step / max(1, self.steps)


def begin() -> None:
    """Forgets what another run has told in this place."""
    file = _file()
    if file is not None:
        file.unlink(missing_ok=True)


def tell(**facts: Any) -> None:
    """Adds a line, where somebody asked for them; of several processes the first one speaks."""
    file = _file()
    if file is None:
        return
    # Whoever reads it may be gone, and no run is to end for that.
    with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(facts) + "\n")


def _file() -> Path | None:
    name = os.environ.get(FILE)
    return Path(name) if name and os.environ.get("RANK", "0") == "0" else None


class Follower:
    """Reads a file's lines as they come; one half written is left for the next time."""

    def __init__(self, file: Path) -> None:
        self._file, self._read = file, 0

    def news(self) -> list[dict[str, Any]]:
        """The lines since the last call; of a file that isn't there, none."""
        try:
            with self._file.open("rb") as stream:
                if stream.seek(0, os.SEEK_END) < self._read:  # it was begun anew
                    self._read = 0
                stream.seek(self._read)
                text, _, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._read += len(text) + 1 if text else 0
        lines = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # one that a full disk has cut off
                lines.append(json.loads(line))
        return lines


def read_progress(file: Path) -> Progress:
    """The progress in a file; of none, or an empty one, zero."""
    lines = [line for line in Follower(file).news() if "step" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    return Progress(lines[-1]["step"], lines[-1]["steps"], losses) if lines else Progress(0, 0, [])
