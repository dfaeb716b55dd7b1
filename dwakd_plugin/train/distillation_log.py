"""What a run's log lines have of the distillation."""

from __future__ import annotations

from transformers import Trainer

from dwakd_plugin.train.callbacks import HealthReport
from dwakd_plugin.train.distillation import Distillation
from dwakd_plugin.train.metrics import LabelCounts, Sums, logged, means, perplexity
from dwakd_plugin.train.parts import prefixes
from dwakd_plugin.train.progress import tell


class DistillationLog(Trainer):
    """Adds the loss's terms to each log line; sits below AxolotlTrainer, to correct its `ppl`."""

    distillation: Distillation | None = None
    health: HealthReport | None = None  # where there is a teacher
    _sums: dict[str, Sums]  # by prefix: of training, of evaluation
    _label_counts: LabelCounts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        distillation = self.distillation
        if distillation is None or not ("loss" in logs or "eval_loss" in logs):
            super().log(logs, start_time)
            return
        prefix = "" if "loss" in logs else "eval_"
        # Means since the last log line, over the tokens of all ranks.
        step = self.state.global_step
        sums = self._sums.pop(prefix, None) or Sums(prefixes(distillation.config))
        totals = sums.over_ranks(self.accelerator)
        figures = means(totals, distillation.config, distillation.kd_ramp(step), prefix)
        logs.update(logged(figures, distillation.config, prefix))
        if distillation.config.loss.dtw_weight > 0 and not prefix:
            logs["gamma"] = round(distillation.gamma(step - 1, self.state.max_steps), 5)
        own = {}
        if distillation.own_answers is not None and not prefix:
            own = distillation.own_answers.logged(self.accelerator)
            logs.update(own)
        if f"{prefix}ce" in logs:  # axolotl takes the exponential of the whole objective
            logs[f"{prefix}ppl"] = round(perplexity(logs[f"{prefix}ce"]), 5)
        if totals and not prefix:
            tell(labels=totals["student_tokens"])
        super().log(logs, start_time)
        if self.health is not None and figures:
            seen = {prefix + name: value for name, value in figures.items()}
            if not prefix:
                seen |= {"chance": self._label_counts.chance(), "epoch": self.state.epoch or 0.0}
                seen |= own
            self.health.hear(seen, self.args, self.state)
