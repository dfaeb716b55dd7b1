"""Opens what a recipe would train with, models, rows and projectors, without training it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dwakd_plugin.errors import UserError
from dwakd_plugin.io import run_lock
from dwakd_plugin.recipe import ENGINE_KEYS, Recipe
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.tokenizers.loading import load_tokenizer
from dwakd_plugin.train.preflight import check_all, loads_body

# Beginnings of axolotl's keys that ask for a device, and that rows have nothing to do with.
_OF_A_DEVICE = (
    *("adapter", "load_in_", "lora_", "bf", "fp", "tf32", "float", "flash_", "attn_", "sdp_"),
    *("flex_", "xformers_", "torch_compile", "gradient_checkpointing", "quantization", "qat"),
)

if TYPE_CHECKING:
    from dwakd_plugin.data.raw_rows import Prompts
    from dwakd_plugin.data.row_report import RowReport
    from dwakd_plugin.train.distillation import Distillation


@dataclass
class OpenRun:
    """A recipe's run, ready to train and not started.

    `trainer` has the student (`trainer.model`), its tokenizer (`processing_class`), both data sets
    with the rows of both sides, and the collator; `distillation` the teacher and the projectors.
    """

    cfg: Any
    config: DWAKDConfig
    trainer: Any
    distillation: Distillation


@contextlib.contextmanager
def open_run(recipe: Recipe, checkpoint: Path | None = None) -> Iterator[OpenRun]:
    """Loads all that a recipe's training would, through axolotl, and trains nothing.

    `checkpoint` is a run's output
    folder or one of its checkpoints: its student (weights or LoRA adapter) and its projectors
    take the place of the recipe's. The recipe's output folder is neither looked at nor written to,
    and projectors are not warmed up. What axolotl says goes nowhere, unless it fails.

    Raises UserError where the recipe or the checkpoint cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="dwakd-") as folder:
        own = _without_a_run(recipe, folder)
        if checkpoint is not None:
            own = _from_checkpoint(own, checkpoint)
        file = _checked(own, Path(folder))
        try:
            with _quiet():
                cfg, trainer = _load(file)
            distillation = trainer.distillation
            if checkpoint is not None:
                from dwakd_plugin.models.projectors import PROJECTOR_FILE, load_projectors

                # The file has the signature of the head that the run began with.
                pair = distillation.pair | {"student": recipe.base_model}
                del pair["student_head"]
                load_projectors(distillation.projectors, checkpoint / PROJECTOR_FILE, pair)
                distillation = trainer.distillation = replace(distillation, pair=pair)
            yield OpenRun(cfg, own.config, trainer, distillation)
        finally:
            _close()


@contextlib.contextmanager
def open_rows(recipe: Recipe) -> Iterator[tuple[DWAKDConfig, list[Any], RowReport]]:
    """The settings, the data sets to train and to evaluate on with both sides of each row, and what
    became of the rows.

    As `open_run` has them, and without loading a model. A data set may be None. Raises UserError.
    """
    with tempfile.TemporaryDirectory(prefix="dwakd-") as folder:
        own = _without_a_run(recipe, folder)
        file = _checked(own, Path(folder))
        try:
            with _quiet(), _axolotl(file) as (cfg, manager):
                rows = manager.load_datasets(cfg, preprocess=False)
            reports = [getattr(plugin, "rows", None) for plugin in manager.plugins.values()]
            (report,) = filter(None, reports)
            yield own.config, [rows.train_dataset, rows.eval_dataset], report
        finally:
            _close()


@contextlib.contextmanager
def open_prompts(recipe: Recipe) -> Iterator[Prompts]:
    """The rows that a recipe trains on as they were written, with the teacher's prompts to come.

    Reads no model. Raises UserError.
    """
    from dwakd_plugin.data.raw_rows import read_prompts

    with tempfile.TemporaryDirectory(prefix="dwakd-") as folder:
        own = _without_a_run(recipe, folder)
        file = _checked(own, Path(folder))
        name = own.tokenizer
        revision = own.keys.get("revision_of_model")
        student = load_tokenizer(name, f"The student's tokenizer `{name}`", revision=revision)
        try:
            with _quiet(), _axolotl(file) as (cfg, _):
                prompts = read_prompts(cfg, own.config, own.datasets, student)
            yield prompts
        finally:
            _close()


