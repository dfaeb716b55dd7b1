"""What a served teacher says of a step's rows, waited for before the step.

So that a run whose server has died ends between two steps, all ranks alike, with a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dwakd_plugin.data.collator import sides_of_teachers
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.errors import UserError
from dwakd_plugin.models.teacher.served import ServedTeacher
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train.preflight import has_index
from dwakd_plugin.train.progress import tell
from dwakd_plugin.train.signals import stop_asked

LOG = get_logger("axolotl.dwakd")


def warn(text: str) -> None:
    """Says it in each process's log, and once to whoever started the run."""
    LOG.warning("%s", text, main_process_only=False)
    tell(warning=text)


class RowsMissing(UserError):
    """The teacher's server does not say what a step needs."""


def check_served_teacher(config: DWAKDConfig) -> None:
    """Raises UserError where a run will ask the recipe's server, and it is not the teacher.

    Before anything is loaded; see `ServedTeacher`, which asks once more with the rows at hand.
    """
    teacher = config.teacher
    if teacher.server is None or not config.loss.needs_teacher or has_index(teacher):
        return
    ServedTeacher(teacher, load_teacher_tokenizer(teacher), longest=0)


class ServedRows(Trainer):
    """Sits below AxolotlTrainer; `distillation` is DWAKDTrainer's."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().train(*args, **kwargs)
        except RowsMissing as error:
            raise UserError(f"{error}\n{self._keep_what_there_is()}") from error
        for served, _ in self._served({}):
            if (lost := served.lost()) is not None:
                warn(lost)
        return result

    def _served(self, batch: dict[str, Any]) -> list[tuple[ServedTeacher, dict[str, Any]]]:
        """Each teacher that a server holds, and its side of a batch."""
        distillation = getattr(self, "distillation", None)
        teachers = () if distillation is None else distillation.teachers
        sides = sides_of_teachers(batch)
        return [
            (teacher.served, sides[number] if number < len(sides) else {})
            for number, teacher in enumerate(teachers)
            if teacher.served is not None
        ]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._complete(batches)
        return batches, count

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # Ranks may have different numbers of batches to evaluate, so none waits for another.
        for served, side in self._served(inputs):
            try:
                served.complete(side, stop_asked)
            except UserError as error:
                if self.args.world_size > 1:
                    raise
                raise RowsMissing(str(error)) from error
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _complete(self, batches: list[dict[str, Any]]) -> None:
        """Puts into batches what the server says of their rows. Raises RowsMissing on all ranks."""
        error, asked = None, [pair for batch in batches for pair in self._served(batch)]
        if not self._served({}):
            return
        try:
            for served, side in asked:
                served.complete(side, stop_asked)
        except UserError as found:
            error = found
        missing = torch.tensor(int(error is not None), device=self.args.device)
        if self.args.world_size > 1:
            missing = self.accelerator.reduce(missing, "sum")
        if error is not None:
            raise RowsMissing(str(error)) from error
        if missing.item():
            raise RowsMissing("Another process of this run lacks what the server says of its rows.")

    def _keep_what_there_is(self) -> str:
        """Writes a checkpoint of the last step, where there is none; says where."""
        step = self.state.global_step
        if step == 0:
            return "No step has been made. Start the run again when the server is there."
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if not folder.exists():
            self._save_checkpoint(self.model_wrapped, None)
        return (
            f"Step {step} is kept in {folder}; with `auto_resume_from_checkpoints: true` (`dwakd "
            "train --resume`) the run goes on from there when the server is back."
        )
