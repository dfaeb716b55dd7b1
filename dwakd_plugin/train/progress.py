"""How far a run is, for whoever started it: a line for each step in the file that they name.

    {"step": 3, "steps": 60, "loss": 2.41}

`loss` is there in steps that the trainer logs, and `eval_loss` in those after which it evaluates.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

FILE = "DWAKD_PROGRESS"  # in the environment: where the lines go


class WriteProgress(TrainerCallback):
    """Writes the lines, on the first rank alone. With `FILE` set, each run of axolotl has one."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._file.unlink(missing_ok=True)
        self._write(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        losses = {key: float(logs[key]) for key in ("loss", "eval_loss") if key in logs}
        if losses:
            self._write(state, losses)

    def _write(self, state: Any, losses: dict[str, float] | None = None) -> None:
        if state.is_world_process_zero:
            line = {"step": state.global_step, "steps": state.max_steps} | (losses or {})
            with self._file.open("a", encoding="utf-8") as stream:  # closed, so that it is read
                stream.write(json.dumps(line) + "\n")


def callbacks() -> list[TrainerCallback]:
    """What a run needs to say how far it is: nothing where nobody asked."""
    return [WriteProgress(Path(os.environ[FILE]))] if os.environ.get(FILE) else []


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
