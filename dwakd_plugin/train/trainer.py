"""axolotl's trainer, with the distillation loss computed inside the student's wrapped forward.

The projectors are a submodule of the student while it trains, so that DDP, FSDP2 and DeepSpeed
wrap, synchronise and step them (see `sharding.py`); checkpoints keep them in a folder of their own,
and the student is saved without them.
"""

from __future__ import annotations

from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dwakd_plugin.data.collator import TAUGHT_BY, split_batch
from dwakd_plugin.data.dual_tokenization import SOURCE_COLUMN
from dwakd_plugin.data.packing import SeededOrder
from dwakd_plugin.data.sampled_rows import OWN_ROWS, given_labels
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes
from dwakd_plugin.loss import LossTerms, ResponseStates, dwakd_loss, variant_of
from dwakd_plugin.models.batches import teacher_columns
from dwakd_plugin.models.causal_lm import body, causal_lm
from dwakd_plugin.models.out_of_memory import explain_out_of_memory
from dwakd_plugin.models.sampling import NaNLogits
from dwakd_plugin.models.student import student_states
from dwakd_plugin.recipe.schema import LossConfig
from dwakd_plugin.train.callbacks import HealthReport, StopWhenAsked
from dwakd_plugin.train.checkpoints import (
    AT_THE_END,
    check_optimizer,
    explain_a_failing_save,
    prepare_loading,
    resume_projectors,
    write_projectors,
)
from dwakd_plugin.train.distillation import PROJECTORS, Distillation, attach
from dwakd_plugin.train.distillation_log import DistillationLog
from dwakd_plugin.train.kept_logits import check_resumed, held_as, keep_logits
from dwakd_plugin.train.metrics import LabelCounts, Sums
from dwakd_plugin.train.non_finite import (
    LossWatch,
    NonFiniteLoss,
    explain_non_finite,
    how_to_go_on,
    non_finite_parameter,
    steps_in_backward,
)
from dwakd_plugin.train.parts import (
    Part,
    Sides,
    label_tokens,
    mean_cross_entropy,
    objective,
    parts_of,
    prefixes,
    sides_of,
)
from dwakd_plugin.train.projector_optimizer import (
    TwoOptimizers,
    adamw,
    chooses_by_parameter,
    give_their_rate,
    left_out,
    schedule_their_rate,
)
from dwakd_plugin.train.served_rows import ServedRows
from dwakd_plugin.train.sharding import check_gathered, is_sharded, prepare_for_engine
from dwakd_plugin.train.signals import end_run, stopping_on_sigterm

HEAR = "hear_terms"  # among a forward's inputs: who takes the loss's terms


