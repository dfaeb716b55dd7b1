"""axolotl's trainer, with the distillation loss computed inside the student's wrapped forward.

The projectors are a submodule of the student while it trains, so that DDP, FSDP2 and DeepSpeed
wrap, synchronise and step them (see `sharding.py`); checkpoints keep them in a folder of their own,
and the student is saved without them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dwakd_plugin.data.collator import DISTILLATION_KEYS
from dwakd_plugin.data.dual_tokenization import SOURCE_COLUMN, TEACHER_COLUMNS, RowReport
from dwakd_plugin.data.packing import SeededOrder
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes
from dwakd_plugin.loss import LossTerms, ResponseStates, dwakd_loss
from dwakd_plugin.models.causal_lm import causal_lm
from dwakd_plugin.models.out_of_memory import explain_out_of_memory
from dwakd_plugin.models.projectors import (
    PROJECTOR_FILE,
    HeadFollower,
    Projectors,
    load_projectors,
    save_projectors,
)
from dwakd_plugin.models.student import student_states
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train.health import Health, shares, write_report
from dwakd_plugin.train.sharding import check_gathered, gathered, is_sharded, prepare_for_engine
from dwakd_plugin.train.signals import end_run, is_last_step, stopping_on_sigterm

LOG = get_logger("axolotl.dwakd")

PROJECTORS = "dwakd_projectors"  # the submodule's name on the student

# What is logged, as (name, sum, count): both are fields of LossTerms.
METRICS = (
    ("ce", "ce", "student_tokens"),
    ("t2s_ce", "t2s_ce", "distilled_tokens"),
    ("student_kd", "student_kd", "distilled_tokens"),
    ("teacher_kd", "teacher_kd", "teacher_tokens"),
    ("hidden_dtw", "hidden_dtw", "distilled_tokens"),
    ("embed_dtw", "embed_dtw", "distilled_tokens"),
    ("uld", "uld", "distilled_tokens"),
    ("paired_share", "paired_tokens", "distilled_tokens"),
    ("t2s_accuracy", "t2s_correct", "paired_tokens"),
    ("gate", "gate", "paired_tokens"),
    ("teacher_ce", "teacher_ce", "paired_tokens"),
    ("paired_ce", "paired_ce", "paired_tokens"),
    ("attention_entropy", "attention_entropy", "distilled_tokens"),
    ("band_share", "band_cells_inside", "band_cells"),
)
# What `health` asks for beyond them.
UNLOGGED = tuple(
    (name, name, count)
    for count, names in (
        ("distilled_tokens", ("attention_spread", "attention_limit")),
        ("end_tokens", ("teacher_end_ce", "end_ce")),
    )
    for name in names
)
LOSS_TERMS = ("ce", "t2s_ce", "student_kd", "teacher_kd", "hidden_dtw", "embed_dtw", "uld")


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the message names the term and the row."""


@dataclass
class Distillation:
    """What a run distils with; no teacher and no projectors where no term asks for them."""

    config: DWAKDConfig
    teacher: Teacher | None
    projectors: Projectors | None
    rows: RowReport
    pair: dict[str, str]  # which two models the projectors belong to
    head_follower: HeadFollower | None = None  # where `s2t` follows a head that trains


class _DistillationLog(Trainer):
    """Adds the loss's terms to each log line; sits below AxolotlTrainer, to correct its `ppl`."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        distillation = getattr(self, "distillation", None)
        if distillation is None or not ("loss" in logs or "eval_loss" in logs):
            super().log(logs, start_time)
            return
        prefix = "" if "loss" in logs else "eval_"
        figures = self._take_figures(prefix)
        logs.update(self._metrics(figures, prefix))
        if f"{prefix}ce" in logs:  # axolotl takes the exponential of the whole objective
            logs[f"{prefix}ppl"] = round(_exp(logs[f"{prefix}ce"]), 5)
        super().log(logs, start_time)
        self._watch_health(figures, prefix)


class _StopWhenAsked(TrainerCallback):
    """Ends training with a checkpoint, on all ranks after the same step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if is_last_step(state.global_step, first_rank=args.process_index == 0):
            control.should_save = control.should_training_stop = True
        return control


