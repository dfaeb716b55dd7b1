"""A recipe's file, and what `dwakd` adds to its keys before axolotl gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.teacher import teacher_keys
from dwakd_plugin.recipe.teachers import with_one_of

PLUGIN = "dwakd_plugin.DWAKDPlugin"

# What belongs to the teacher that a recipe names, and not to the one on the command line.
TEACHERS_OWN = (
    *("tokenizer", "adapter", "revision", "chat_template"),
    *("server", "model", "server_requests", "server_patience"),
)


def read_recipe(file: Path) -> dict[str, Any]:
    """A recipe as axolotl reads it. Raises UserError where it is none."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except IsADirectoryError:
        recipes = sorted(path.name for path in file.glob("*.y*ml"))
        hint = f" It has: {', '.join(recipes)}." if recipes else ""
        raise UserError(f"The recipe `{file}` is a folder; give a YAML file.{hint}") from None
    except FileNotFoundError:
        raise UserError(
            f"The recipe `{file}` does not exist. Give an axolotl recipe (YAML); "
            "`dwakd recipes list` shows those that come with dwakd."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe `{file}` cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"The recipe `{file}` isn't valid YAML: {error}") from error
    # What PyYAML lets through where a value does not fit its tag (2024-99-99, !!int x, !!bool x).
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The recipe `{file}` has a value that YAML cannot read: {type(error).__name__}: "
            f"{error}. Look at its dates, its `!!` tags and how deep its brackets go."
        ) from error
    if not isinstance(recipe, dict):
        raise UserError(f"The recipe `{file}` has no keys; give an axolotl recipe (YAML).")
    return recipe


def with_distillation(
    recipe: dict[str, Any], teacher: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The recipe with all that distillation needs, and what that changed, one line each.

    `teacher` overrides keys of `dwakd.teacher`; of several, its `base_model` is the name of the one
    that is meant. The recipe itself is left as it is. Raises UserError where neither names a
    teacher.
    """
    recipe, changes = dict(recipe), []
    block = recipe.get("dwakd")
    if not teacher and block is None and recipe.get("distillation") is None:
        raise UserError(
            "The recipe names no teacher. Give one with `--teacher ID` (a hub id or a folder), or "
            "add\n  distillation: dwakd\n  dwakd:\n    teacher:\n      base_model: <hub id or "
            "folder>"
        )
    if recipe.get("distillation") is None:
        # What a recipe that was written without a teacher may have, and distillation cannot.
        if block is None:
            if recipe.get("batch_flattening"):
                recipe["batch_flattening"] = False
                changes.append(
                    "batch_flattening is off: it cannot be paired with the teacher's rows, which "
                    "`sample_packing: true` can"
                )
            if recipe.pop("loss_watchdog_threshold", None):
                changes.append(
                    "loss_watchdog_threshold is left out: it is for a cross-entropy, and the whole "
                    "objective is larger"
                )
        recipe["distillation"] = "dwakd"
    if teacher and isinstance(block, dict) and isinstance(block.get("teachers"), list):
        given = dict(teacher)
        recipe = with_one_of(recipe, given.pop("base_model", None), given)
        block, teacher = recipe["dwakd"], {}
    own = teacher_keys(block.get("teacher")) if isinstance(block, dict) else block
    if teacher and (own is None or isinstance(own, dict)):  # else it is left to the schema
        block, own = block or {}, own or {}
        if "base_model" in teacher and own.get("base_model") != teacher["base_model"]:
            own = {key: value for key, value in own.items() if key not in TEACHERS_OWN}
        recipe["dwakd"] = block | {"teacher": own | teacher}
    plugins = recipe.get("plugins") or []
    if isinstance(plugins, list) and PLUGIN not in plugins:
        recipe["plugins"] = [*plugins, PLUGIN]
    return recipe, changes
