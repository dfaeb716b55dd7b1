"""What happens in a run beside its steps: a stop that was asked for, and the health report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from dwakd_plugin.train.health import Health
from dwakd_plugin.train.signals import is_last_step

if TYPE_CHECKING:
    from dwakd_plugin.train.trainer import DWAKDTrainer


class StopWhenAsked(TrainerCallback):
    """Ends training with a checkpoint, on all ranks after the same step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if is_last_step(state.global_step, first_rank=args.process_index == 0):
            control.should_save = control.should_training_stop = True
        return control


class HealthReport(TrainerCallback):
    """Begins a run's report where it is known whether the run resumes, and ends it."""

    def __init__(self, trainer: DWAKDTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._trainer.distillation is not None
        config = self._trainer.distillation.config
        untrained = config.projectors.path is None and config.projectors.warmup_steps == 0
        # A ramp that outlasts the run is a low weight, not a time to wait for.
        ramp = min(config.loss.kd_warmup_steps, state.max_steps // 2)
        self._trainer.health = Health(
            config,
            settled_after=max(ramp, args.get_warmup_steps(state.max_steps)),
            cold_start=untrained and state.global_step == 0,
        )
        self._trainer.write_health()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.write_health()
