"""The trainer's callback that writes a run's progress: the only part that needs transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dwakd_plugin.train.progress import FILE


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
