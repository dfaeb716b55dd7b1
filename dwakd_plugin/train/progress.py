"""How far a run is, for whoever started it: a line for each step in the file that they name.

    {"step": 3, "steps": 60, "loss": 2.41}

`loss` is there in steps that the trainer logs, and `eval_loss` in those after which it evaluates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FILE = "DWAKD_PROGRESS"  # in the environment: where the lines go


class Progress(NamedTuple):
    """What the lines say so far: steps done and to do, and the losses logged, in order."""

    step: int
    steps: int
    losses: list[float]

    @property
    def share(self) -> float:
        return self.step / max(1, self.steps)


def read_progress(file: Path) -> Progress:
    """The progress in a file; of none, or an empty one, zero. A line half written is left alone."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Progress(0, 0, [])
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    losses = [line["loss"] for line in lines if "loss" in line]
    return Progress(lines[-1]["step"], lines[-1]["steps"], losses) if lines else Progress(0, 0, [])
