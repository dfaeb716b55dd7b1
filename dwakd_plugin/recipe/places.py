"""Files and folders that a recipe names, and whether they are there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.checks import entries
from dwakd_plugin.recipe.schema import name_problem


def check_files(recipe: dict[str, Any]) -> None:
    """Raises UserError that names every local file or folder of the recipe that is not there.

    What may be a hub id is left to the hub, unless that is switched off.
    """
    problems = [
        f"  {place}: {found} — {remedy}"
        for place, found, remedy in _missing(recipe)
        if remedy is not None
    ]
    if not recipe.get("base_model"):
        problems.insert(0, "  base_model: none given — name the student, a folder or a hub id")
    if problems:
        raise UserError(
            f"The recipe names what is not there (paths start in {Path.cwd()}):\n"
            + "\n".join(problems)
        )


def _missing(recipe: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """Place in the recipe, value, and remedy or None where nothing is wrong."""
    block = recipe.get("dwakd")
    teacher = block.get("teacher") if isinstance(block, dict) else None
    if isinstance(teacher, str):
        teacher = {"base_model": teacher}
    models = {
        "base_model": recipe.get("base_model"),
        "tokenizer_config": recipe.get("tokenizer_config"),
        "lora_model_dir": recipe.get("lora_model_dir"),
    }
    if isinstance(teacher, dict):
        models |= {
            f"dwakd.teacher.{key}": teacher.get(key)
            for key in ("base_model", "tokenizer", "adapter")
        }
    for place, model in models.items():
        if isinstance(model, str) and name_problem(model) is None:
            yield place, model, model_remedy(model, is_adapter="model_dir" in place)
    projectors = block.get("projectors") if isinstance(block, dict) else None
    files = {
        "dwakd.projectors.path": projectors.get("path") if isinstance(projectors, dict) else None,
        "resume_from_checkpoint": recipe.get("resume_from_checkpoint"),
    }
    for place, file in files.items():
        if isinstance(file, str) and name_problem(file) is None and not Path(file).exists():
            yield place, file, "no such file or folder"
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(entries(recipe.get(key))):
            path = dataset.get("path") if isinstance(dataset, dict) else None
            if isinstance(path, str):
                yield f"{key}[{index}].path", path, _dataset_remedy(path)


def model_remedy(model: str, *, is_adapter: bool) -> str | None:
    """What is wrong with a model's folder or hub id, as far as can be seen here; None: nothing."""
    folder = Path(model)
    if folder.is_dir():
        names = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
        if any((folder / name).is_file() for name in names):
            return None
        return "a folder without a model's config.json"
    if folder.exists():
        return "a file; give the model's folder"
    if is_adapter or is_a_path(model):
        return "no such folder"
    if not _hub_is_off():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        names = ("config.json", "adapter_config.json", "tokenizer_config.json")
        if any(isinstance(try_to_load_from_cache(model, name), str) for name in names):
            return None
    except HFValidationError:
        return "no such folder, and no valid hub id"
    return "no such folder, not among the downloaded models, and HF_HUB_OFFLINE is set"


def _dataset_remedy(path: str) -> str | None:
    data_file = Path(path).suffix in (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")
    if Path(path).exists() or "://" in path or not (is_a_path(path) or data_file):
        return None
    return "no such file or folder"


def is_a_path(name: str) -> bool:
    """Whether a name cannot be a hub id, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _hub_is_off() -> bool:
    switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in switches)
