"""What happens in a run beside its steps: a stop that was asked for, and the health report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train.health import Figures, Health, write_report
from dwakd_plugin.train.progress import tell
from dwakd_plugin.train.signals import is_last_step

LOG = get_logger("axolotl.dwakd")


class StopWhenAsked(TrainerCallback):
    """Ends training with a checkpoint, on all ranks after the same step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if is_last_step(state.global_step, first_rank=args.process_index == 0):
            control.should_save = control.should_training_stop = True
        return control


class HealthReport(TrainerCallback):
    """Warns of what a run's figures say is wrong, and keeps the report in its output folder.

    It begins where it is known whether the run resumes; `health` is there from then on.
    """

    def __init__(self, config: DWAKDConfig) -> None:
        self.config = config
        self.health: Health | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        projectors = self.config.projectors
        untrained = projectors.path is None and projectors.warmup_steps == 0
        # A ramp that outlasts the run is a low weight, not a time to wait for.
        ramp = min(self.config.loss.kd_warmup_steps, state.max_steps // 2)
        self.health = Health(
            self.config,
            settled_after=max(ramp, args.get_warmup_steps(state.max_steps)),
            cold_start=untrained and state.global_step == 0,
        )
        self._write(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args)

    def hear(self, figures: Figures, args: Any, state: Any) -> None:
        """Takes the figures of a log line; the first rank speaks."""
        if self.health is None or not figures or args.process_index != 0:
            return
        before = [alarm.until for alarm in self.health.alarms]
        for warning in self.health.observe(state.global_step, figures):
            LOG.warning("Step %d: %s", state.global_step, warning)
            tell(warning=f"Step {state.global_step}: {warning}")
        if [alarm.until for alarm in self.health.alarms] != before:
            self._write(args)

    def _write(self, args: Any) -> None:
        if self.health is None or not args.should_save:
            return
        try:
            write_report(self.health, Path(args.output_dir))
        except OSError as error:  # nothing that a run should end for
            LOG.warning("The warnings so far cannot be written to the output folder: %s", error)
