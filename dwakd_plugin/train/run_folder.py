"""A run's output folder: whose it is, and what of it can be resumed."""

from __future__ import annotations

import json
import os
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import dwakd_plugin
from dwakd_plugin.errors import UserError, without_credentials
from dwakd_plugin.io.files import explaining_writes, json_checksum, replace_file
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.places import is_a_path
from dwakd_plugin.recipe.schema import LossConfig
from dwakd_plugin.tokenizers.template_date import read_date, today

RUN_FILE = Path("dwakd") / "run.json"  # within the output folder: whose run it holds
CHECKSUM = "crc32"  # of all else in that file
# Of `loss`, what says which projectors train.
_PROJECTORS_BY = ("matching", "kd_weight", "dtw_weight", "cosine_weight")

_TRAINING_KEYS = (
    "adapter",
    "lora_r",
    "lora_alpha",
    "learning_rate",
    "lr_scheduler",
    "optimizer",
    "num_epochs",
    "max_steps",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "sequence_len",
    "seed",
)


def run_identity(recipe: Recipe) -> dict[str, str]:
    """Which run an output folder belongs to."""
    return {
        "student": recipe.base_model,
        "teacher": recipe.config.teachers_called,
        "adapter": recipe.adapter or "none",
    }


def run_facts(recipe: Recipe) -> dict[str, Any]:
    """What a run was trained on and how, for its records. Local files go by their last name."""
    data = []
    for dataset in recipe.datasets:
        path = str(dataset.get("path"))
        name = Path(path).name if Path(path).exists() or is_a_path(path) else path
        data.append(f"{without_credentials(name)} ({dataset.get('type')})")
    return {
        "data": data,
        "training": {
            key: recipe.keys[key]
            for key in _TRAINING_KEYS
            if recipe.keys.get(key) not in (None, "")
        },
    }


def template_day(recipe: Recipe) -> date:
    """The day that the run's chat templates print: of a run that resumes, the first half's."""
    file = recipe.output_dir / RUN_FILE
    record = (read_run_file(file) if recipe.resumes else None) or {}
    day = record.get("template_date")
    return today() if day is None else read_date(day, file)


def sign_output_folder(recipe: Recipe) -> None:
    """Says in the output folder whose run it holds, and with what settings. Raises UserError."""
    file = recipe.output_dir / RUN_FILE
    content: dict[str, Any] = {
        "identity": run_identity(recipe),
        "version": dwakd_plugin.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "template_date": template_day(recipe).isoformat(),
        "settings": recipe.config.model_dump(),
        **run_facts(recipe),
    }
    with explaining_writes(file, "Free some space, and run it again."):
        file.parent.mkdir(parents=True, exist_ok=True)
        content[CHECKSUM] = json_checksum(json.loads(json.dumps(content)))
        replace_file(file, json.dumps(content, indent=1))


def check_output_folder(recipe: Recipe, *, only_look: bool = False) -> None:
    """Raises UserError where the output folder holds a run that this one would overwrite.

    Checkpoints that were cut off while being written are set aside, so that a resumed run takes the
    last whole one; `only_look` changes nothing.
    """
    folder = recipe.output_dir
    _check_writable(folder)
    own = run_identity(recipe)
    record = read_run_file(folder / RUN_FILE)
    found = None if record is None else record.get("identity")
    if recipe.resumes:
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
        _check_form(folder, record or {}, recipe)
        if not only_look:
            set_incomplete_checkpoints_aside(folder)
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


def _check_form(folder: Path, record: dict[str, Any], recipe: Recipe) -> None:
    """Raises UserError where a run would go on with another form of the loss than it began with.

    A recipe without a variant meant the paper's form once, and doesn't now.
    """
    settings = record.get("settings") or {}
    began, now = (settings.get("loss") or {}).get("matching"), recipe.config.loss.matching
    if began not in (None, now):
        raise UserError(
            f"output_dir {folder} holds a run of variant `{settings.get('variant')}` (loss."
            f"matching: {began}), and this recipe would go on with `{recipe.config.variant}` "
            f"({now}). Write `variant: {settings.get('variant')}` into the recipe's `dwakd:` block "
            "to go on as it began, or give another output_dir."
        )
    if began is not None:
        _check_projectors(folder, settings["loss"], recipe.config.loss)


def _check_projectors(folder: Path, began: dict[str, Any], now: LossConfig) -> None:
    """Raises UserError where others train than did: the optimizer's state would not be theirs."""
    from dwakd_plugin.loss import trained_projectors  # torch, which nothing else here needs

    was = LossConfig.model_validate({key: began.get(key, 0) for key in _PROJECTORS_BY})
    had, has = (sorted(trained_projectors(loss)) for loss in (was, now))
    if had != has:
        weights = ", ".join(f"{key}: {getattr(was, key):g}" for key in _PROJECTORS_BY[1:])
        raise UserError(
            f"output_dir {folder} holds a run that trains {_projectors(had)} ({weights}), and this "
            f"recipe would go on with {_projectors(has)}. Give dwakd.loss these weights to go on "
            "as it began, or give another output_dir."
        )


def _projectors(names: list[str]) -> str:
    return f"the projectors {', '.join(names)}" if names else "no projectors"


def _check_writable(folder: Path) -> None:
    """Raises UserError where the folder, or the nearest that exists above it, takes no files."""
    nearest = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    if not nearest.is_dir():
        raise UserError(f"output_dir {folder}: {nearest} is a file. Give another output_dir.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: {nearest} is not writable. Give another output_dir.")


def read_run_file(file: Path) -> dict[str, Any] | None:
    """What a run says of itself; None where there is none. Raises UserError where it is damaged."""
    try:
        record = dict(json.loads(file.read_text(encoding="utf-8")))
        expected = record.pop(CHECKSUM, None)
        if expected is not None and expected != json_checksum(record):
            raise ValueError("its checksum does not match")
        if not isinstance(record.get("identity", {}), dict):
            raise TypeError("its `identity` isn't a mapping")
        return record
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({error}). Give another output_dir; or remove the file, if the "
            "folder is the run that you mean."
        ) from error


def set_incomplete_checkpoints_aside(folder: Path) -> None:
    """Renames checkpoints whose last file was never written, so that none is resumed from.

    Removes what a kill left of a student that was being written: safetensors' own partial file.
    """
    for left in folder.glob(".tmp??????"):
        left.unlink()
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
