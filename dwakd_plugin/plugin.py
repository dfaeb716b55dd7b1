"""axolotl's hooks, and nothing else: each hands over to the module that does the work.

Every hook is inert in a recipe without `distillation: dwakd`, but for those that say how far a run
is to whoever asked, seed a LoRA's start and keep 4-bit layers learning on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from transformers import set_seed

from dwakd_plugin.errors import UserError
from dwakd_plugin.io import run_lock
from dwakd_plugin.models.quantised_layers import keep_as_stored
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.checks import check_recipe, check_taught
from dwakd_plugin.train import progress
from dwakd_plugin.train.preflight import loads_body
from dwakd_plugin.train.progress_callback import callbacks
from dwakd_plugin.train.report import describe_run, final_words, standing_warnings
from dwakd_plugin.train.run_folder import check_output_folder, sign_output_folder, template_day
from dwakd_plugin.train.signals import end_run

LOG = get_logger("axolotl.dwakd")

Result = TypeVar("Result")


def _without_traceback(hook: Callable[..., Result]) -> Callable[..., Result]:
    """Ends the process with the message alone where the recipe or its surroundings are wrong."""

    @wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> Result:
        try:
            return hook(*args, **kwargs)
        except UserError as error:
            end_run(str(error))

    return guarded


class DWAKDPlugin(BasePlugin):
    """Cross-tokenizer distillation, for recipes that say `distillation: dwakd`."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: Any = None
        self._trainer: Any = None
        self._seen: tuple[DictDefault, Recipe | None] | None = None

    @property
    def rows(self) -> Any:
        """The report on the rows that were loaded last; None before."""
        return self._rows

    def get_input_args(self) -> str:
        return "dwakd_plugin.recipe.schema.DWAKDArgs"

    def _recipe(self, cfg: DictDefault) -> Recipe | None:
        """The recipe behind axolotl's settings, read once; None where it asks for no distillation.

        Raises UserError where its `dwakd:` block cannot be used.
        """
        if self._seen is None or self._seen[0] is not cfg:
            recipe = Recipe(cfg.to_dict() if isinstance(cfg, DictDefault) else dict(cfg))
            self._seen = cfg, recipe if recipe.distils else None
        return self._seen[1]

    @_without_traceback
    def register(self, cfg: DictDefault) -> None:
        """Sees the recipe before axolotl's schema does, so that our messages come first."""
        progress.begin()
        recipe = self._recipe(cfg)
        if recipe is not None:
            check_recipe(recipe)
            check_taught(recipe)
            from dwakd_plugin.train.preflight import check_variant

            check_variant(recipe)
            if recipe.config.loss.needs_teacher:
                for teacher in recipe.config.each_teacher:
                    LOG.info("Distillation is on: %s teaches %s", teacher.called, recipe.base_model)

    @_without_traceback
    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> Any:
        recipe = self._recipe(cfg)
        if recipe is None:
            return None
        config = recipe.config
        progress.tell(doing="Tokenising the rows for both models")
        from axolotl.common.datasets import load_datasets

        from dwakd_plugin.data.dual_tokenization import dual_tokenization
        from dwakd_plugin.models.teacher.loaded import check_teacher, teacher_config
        from dwakd_plugin.tokenizers.template_date import template_date
        from dwakd_plugin.train.served_rows import check_served_teacher

        for teacher in config.each_teacher:
            if teacher.server is None:
                teacher_config(teacher)
            else:
                check_served_teacher(config.of(teacher))
            if config.loss.needs_teacher and loads_body(teacher, config):
                check_teacher(teacher, _student_device())
                if cfg.sample_packing and teacher.cache is None:
                    from dwakd_plugin.data.packing import check_packing_of_teacher

                    check_packing_of_teacher(teacher, _student_device())
        if not preprocess:
            # One rank sets incomplete checkpoints aside, and speaks for the run.
            only_look = os.environ.get("RANK", "0") != "0"
            if not only_look:
                run_lock.hold(recipe.output_dir)
            check_output_folder(recipe, only_look=only_look)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
            cfg.device_map = {"": "cpu"}  # axolotl would name a device by rank, and there is none
        efficiency = cfg.sample_packing_eff_est  # axolotl's estimate is for one side
        day = template_day(recipe)
        with template_date(day), dual_tokenization(cfg, config) as rows:
            datasets = load_datasets(cfg=cfg)
        if cfg.sample_packing:
            from dwakd_plugin.data.packing import pack_by_pairs

            cfg.sample_packing_eff_est = efficiency
            lengths = [one.sequence_len or cfg.sequence_len for one in config.each_teacher]
            pack_by_pairs(cfg, lengths, datasets)
        self._rows = rows
        return datasets

    def pre_model_load(self, cfg: DictDefault) -> None:
        # axolotl seeds later, with its trainer: a new LoRA would differ from run to run. Without a
        # teacher too: the LoRA of `dwakd adapt`, and the student alone that one is compared to.
        if cfg.seed is None:  # axolotl's default, which its schema gives a written `null` alone
            cfg.seed = 42
        set_seed(cfg.seed)
        if self._recipe(cfg) is not None:
            progress.tell(doing="Loading the student")

    def post_model_load(self, cfg: DictDefault, model: Any) -> None:
        # Without a teacher too, as above.
        keep_as_stored(model)

    def get_trainer_cls(self, cfg: DictDefault) -> Any:
        if self._recipe(cfg) is None:
            return None
        from dwakd_plugin.train.trainer import DWAKDTrainer

        return DWAKDTrainer

    def get_collator_cls_and_kwargs(self, cfg: DictDefault, is_eval: bool = False) -> Any:
        if self._recipe(cfg) is None:
            return None
        from dwakd_plugin.data.collator import DualCollator

        return DualCollator, {}

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: Any) -> list[Any]:
        return callbacks()

    @_without_traceback
    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        recipe = self._recipe(cfg)
        if recipe is None:
            return
        from dwakd_plugin.train.assembly import assemble

        distillation = assemble(cfg, recipe, trainer, self._rows)
        if trainer.args.should_save:
            sign_output_folder(recipe)
        trainer.begin_distillation(distillation)
        self._trainer = trainer
        description = describe_run(cfg, trainer)
        LOG.info("%s", description)
        progress.tell(said=description, doing="The first step")

    @_without_traceback
    def post_train(self, cfg: DictDefault, model: Any) -> None:
        # Called before and after the final save: the first time the projectors leave the student.
        if self._trainer is not None and self._trainer.end_distillation():
            self._trainer.save_at_the_end(Path(cfg.output_dir))

    def post_train_unload(self, cfg: DictDefault) -> None:
        if self._trainer is not None and self._trainer.args.should_save:
            # axolotl has left the process group by now, which its logger would ask for the rank.
            LOG.info("%s", final_words(cfg), main_process_only=False)
            progress.tell(said=final_words(cfg))
            report = self._trainer.health
            if report is not None and report.health is not None and report.health.standing:
                warnings = standing_warnings(report.health.standing)
                LOG.warning("%s", warnings, main_process_only=False)
                progress.tell(warning=warnings)
        self._trainer = None
        run_lock.release()


def _student_device() -> str:
    """The device that axolotl will give the student, before there is one."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