class _HealthReport(TrainerCallback):
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
        self._sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
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
        self.add_callback(_StopWhenAsked)
        tokens = max(lm.config.get_text_config().vocab_size, len(self.processing_class))
        self._label_counts = torch.zeros(tokens, dtype=torch.int32, device=self.args.device)
        if distillation.teacher is not None:
            self.add_callback(_HealthReport(self))
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
            loss = _mean_cross_entropy(self.terms)
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
            loss = _mean_cross_entropy(self.terms)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(self._explain_non_finite(inputs))
        sums = self._sums["" if model.training else "eval_"]
        for name, value in self.terms.items():
            sums[name] = sums.get(name, 0) + value.double()
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
            found = self._non_finite_row(inputs)
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
    def _non_finite_row(self, inputs: dict[str, Any]) -> str:
        """Term, place and text of the first row whose loss, by itself, is not finite."""
        assert self.distillation is not None
        if (parameter := _non_finite_parameter(self.model)) is not None:
            return f"{parameter} is not finite (before the first step: as it was loaded)"
        inputs = dict(inputs)
        batch = {key: inputs.pop(key) for key in DISTILLATION_KEYS if key in inputs}
        student = student_states(self.model, batch, **inputs)
        frozen = self.distillation.teacher
        teacher = None if frozen is None else frozen.states(batch)
        for index, source in enumerate(batch[SOURCE_COLUMN].tolist()):
            terms = self._terms(
                student.sample(index), None if teacher is None else teacher.sample(index)
            )
            bad = [
                f"{name} = {getattr(terms, name).item()}"
                for name in LOSS_TERMS
                if not torch.isfinite(getattr(terms, name))
            ]
            if bad:
                place = self.distillation.rows.locate(source) if source >= 0 else f"row {index}"
                assert student.labels is not None
                labels = student.labels[index]
                text = self.processing_class.decode(labels[labels != -100][:200])
                whose = "" if teacher is None else _non_finite_states(teacher.sample(index))
                return f"{', '.join(bad)} in {place}: {text!r}{whose}"
        return "no single row by itself"

    # -- metrics ----------------------------------------------------------------------------------

    def _take_figures(self, prefix: str) -> dict[str, float]:
        """Means since the last log line, over the tokens of all ranks; forgets the sums.

        Beside those of `METRICS` there are those that `health` judges.
        """
        assert self.distillation is not None
        sums = self._sums.pop(prefix, {})
        if not sums:
            return {}
        names = list(sums)
        values = torch.stack([torch.as_tensor(sums[name]).float() for name in names])
        totals = dict(
            zip(names, self.accelerator.reduce(values, reduction="sum").tolist(), strict=True)
        )
        absent = _absent_figures(self.distillation.config)
        figures = {
            name: totals[total] / totals[count]
            for name, total, count in METRICS + UNLOGGED
            if totals[count] > 0 and name not in absent
        }
        weights = LossTerms.weights(self.distillation.config.loss, self._kd_ramp())
        return figures | shares({name: weight * totals[name] for name, weight in weights.items()})

    def _metrics(self, figures: dict[str, float], prefix: str) -> dict[str, float]:
        """What of them is logged, by its name in the log."""
        assert self.distillation is not None
        config = self.distillation.config
        active = _active_terms(config)
        metrics = {
            prefix + name: round(figures[name], 5)
            for name, _, _ in METRICS
            if name in figures
            and (name not in LOSS_TERMS or name in active or prefix)
            # Else it is `ce`.
            and (name != "paired_ce" or config.loss.matching in ("exact", "mapped"))
        }
        if config.loss.dtw_weight > 0 and not prefix:
            metrics["gamma"] = round(self._last_gamma, 5)
        return metrics

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
            _give_projectors_their_rate(optimizer, self.model if model is None else model, rate)
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        if self.distillation is None:
            super()._save_checkpoint(model, trial, **kwargs)
            return
        if (parameter := _non_finite_parameter(self.model)) is not None:
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


# The terms of `kd_weight`, by `loss.matching`.
_DISTILLING = {
    "attention": {"t2s_ce", "student_kd", "teacher_kd"},
    "exact": {"t2s_ce", "student_kd", "teacher_kd"},
    "mapped": {"student_kd"},
    "order": {"uld"},
}


def _active_terms(config: DWAKDConfig) -> set[str]:
    """The terms that the settings ask for; the others are 0 and not worth a line."""
    active = set()
    if config.loss.ce_weight > 0:
        active.add("ce")
    if config.loss.kd_weight > 0:
        active |= _DISTILLING[config.loss.matching]
    if config.loss.dtw_weight > 0:
        active |= {"hidden_dtw", "embed_dtw"}
    return active


def _absent_figures(config: DWAKDConfig) -> set[str]:
    """Figures of what the settings do not have, in training and in evaluation."""
    attends = config.loss.needs_teacher and config.loss.matching == "attention"
    attention = {"attention_entropy", "attention_spread", "attention_limit"}
    absent = {"paired_share"} if attends else attention
    if not config.loss.trained_projectors:
        kept = _DISTILLING[config.loss.matching] if config.loss.needs_teacher else set()
        absent |= set(LOSS_TERMS) - {"ce"} - kept
    if not config.loss.needs_teacher or config.loss.matching == "order":
        absent |= {"t2s_accuracy", "gate", "teacher_ce", "paired_ce", "teacher_end_ce", "end_ce"}
    if not config.loss.needs_teacher:
        absent |= {"paired_share"}
    if config.loss.matching != "order":
        absent |= {"uld"}
    return absent


def _give_projectors_their_rate(
    optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float
) -> None:
    """Moves the projectors' parameters into parameter groups of their own."""
    projectors = {
        id(parameter) for name, parameter in model.named_parameters() if f"{PROJECTORS}." in name
    }
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in projectors]
        if not mine:
            continue
        group["params"] = [
            parameter for parameter in group["params"] if id(parameter) not in projectors
        ]
        optimizer.add_param_group({**group, "params": mine, "lr": learning_rate})
    # DeepSpeed cannot flatten a group of none.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _non_finite_parameter(student: nn.Module) -> str | None:
    """The name of the first weight, projectors included, that has NaN or infinity on this rank."""
    for name, parameter in student.named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # Other dtypes are those of quantised weights, which do not train.
        if own.dtype.itemsize > 1 and own.is_floating_point() and not own.isfinite().all():
            whose = "The projectors'" if f"{PROJECTORS}." in name else "The student's"
            return f"{whose} {name.removeprefix(f'{PROJECTORS}.')}"
    return None


def _non_finite_states(teacher: ResponseStates) -> str:
    """Says so where it is the teacher's side of a row that is not finite; else nothing."""
    length = int(teacher.lengths[0])  # padding may hold anything
    names = {
        "hidden states": teacher.hidden[0, :length],
        "embeddings": teacher.input_embeds[0, :length],
        "head": teacher.head.weight,
    }
    bad = [name for name, tensor in names.items() if not tensor.isfinite().all()]
    if not bad:
        return ""
    return f"\nThe teacher's {' and '.join(bad)} are not finite there: check its weights."


def _mean_cross_entropy(terms: dict[str, Tensor]) -> Tensor:
    return terms["ce"] / terms["student_tokens"].clamp(min=1)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
