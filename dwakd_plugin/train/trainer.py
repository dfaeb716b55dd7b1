"""axolotl's trainer, with the distillation loss computed inside the student's wrapped forward.

The projectors are a submodule of the student while it trains, so that DDP, FSDP2 and DeepSpeed
wrap, synchronise and step them (see `sharding.py`); checkpoints keep them in a folder of their own,
and the student is saved without them.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dwakd_plugin.data.collator import DISTILLATION_KEYS
from dwakd_plugin.data.dual_tokenization import SOURCE_COLUMN, TEACHER_COLUMNS
from dwakd_plugin.data.packing import SeededOrder
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes
from dwakd_plugin.loss import LossTerms, ResponseStates, dwakd_loss
from dwakd_plugin.models.causal_lm import causal_lm
from dwakd_plugin.models.out_of_memory import explain_out_of_memory
from dwakd_plugin.models.projectors import (
    PROJECTOR_FILE,
    load_projectors,
    save_projectors,
)
from dwakd_plugin.models.student import student_states
from dwakd_plugin.train.callbacks import HealthReport, StopWhenAsked
from dwakd_plugin.train.distillation import PROJECTORS, Distillation, give_their_rate
from dwakd_plugin.train.health import Health, write_report
from dwakd_plugin.train.metrics import Sums, logged, mean_cross_entropy, means, perplexity
from dwakd_plugin.train.non_finite import NonFiniteLoss, non_finite_parameter, non_finite_row
from dwakd_plugin.train.sharding import check_gathered, gathered, is_sharded, prepare_for_engine
from dwakd_plugin.train.signals import end_run, stopping_on_sigterm

LOG = get_logger("axolotl.dwakd")


class _DistillationLog(Trainer):
    """Adds the loss's terms to each log line; sits below AxolotlTrainer, to correct its `ppl`."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        distillation = getattr(self, "distillation", None)
        if distillation is None or not ("loss" in logs or "eval_loss" in logs):
            super().log(logs, start_time)
            return
        prefix = "" if "loss" in logs else "eval_"
        figures = self._figures(prefix)
        logs.update(logged(figures, distillation.config, prefix))
        if distillation.config.loss.dtw_weight > 0 and not prefix:
            logs["gamma"] = round(self._last_gamma, 5)
        if f"{prefix}ce" in logs:  # axolotl takes the exponential of the whole objective
            logs[f"{prefix}ppl"] = round(perplexity(logs[f"{prefix}ce"]), 5)
        super().log(logs, start_time)
        self._watch_health(figures, prefix)


