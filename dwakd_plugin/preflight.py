"""What can be found wrong before any model is loaded: in the recipe, and in the output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dwakd_plugin.config import DWAKDConfig, UserError

RUN_FILE = Path("dwakd") / "run.json"  # within the output folder: whose run it holds

# Settings of axolotl that distillation does not go with: key, and what to do about it.
_CONFLICTS = {
    "sample_packing": "packed samples cannot be paired with the teacher's yet; set it false",
    "eval_sample_packing": "packed samples cannot be paired with the teacher's yet; set it false",
    "batch_flattening": "flattened samples cannot be paired with the teacher's; remove it",
    "pretraining_dataset": "distillation needs rows with a response; use `datasets`",
    "streaming": "the two sides of a row are prepared before training; remove it",
    "skip_prepare_dataset": "rows must be tokenised for both models; remove it",
    "rl": "distillation is supervised fine-tuning; remove `rl` and give instruction data",
    "reward_model": "distillation trains a causal language model; remove it",
    "process_reward_model": "distillation trains a causal language model; remove it",
    "kd_trainer": "this is axolotl's own distillation; choose one of the two",
    "label_smoothing_factor": "the teacher's distribution takes its place; remove it",
    "processor_type": "multimodal data has no teacher's side; remove it",
    "use_eaft": "it weights the labels' loss in its own way; remove it",
    "fsdp": "sharded training is not supported yet; use one process or DDP",
    "fsdp_config": "sharded training is not supported yet; use one process or DDP",
    "deepspeed": "sharded training is not supported yet; use one process or DDP",
}


def check_recipe(recipe: Any) -> None:
    """Raises UserError that names every setting distillation does not go with."""
    problems = [
        f"  {key}: {recipe.get(key)} — {remedy}"
        for key, remedy in _CONFLICTS.items()
        if recipe.get(key)
    ]
    for key in ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"):
        if (recipe.get(key) or 1) > 1:
            problems.append(f"  {key}: {recipe.get(key)} — sequences must be whole; set it to 1")
    if not recipe.get("datasets"):
        problems.append("  datasets: none given — add the rows to train on")
    if problems:
        raise UserError(
            "The recipe asks for what does not go with `distillation: dwakd`:\n"
            + "\n".join(problems)
        )


def run_identity(recipe: Any, config: DWAKDConfig) -> dict[str, str]:
    """Which run an output folder belongs to."""
    return {
        "student": str(recipe["base_model"]),
        "teacher": config.teacher.base_model,
        "adapter": str(recipe.get("adapter") or "none"),
    }


def check_output_folder(recipe: Any, config: DWAKDConfig) -> None:
    """Raises UserError where the output folder holds a run that this one would overwrite.

    Checkpoints that were cut off while being written are set aside, so that a resumed run takes the
    last whole one.
    """
    folder = Path(recipe["output_dir"])
    resumes = bool(
        recipe.get("resume_from_checkpoint") or recipe.get("auto_resume_from_checkpoints")
    )
    own = run_identity(recipe, config)
    found = _read_identity(folder / RUN_FILE)
    if resumes:
        if found is not None and found != own:
            differing = "\n".join(
                f"  {key}: {found.get(key)} there, {value} in this recipe"
                for key, value in own.items()
                if found.get(key) != value
            )
            raise UserError(
                f"output_dir {folder} holds another run, which this one cannot resume:\n"
                f"{differing}\nGive another output_dir."
            )
        _set_incomplete_checkpoints_aside(folder)
        return
    held = [
        path.name
        for pattern in ("checkpoint-*", "*.safetensors")
        for path in sorted(folder.glob(pattern))
    ]
    if held:
        whose = f" ({found['teacher']} teaching {found['student']})" if found else ""
        raise UserError(
            f"output_dir {folder} holds a run already{whose}: {', '.join(held[:4])}. Resume it "
            "with `auto_resume_from_checkpoints: true`, give another output_dir, or remove it."
        )


def _read_identity(file: Path) -> dict[str, str] | None:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["identity"])
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}). Give another output_dir.") from error


def _set_incomplete_checkpoints_aside(folder: Path) -> None:
    """Renames checkpoints whose last file was never written, so that none is resumed from."""
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            aside = checkpoint.with_name(f"incomplete-{checkpoint.name}")
            suffix = 1
            while aside.exists():
                suffix += 1
                aside = checkpoint.with_name(f"incomplete-{checkpoint.name}.{suffix}")
            checkpoint.rename(aside)