def look_at_data(recipe: Recipe) -> None:
    """Raises UserError for what axolotl's start would find before it loads a model.

    That is: settings that it refuses, data sets that cannot be trained on, a teacher that mixes
    packed rows. Nothing is written, and what needs a run's GPU, as its precision, isn't looked at.
    """
    with tempfile.TemporaryDirectory(prefix="dwakd-") as folder:
        device_keys = [key for key in recipe.keys if str(key).startswith(_OF_A_DEVICE)]
        own = _without_a_run(recipe, folder).but(*device_keys, bf16=False, fp16=False)
        file = _checked(own, Path(folder))
        try:
            with _quiet(), _axolotl(file) as (cfg, _):
                import torch

                from dwakd_plugin.data.first_rows import check_first_rows
                from dwakd_plugin.data.packing import check_packing_of_teacher
                from dwakd_plugin.data.teacher_side import teacher_sides

                config = own.config
                for teacher in config.each_teacher if config.loss.needs_teacher else ():
                    if own.packs and teacher.cache is None and loads_body(teacher, config):
                        device = "cuda:0" if torch.cuda.is_available() else "cpu"
                        check_packing_of_teacher(teacher, device)
                check_first_rows(cfg, teacher_sides(cfg, config))
        finally:
            _close()


def _checked(recipe: Recipe, folder: Path) -> Path:
    """A file of the recipe, for axolotl. Raises UserError where a run cannot begin with it."""
    check_all(recipe)
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump(dict(recipe.keys), sort_keys=False), encoding="utf-8")
    # It hangs at exit where it is offline, and its copy of the output would be one of ours.
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    os.environ["AXOLOTL_TEE_STDOUT"] = "0"
    return file


def _without_a_run(recipe: Recipe, folder: str) -> Recipe:
    """The recipe for one process, with an output folder of its own.

    No run is refused, resumed or signed, and nothing is sharded.
    """
    own = recipe.but(
        "resume_from_checkpoint",
        *ENGINE_KEYS,
        output_dir=str(Path(folder) / "out"),
        auto_resume_from_checkpoints=False,
    )
    if recipe.config.projectors.warmup_steps == 0:
        return own  # a block of projectors would mean another variant where none is named
    return own.with_block("projectors", warmup_steps=0)


def _from_checkpoint(recipe: Recipe, checkpoint: Path) -> Recipe:
    from dwakd_plugin.models.projectors import PROJECTOR_FILE

    adapter = (checkpoint / "adapter_config.json").is_file()
    if not adapter and not (checkpoint / "config.json").is_file():
        raise UserError(
            f"{checkpoint} holds neither a student (config.json) nor its adapter "
            "(adapter_config.json). Give a run's output folder or one of its checkpoints."
        )
    if not (checkpoint / PROJECTOR_FILE).is_file():
        raise UserError(
            f"{checkpoint} holds no {PROJECTOR_FILE}: it was not written by a run with a teacher."
        )
    # The checkpoint's projectors are read in the end, for the pair that the recipe names.
    recipe = recipe.with_block("projectors", path=None, init="random")
    if adapter:
        return recipe.but(lora_model_dir=str(checkpoint))
    return recipe.but(base_model=str(checkpoint), tokenizer_config=recipe.tokenizer)


def _load(file: Path) -> tuple[Any, Any]:
    """axolotl's way to a trainer, up to where `axolotl train` would start it."""
    from axolotl.train import setup_model_and_trainer

    with _axolotl(file) as (cfg, manager):
        trainer, *_ = setup_model_and_trainer(cfg, manager.load_datasets(cfg, preprocess=False))
    if getattr(trainer, "distillation", None) is None:
        raise UserError("axolotl did not load dwakd's plugin, so there is no teacher.")
    return cfg, trainer


@contextlib.contextmanager
def _axolotl(file: Path) -> Iterator[tuple[Any, Any]]:
    """axolotl's settings and plugins for a recipe; its errors become UserError."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    manager.plugins.clear()
    try:
        yield load_cfg(str(file)), manager
    except SystemExit as error:
        # The plugin's hooks end the process with a message, which axolotl's log swallows here.
        if isinstance(error.__context__, UserError):
            raise UserError(str(error.__context__)) from error
        raise
    except UserError:
        raise
    except Exception as error:  # axolotl and the libraries below it raise whatever they like
        raise UserError(
            f"axolotl cannot load what the recipe asks for: {type(error).__name__}: {error}\n"
            "`dwakd --debug` before the command shows where."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what axolotl and its libraries print, and shows it only where they fail."""
    said = io.StringIO()  # never closed: loggers made meanwhile keep writing to it
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise


def _close() -> None:
    # Only what was imported: after Ctrl-C in the midst of it, another try would take seconds and
    # fail on what is half there.
    base = sys.modules.get("axolotl.integrations.base")
    tee = sys.modules.get("axolotl.utils.tee")
    if base is not None:
        base.PluginManager.get_instance().plugins.clear()
    run_lock.release()
    if tee is not None:
        tee.close_debug_log()