class DWAKDTrainer(AxolotlTrainer, _DistillationLog):
    """AxolotlTrainer, inert until `begin_distillation`."""

    distillation: Distillation | None = None
    health: Health | None = None  # while it trains, and after
    _packs: Any = None  # of the training rows, where they are packed

    def begin_distillation(self, distillation: Distillation) -> None:
        """Attaches the projectors and the loss to the student. Once, before training."""
        if self.args.n_gpu > 1:
            raise UserError(
                f"One process sees {self.args.n_gpu} GPUs, and would split each batch over them "
                "(DataParallel), which distillation cannot follow. Start one process per GPU "
                "(`axolotl train recipe.yml --launcher accelerate`), or show it one: "
                "CUDA_VISIBLE_DEVICES=0."
            )
        self.distillation = distillation
        self._sums: dict[str, Sums] = defaultdict(Sums)  # by prefix: of training, of evaluation
        # Of the last forward; not among its outputs, which FSDP2 rounds to its compute dtype.
        self.terms: dict[str, Tensor] = {}
        # Sums are divided by the label count of the whole optimizer step (method, section 6), which
        # the trainer counts only for models that say they take it. Over all ranks: the trainer then
        # multiplies the loss by their number, which the mean of their gradients takes back.
        self.model_accepts_loss_kwargs = True
        self.args.average_tokens_across_devices = True
        self._head_followed_at = 0  # the step of the head that `s2t` belongs to
        setattr(self.model, PROJECTORS, distillation.projectors)
        lm = causal_lm(self.model)
        if distillation.projectors is not None:
            lm._keys_to_ignore_on_save = {
                *(lm._keys_to_ignore_on_save or ()),
                *(f"{PROJECTORS}.{name}" for name in distillation.projectors.state_dict()),
            }
        prepare_for_engine(self, distillation.projectors)
        self.add_callback(StopWhenAsked)
        tokens = max(lm.config.get_text_config().vocab_size, len(self.processing_class))
        self._label_counts = torch.zeros(tokens, dtype=torch.int32, device=self.args.device)
        if distillation.teacher is not None:
            self.add_callback(HealthReport(self))
        self._student_forward = self.model.forward

        @wraps(self._student_forward)  # the trainer reads its signature
        def forward(*args: Any, **inputs: Any) -> Any:
            return self._distilling_forward(*args, **inputs)

        self.model.forward = forward

    def end_distillation(self) -> bool:
        """Makes the student what it was, without projectors. False where that was done before."""
        if self.distillation is None or not hasattr(self.model, PROJECTORS):
            return False
        delattr(self.model, PROJECTORS)
        self.model.forward = self._student_forward
        self._explain_a_failing_save()
        return True

    def _explain_a_failing_save(self) -> None:
        """Has axolotl's saving of the student end with a message where the disk is full."""
        save = self.model.save_pretrained

        @wraps(save)
        def explaining(folder: Any, *args: Any, **kwargs: Any) -> Any:
            remedy = "Free some space, and resume: the last checkpoint has all that was trained."
            try:
                with explaining_writes(Path(folder), remedy):
                    return save(folder, *args, **kwargs)
            except UserError as error:
                end_run(str(error))

        self.model.save_pretrained = explaining

    # -- the step ---------------------------------------------------------------------------------

    def _distilling_forward(self, *args: Any, **inputs: Any) -> Any:
        """The student's forward: with a teacher's batch beside it, the loss instead of logits."""
        if "teacher_input_ids" not in inputs:
            return self._student_forward(*args, **inputs)
        batch = {key: inputs.pop(key) for key in DISTILLATION_KEYS if key in inputs}
        label_tokens = inputs.pop("num_items_in_batch", None)
        terms = self.loss_terms(batch, **inputs)
        self.terms = {name: value.detach() for name, value in vars(terms).items()}
        if not self.model.training:
            loss = mean_cross_entropy(self.terms)
        else:
            assert self.distillation is not None
            count = terms.student_tokens if label_tokens is None else label_tokens
            total = terms.total(self.distillation.config.loss, self._kd_ramp())
            loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        return {"loss": loss}

    def loss_terms(self, batch: dict[str, Tensor], **inputs: Tensor) -> LossTerms:
        """The loss's terms for one collated batch; `inputs` are the rest of `student_states`'."""
        assert self.distillation is not None
        if self.is_fsdp_enabled:
            check_gathered(self.model)
        student = student_states(self.model, batch, **inputs)
        teacher = self.distillation.teacher
        return self._terms(student, None if teacher is None else teacher.states(batch))

    def _terms(self, student: ResponseStates, teacher: ResponseStates | None) -> LossTerms:
        assert self.distillation is not None
        config = self.distillation.config
        follower = self.distillation.head_follower
        if follower is not None and self._head_followed_at != self.state.global_step:
            follower.update(getattr(self.model, PROJECTORS).s2t, student.head.weight)
            self._head_followed_at = self.state.global_step
        loss = config.loss
        if not self.model.training:
            loss = loss.model_copy(update={"ce_weight": 1.0})
        self._last_gamma = self._gamma()
        return dwakd_loss(
            student,
            teacher,
            getattr(self.model, PROJECTORS),
            loss=loss,
            soft_dtw=config.soft_dtw,
            gamma=self._last_gamma,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.distillation is None:
            inputs = {key: value for key, value in inputs.items() if key not in DISTILLATION_KEYS}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(
            model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if not model.training:
            loss = mean_cross_entropy(self.terms)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(self._explain_non_finite(inputs))
        self._sums["" if model.training else "eval_"].add(self.terms)
        if model.training:
            labels = inputs["labels"].flatten()
            self._label_counts.scatter_add_(0, labels.clamp(min=0), labels.ne(-100).int())
        return (loss, outputs) if return_outputs else loss

    def _gamma(self) -> float:
        """γ, linear from the first optimizer step to the last (D8)."""
        assert self.distillation is not None
        config = self.distillation.config.soft_dtw
        progress = min(1.0, self.state.global_step / max(1, self.state.max_steps - 1))
        return config.gamma_start + (config.gamma_end - config.gamma_start) * progress

    def _kd_ramp(self) -> float:
        """The weight of the student-space term while it ramps up (D6)."""
        assert self.distillation is not None
        steps = self.distillation.config.loss.kd_warmup_steps
        return 1.0 if steps == 0 else min(1.0, self.state.global_step / steps)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with (
                explain_out_of_memory("the student's step"),
                stopping_on_sigterm(self.args.world_size),
            ):
                return super().train(*args, **kwargs)
        except (NonFiniteLoss, UserError) as error:
            end_run(str(error))

    def _explain_non_finite(self, inputs: dict[str, Any]) -> str:
        """Which term of which row is not finite, and what to do about it.

        A rank that holds a part of the student cannot compute alone: it names all rows.
        """
        assert self.distillation is not None
        if is_sharded(self):
            sources = inputs[SOURCE_COLUMN].tolist()
            found = "one of " + ", ".join(map(self.distillation.rows.locate, sources))
        else:
            found = self._non_finite_place(inputs)
        return (
            f"The loss is not finite at step {self.state.global_step + 1}: {found}\n"
            f"{self._how_to_go_on()}"
        )

    def _how_to_go_on(self) -> str:
        checkpoints = any(Path(self.args.output_dir).glob("checkpoint-*"))
        kept = f"Checkpoints are kept in {self.args.output_dir}." if checkpoints else ""
        return (
            f"Training stops here. {kept} Lower learning_rate or dwakd.projectors.learning_rate, "
            "set max_grad_norm, or remove the row; then resume from the last checkpoint."
        )

    @torch.no_grad()
    def _non_finite_place(self, inputs: dict[str, Any]) -> str:
        """Term, place and text of the first row whose loss, by itself, is not finite."""
        assert self.distillation is not None
        if (parameter := non_finite_parameter(self.model)) is not None:
            return f"{parameter} is not finite (before the first step: as it was loaded)"
        inputs = dict(inputs)
        batch = {key: inputs.pop(key) for key in DISTILLATION_KEYS if key in inputs}
        frozen = self.distillation.teacher
        return non_finite_row(
            student_states(self.model, batch, **inputs),
            None if frozen is None else frozen.states(batch),
            self._terms,
            lambda index: self._place_of(index, int(batch[SOURCE_COLUMN][index])),
            self.processing_class.decode,
        )

    def _place_of(self, index: int, source: int) -> str:
        assert self.distillation is not None
        return self.distillation.rows.locate(source) if source >= 0 else f"row {index}"

    # -- metrics ----------------------------------------------------------------------------------

    def _figures(self, prefix: str) -> dict[str, float]:
        """Means since the last log line, over the tokens of all ranks; forgets the sums."""
        assert self.distillation is not None
        totals = self._sums.pop(prefix, Sums()).over_ranks(self.accelerator)
        return means(totals, self.distillation.config, self._kd_ramp(), prefix)

    def _watch_health(self, figures: dict[str, float], prefix: str) -> None:
        """Warns, on the first rank, of what the figures say is wrong."""
        if self.health is None or not figures or not self.is_world_process_zero():
            return
        seen = {prefix + name: value for name, value in figures.items()}
        if not prefix:
            # Of this rank's rows, which are drawn as the others' are.
            labels = self._label_counts.sum().clamp(min=1)
            seen["chance"] = (self._label_counts.max() / labels).item()
            seen["epoch"] = self.state.epoch or 0.0
        before = [alarm.until for alarm in self.health.alarms]
        for warning in self.health.observe(self.state.global_step, seen):
            LOG.warning("Step %d: %s", self.state.global_step, warning)
        if [alarm.until for alarm in self.health.alarms] != before:
            self.write_health()

    def write_health(self) -> None:
        """Writes the warnings so far to the output folder, by the first rank."""
        if self.health is None or not self.args.should_save:
            return
        try:
            write_report(self.health, Path(self.args.output_dir))
        except OSError as error:  # nothing that a run should end for
            LOG.warning("The warnings so far cannot be written to the output folder: %s", error)

    # -- order of packed rows ---------------------------------------------------------------------

    def _create_multipack_sampler(self, base_sampler: Any, dataset: Any, **kwargs: Any) -> Any:
        """axolotl's, with an order that a resumed run finds again: its own is drawn anew.

        Since 0.21 it is told whether the data set is one to train on.
        """
        create = super()._create_multipack_sampler
        if self.distillation is None or not isinstance(base_sampler, RandomSampler):
            return create(base_sampler, dataset, **kwargs)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._packs = create(SeededOrder(len(dataset), seed), dataset, **kwargs)
        return self._packs

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            # Killed after its last checkpoint, and resumed: the loop would train one step more.
            self.control.should_training_stop = True
            return None
        # Both: what skips batches after resuming hides them from who would tell them the epoch.
        if self._packs is not None:
            self._packs.sampler.set_epoch(epoch)
            self._packs.set_epoch(epoch)  # forgets the batches of another epoch
        return super()._run_epoch(model, epoch, *args, **kwargs)

    # -- columns, optimizer, checkpoints ----------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in (*TEACHER_COLUMNS, SOURCE_COLUMN):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model=model)
        if self.distillation is not None:
            rate = self.distillation.config.projectors.learning_rate
            give_their_rate(optimizer, self.model if model is None else model, rate)
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        if self.distillation is None:
            super()._save_checkpoint(model, trial, **kwargs)
            return
        if (parameter := non_finite_parameter(self.model)) is not None:
            raise NonFiniteLoss(
                f"{parameter} is not finite after step {self.state.global_step}, and a checkpoint "
                f"of it would be of no use.\n{self._how_to_go_on()}"
            )
        folder = Path(self._get_output_dir(trial=trial))
        folder /= f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with explaining_writes(folder, "Training stops here: free some space, and resume."):
            # Before the rest: a checkpoint counts as whole once its last file, the state, is there.
            self.save_projectors(folder)
            super()._save_checkpoint(model, trial, **kwargs)

    def save_projectors(self, folder: Path) -> None:
        """Writes the projectors below `folder`. All ranks must take part, and the first writes."""
        assert self.distillation is not None
        if self.distillation.projectors is None:
            return
        tensors = gathered(self.distillation.projectors)
        if self.args.should_save:
            save_projectors(tensors, folder / PROJECTOR_FILE, self.distillation.pair)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu" and self.args.device.index is not None:
            _have_torch_load_to_numbered_cpus()
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.distillation is not None and self.distillation.projectors is not None:
            file = Path(resume_from_checkpoint) / PROJECTOR_FILE
            load_projectors(self.distillation.projectors, file, self.distillation.pair)


@cache  # torch refuses a second one
def _have_torch_load_to_numbered_cpus() -> None:
    """accelerate numbers the CPUs of several processes, and `torch.load` knows only `cpu`."""
    torch.serialization.register_package(
        99,
        lambda storage: None,
        lambda storage, place: storage if place.startswith("cpu:") else None,
    )
