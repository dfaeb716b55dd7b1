"""The trainer's callback that tells a run's steps: the only part that needs transformers."""

from __future__ import annotations

import os
import time
from typing import Any

from transformers import TrainerCallback

from dwakd_plugin.train.progress import FILE, tell


class TellProgress(TrainerCallback):
    """A line for each step, and one for what is logged."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        figures = {key: float(each) for key, each in logs.items() if isinstance(each, float | int)}
        if "loss" in figures or "eval_loss" in figures:
            self._tell(state, **figures)

    def _tell(self, state: Any, **figures: float) -> None:
        if state.is_world_process_zero:
            steps = {"step": state.global_step, "steps": state.max_steps}
            tell(**{**figures, **steps, "time": time.time()})


def callbacks() -> list[TrainerCallback]:
    """What a run needs to say how far it is: nothing where nobody asked."""
    return [TellProgress()] if os.environ.get(FILE) else []
