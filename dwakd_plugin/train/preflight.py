"""What can be found wrong before any model is loaded: in the recipe, and in the output folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.run_lock import check_free
from dwakd_plugin.models.teacher.quantisation import check_packages, own_quantisation
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.checks import (
    check_data_types,
    check_kinds,
    check_recipe,
    check_taught,
    is_sharded,
)
from dwakd_plugin.recipe.places import check_files
from dwakd_plugin.recipe.schema import DWAKDConfig, TeacherConfig
from dwakd_plugin.train.run_folder import check_output_folder


def check_all(recipe: Recipe) -> None:
    """Raises UserError where a run cannot begin with a recipe, with the findings of every check.

    They are: the schema of the `dwakd:` block, settings that distillation does not go with, missing
    files and folders, the output folder.
    """
    findings: list[str] = []

    def passes(check: Callable[[Recipe], Any]) -> bool:
        try:
            check(recipe)
        except UserError as error:
            findings.append(str(error))
            return False
        return True

    parsed = passes(lambda recipe: recipe.config)
    checks: list[Callable[[Recipe], Any]] = []
    if passes(check_kinds):  # the rest reads these values
        checks += [check_recipe, check_data_types, check_files]
        if parsed:
            checks += [check_taught, check_variant]
            checks.append(lambda recipe: check_teacher_recipe(recipe.config))
        # What is whose run can be said of a recipe that names both models.
        if parsed and recipe.base_model:
            checks.append(lambda recipe: check_free(recipe.output_dir))
            checks.append(partial(check_output_folder, only_look=True))
    for check in checks:
        passes(check)
    if findings:
        raise UserError("\n".join(findings))


def check_variant(recipe: Recipe) -> None:
    """Raises UserError where the variant does not go with what runs the student, or with what the
    teacher gives."""
    try:
        sharded = is_sharded(recipe)
    except (OSError, ValueError):  # `check_recipe` has told of it
        sharded = False
    loss = recipe.config.loss
    tops = [one.top_k for one in recipe.config.each_teacher if one.top_k is not None]
    if not sharded and not tops:
        return
    from dwakd_plugin.loss import variant_of

    variant, clash = variant_of(loss), "These settings do not work with `distillation: dwakd`:\n  "
    if tops and loss.needs_teacher:
        if variant.needs_states(loss):
            whose, remedy = f"loss.matching: {loss.matching}", "use variant `mapped`"
            bare = loss.model_copy(update={"dtw_weight": 0.0, "cosine_weight": 0.0})
            if not variant.needs_states(bare):
                remedy = "set both weights to 0"
                whose = f"dtw_weight: {loss.dtw_weight:g}, cosine_weight: {loss.cosine_weight:g}"
            raise UserError(
                f"{clash}dwakd.teacher.top_k: {tops[0]} — variant `{recipe.config.variant}` "
                f"({whose}) learns from the teacher's hidden states, and with top_k it gives its "
                f"likeliest tokens alone; {remedy}, or remove top_k"
            )
        if loss.temperature != 1:
            raise UserError(
                f"{clash}dwakd.loss.temperature: {loss.temperature:g} — of the tokens outside "
                "teacher.top_k nobody knows what they would be at another temperature than 1; set "
                "it to 1, or remove top_k"
            )
    if sharded and variant.follows_head:
        raise UserError(
            f"{clash}dwakd.loss.matching: {loss.matching} — its map between the heads follows the "
            "whole student, which no process holds under FSDP and ZeRO-3; use DDP, ZeRO-1 or ZeRO-2"
        )


def check_teacher_recipe(config: DWAKDConfig) -> None:
    """Raises UserError where the teacher's quantisation, attention or device isn't available here.

    Looks at the packages, and no further where the recipe leaves attention and device to us: only
    then are torch and transformers not needed for it.
    """
    for teacher in config.each_teacher if config.loss.needs_teacher else ():
        if loads_body(teacher, config):
            _check_loading(teacher)


def _check_loading(teacher: TeacherConfig) -> None:
    file = Path(teacher.base_model) / "config.json"
    model_config: dict[str, Any] = {}
    if file.is_file():
        try:
            model_config = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"The teacher's {file} is damaged: {error}") from error
    check_packages(teacher, own_quantisation(model_config))
    usual = teacher.attn_implementation in ("auto", "sdpa", "eager")
    if not usual or teacher.device is not None:
        import torch

        from dwakd_plugin.models.teacher.loaded import check_teacher

        check_teacher(teacher, "cuda:0" if torch.cuda.is_available() else "cpu")


def loads_body(teacher: TeacherConfig, config: DWAKDConfig) -> bool:
    """Whether a run loads more of the teacher than head and embeddings, as far as can be seen."""
    if teacher.server is not None:
        return False
    return config.sampled_answers is not None or not has_index(teacher)


def has_index(teacher: TeacherConfig) -> bool:
    """Whether the recipe names a cache that is there, filled or not."""
    if teacher.cache is None or not Path(teacher.cache).is_dir():
        return False
    from dwakd_plugin.models.teacher.cache import INDEX

    return (Path(teacher.cache) / INDEX).is_file()