class DWAKDTrainer(AxolotlTrainer, ServedRows, DistillationLog):
    """AxolotlTrainer, inert until `begin_distillation`."""

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
        # Sums are divided by the label count of the whole optimizer step (method, section 6), which
        # the trainer counts only for models that say they take it. Over all ranks: the trainer then
        # multiplies the loss by their number, which the mean of their gradients takes back.
        self.model_accepts_loss_kwargs = True
        self.args.average_tokens_across_devices = True
        self._head_followed_at = 0  # the step of the head that `s2t` belongs to
        attach(distillation.projectors, self.model)
        prepare_for_engine(self, distillation.projectors)
        names = prefixes(distillation.config)
        # By prefix: of training, of evaluation.
        self._sums: dict[str, Sums] = defaultdict(lambda: Sums(names))
        vocabulary = causal_lm(self.model).config.get_text_config().vocab_size
        tokens = max(vocabulary, len(self.processing_class))
        self._label_counts = LabelCounts(tokens, self.args.device)
        self.args.logging_nan_inf_filter = False  # it would wait for each loss, for what we watch
        self._watch = LossWatch(self._explain_non_finite, at_once=steps_in_backward(self))
        self.add_callback(self._watch)
        self.add_callback(StopWhenAsked)
        if distillation.teacher is not None:
            self.health = HealthReport(distillation.config)
            self.add_callback(self.health)
        self._student_forward = self.model.forward

        @wraps(self._student_forward)  # the trainer reads its signature
        def forward(*args: Any, **inputs: Any) -> Any:
            return self._distilling_forward(*args, **inputs)

        self.model.forward = forward
        if self.args.torch_compile:
            # Of the student its decoder; the loss, whose soft-DTW no graph can hold, stays outside.
            self.model.forward = torch.compiler.disable(forward)
            backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
            body(self.model).compile(backend=backend or "inductor", mode=mode)

    def end_distillation(self) -> bool:
        """Makes the student what it was, without projectors. False where that was done before."""
        if self.distillation is None or not hasattr(self.model, PROJECTORS):
            return False
        delattr(self.model, PROJECTORS)
        self.model.forward = self._student_forward
        explain_a_failing_save(self.model)
        return True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with (
                explain_out_of_memory("the student's step"),
                stopping_on_sigterm(self.args.world_size),
            ):
                return super().train(*args, **kwargs)
        except (NonFiniteLoss, UserError) as error:
            end_run(str(error))

    # -- the step ---------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of an optimizer step, and how many labels they have, sampled ones included.

        Of all batches at once, before the first backward: the student that answers is one.
        """
        batches, count = super().get_batch_samples(*args, **kwargs)
        own = None if self.distillation is None else self.distillation.own_answers
        if own is None:
            return batches, count
        try:
            with self.accelerator.autocast():
                batches = own.put_into(batches, self.state.global_step, self.model)
        except NaNLogits as error:
            parameter, step = non_finite_parameter(self.model), self.state.global_step
            found = f"{parameter} is not finite after step {step}" if parameter else error
            raise NonFiniteLoss(f"{found}\n{how_to_go_on(self.args.output_dir)}") from error
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, by the student's forward, whose terms are kept for the log."""
        if self.distillation is None:
            _, inputs = split_batch(inputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        heard: list[list[Part]] = []
        loss, outputs = super().compute_loss(
            model,
            {**inputs, HEAR: heard.append},
            return_outputs=True,
            num_items_in_batch=num_items_in_batch,
        )
        (parts,) = heard
        if not model.training:
            loss = mean_cross_entropy(parts)
        self._watch.hear(loss, inputs, training=model.training)
        self._sums["" if model.training else "eval_"].add(parts)
        if model.training:
            self._label_counts.add(given_labels(inputs))
        return (loss, outputs) if return_outputs else loss

    def _distilling_forward(self, *args: Any, **inputs: Any) -> Any:
        """The student's forward: with a teacher's batch beside it, the loss instead of logits.

        The terms go to who is to `HEAR` them, and not among the outputs, which FSDP2 rounds to its
        compute dtype.
        """
        hear = inputs.pop(HEAR, None)
        if "teacher_input_ids" not in inputs:
            return self._student_forward(*args, **inputs)
        assert self.distillation is not None
        count = inputs.pop("num_items_in_batch", None)
        sides = self._sides(inputs)
        own_loss: Tensor | float = 0.0
        if OWN_ROWS in inputs:
            own = self.distillation.own_answers
            ((student, teacher),) = sides
            assert own is not None and teacher is not None
            student, teacher, own_loss = own.set_apart(student, teacher, inputs[OWN_ROWS])
            sides = [(student, teacher)]
        parts = self._parts(sides, inputs.get(TAUGHT_BY))
        if hear is not None:
            hear(parts)
        if not self.model.training:
            return {"loss": mean_cross_entropy(parts)}
        ramp = self.distillation.kd_ramp(self.state.global_step)
        total = objective(parts, ramp) + own_loss
        count = label_tokens(parts) if count is None else count
        return {"loss": total / torch.as_tensor(count, device=total.device).clamp(min=1)}

    def loss_terms(self, inputs: dict[str, Any]) -> LossTerms:
        """The loss's terms for one collated batch of given answers, by the only teacher."""
        (part,) = self._parts(self._sides(inputs), None)
        return part.terms

    def _sides(self, inputs: dict[str, Any]) -> list[Sides]:
        assert self.distillation is not None
        if self.is_fsdp_enabled:
            check_gathered(self.model)
        batch, own = split_batch(inputs)
        loss = self.distillation.config.loss
        embeds = variant_of(loss).needs_embeds(loss)
        student = student_states(self.model, batch, embeds=embeds, **own)
        return sides_of(self.distillation, batch, student)

    def _parts(self, sides: list[Sides], taught_by: list[list[int]] | None) -> list[Part]:
        assert self.distillation is not None
        config = self.distillation.config
        loss = config.loss
        if not self.model.training:
            loss = loss.model_copy(update={"ce_weight": 1.0})
        return parts_of(config, sides, taught_by, loss, self._terms)

    def _terms(
        self, student: ResponseStates, teacher: ResponseStates | None, loss: LossConfig
    ) -> LossTerms:
        assert self.distillation is not None
        config, step = self.distillation.config, self.state.global_step
        follower = self.distillation.head_follower
        if follower is not None and self._head_followed_at != step:
            follower.update(getattr(self.model, PROJECTORS).s2t, student.head.weight)
            self._head_followed_at = step
        return dwakd_loss(
            student,
            teacher,
            getattr(self.model, PROJECTORS),
            loss=loss,
            soft_dtw=config.soft_dtw,
            gamma=self.distillation.gamma(step, self.state.max_steps),
            kd_ramp=self.distillation.kd_ramp(step),
        )

    def _explain_non_finite(self, inputs: dict[str, Any]) -> str:
        assert self.distillation is not None
        with self.accelerator.autocast():
            found = explain_non_finite(
                inputs,
                self.model,
                self.distillation,
                self._parts,
                self.processing_class.decode,
                sharded=is_sharded(self),
            )
        return (
            f"The loss is not finite at step {self.state.global_step + 1}: {found}\n"
            f"{how_to_go_on(self.args.output_dir)}"
        )

    # -- columns, order of packed rows, optimizer -------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        count = 1 if self.distillation is None else len(self.distillation.config.each_teacher)
        columns = [name for number in range(count) for name in teacher_columns(number)]
        for column in (*columns, SOURCE_COLUMN):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _create_multipack_sampler(self, base_sampler: Any, dataset: Any, **kwargs: Any) -> Any:
        """axolotl's, with an order that a resumed run finds again: its own is drawn again.

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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        projectors = None if self.distillation is None else self.distillation.projectors
        if self.distillation is None or projectors is None or self.optimizer is not None:
            return super().create_optimizer(model=model)
        rate = self.distillation.config.projectors.learning_rate
        if steps_in_backward(self) and not self.is_deepspeed_enabled:
            raise UserError(
                f"optimizer: {self.args.optim} changes each weight within the backward pass, all "
                "at one rate, and the projectors have their own "
                f"(dwakd.projectors.learning_rate: {rate:g}). Take another optimizer, or a variant "
                "without projectors."
            )
        if chooses_by_parameter(self):
            with left_out(projectors):
                student = super().create_optimizer(model=model)
            self.optimizer = TwoOptimizers(student, adamw(projectors, self.args, rate))
        else:
            give_their_rate(super().create_optimizer(model=model), projectors, rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        made = super().create_scheduler(num_training_steps, optimizer)
        if self.distillation is not None and self.distillation.projectors is not None:
            rate = self.distillation.config.projectors.learning_rate
            schedule_their_rate(made, self.distillation.projectors, rate)
        return made

    # -- checkpoints ------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        if self.distillation is None:
            super()._save_checkpoint(model, trial, **kwargs)
            return
        if (parameter := non_finite_parameter(self.model)) is not None:
            raise NonFiniteLoss(
                f"{parameter} is not finite after step {self.state.global_step}, and a checkpoint "
                f"of it would be of no use.\n{how_to_go_on(self.args.output_dir)}"
            )
        folder = Path(self._get_output_dir(trial=trial))
        folder /= f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with explaining_writes(folder, "Training stops here: free some space, and resume."):
            # Before the rest: a checkpoint counts as whole once its last file, the state, is there.
            self._save_beside_student(folder)
            super()._save_checkpoint(model, trial, **kwargs)
        if self.distillation.own_answers is not None:
            self.distillation.own_answers.sampler.saved()

    def save_at_the_end(self, folder: Path) -> None:
        """Writes below the output folder what checkpoints have too. All ranks must take part."""
        with explaining_writes(folder, AT_THE_END):
            self._save_beside_student(folder)

    def _save_beside_student(self, folder: Path) -> None:
        """Writes projectors and a few logits below `folder`. All ranks must take part."""
        assert self.distillation is not None
        write_projectors(self.distillation, folder, first_rank=self.args.should_save)
        if self.args.should_save and not is_sharded(self):  # one rank alone has no whole student
            rows = (self.eval_dataset or self.train_dataset).with_format(None)
            with self.accelerator.autocast():
                keep_logits(self.model, rows, self.processing_class.decode, folder, self._held())

    def _held(self) -> str:
        half = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else None
        return held_as(self.model, autocast=half)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        prepare_loading(self.args.device, self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_optimizer(Path(resume_from_checkpoint))
        if self.distillation is not None:
            resume_projectors(self.distillation, Path(resume_from_checkpoint))
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # which load theirs later
                with self.accelerator.autocast():
                    check_resumed(self.model, Path(resume_from_checkpoint), self._held())

    def _load_best_model(self) -> None:
        super()._load_best_model()
        engine = self.is_deepspeed_enabled or self.is_fsdp_enabled  # whose checkpoints have both
        if self.distillation is not None and not engine:
            resume_projectors(self.distillation, Path(self.state.best_model_checkpoint))
