"""Files and folders that a recipe names, and whether they are there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.adapters import base_of_adapter
from dwakd_plugin.recipe.messages import name_problem
from dwakd_plugin.recipe.recipe import Recipe


def check_files(recipe: Recipe) -> None:
    """Raises UserError that names every local file or folder of the recipe that is not there.

    What may be a hub id is left to the hub, unless that is switched off.
    """
    problems = [
        f"  {place}: {found} — {remedy}"
        for place, found, remedy in _missing(recipe)
        if remedy is not None
    ]
    if not recipe.base_model:
        problems.insert(0, "  base_model: none given — name the student, a folder or a hub id")
    if problems:
        raise UserError(
            f"The recipe names things that are not there (relative paths start in {Path.cwd()}):\n"
            + "\n".join(problems)
        )


def _missing(recipe: Recipe) -> Iterator[tuple[str, str, str | None]]:
    """Place in the recipe, value, and remedy or None where nothing is wrong."""
    own = ("base_model", "tokenizer_config", "lora_model_dir")
    models = {key: recipe.keys.get(key) for key in own}
    for place, teacher in recipe.written_teachers.items():
        for key in ("base_model", "tokenizer", "adapter"):
            models[f"{place}.{key}"] = teacher.get(key) if isinstance(teacher, dict) else None
    for place, model in models.items():
        if _is_name(model):
            remedy = model_remedy(model, is_adapter="model_dir" in place)
            if place == "base_model" and (base := base_of_adapter(model)) is not None:
                remedy = (
                    f"a LoRA without its base model; to train it on, `base_model: {base}` and "
                    f"`lora_model_dir: {model}`; to train all of it, `dwakd export` it first"
                )
            yield place, model, remedy
            if "teacher" in place and (base := base_of_adapter(model)) is not None:
                below = model_remedy(base, is_adapter=False)
                yield place, f"{model} (a LoRA on {base})", below and f"its base model: {below}"
    files = {
        "dwakd.projectors.path": recipe.written("projectors", "path"),
        "resume_from_checkpoint": recipe.keys.get("resume_from_checkpoint"),
    }
    for place, file in files.items():
        if _is_name(file) and not Path(file).exists():
            yield place, file, "no such file or folder"
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(recipe.keys.get(key) or []):
            path = dataset.get("path")
            if isinstance(path, str):
                yield f"{key}[{index}].path", path, _dataset_remedy(path)


def _is_name(value: Any) -> TypeGuard[str]:
    """Whether a value can be a name at all: where it can't, the schema says so."""
    return isinstance(value, str) and name_problem(value) is None


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
        cached = ("config.json", "adapter_config.json", "tokenizer_config.json")
        if any(isinstance(try_to_load_from_cache(model, name), str) for name in cached):
            return None
    except HFValidationError:
        return "no such folder, and no valid hub id"
    return "no such folder, not among the downloaded models, and HF_HUB_OFFLINE is set"


def _dataset_remedy(path: str) -> str | None:
    data_file = Path(path).suffix in (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")
    if Path(path).exists() or "://" in path:
        return None
    if is_a_path(path) or data_file:
        return "no such file or folder"
    if not _hub_is_off():
        return None
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="dataset")
    if (folder / "snapshots").is_dir():
        return None
    return "no such folder, not among the downloaded data sets, and HF_HUB_OFFLINE is set"


def is_a_path(name: str) -> bool:
    """Whether a name cannot be a hub id, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _hub_is_off() -> bool:
    switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in switches)
