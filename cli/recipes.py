"""`dwakd recipes`: the recipes that come with dwakd."""

from __future__ import annotations

import difflib
import json
import sys
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from rich.padding import Padding
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes, replace_file

# The first word of a recipe's name says what it is for; in the order of the list.
GROUPS = {
    "chat": "Today's models, chat data, one GPU",
    "axolotl": "An axolotl recipe of your own, with a teacher",
    "paper": "The paper's pairs on one GPU, and the teachers before they teach",
    "quickstart": "On a CPU: what `dwakd quickstart` runs",
}


def list_recipes(*, json_output: bool) -> None:
    """Name, purpose, student and teacher of each, by group, as text or as JSON."""
    recipes = [
        describe(name, file.read_text(encoding="utf-8")) for name, file in _shipped().items()
    ]
    if json_output:
        print(json.dumps(recipes, indent=1))
        return
    console = PlainConsole()
    for group, title in GROUPS.items():
        console.print(Text(title, style="bold cyan"))
        for recipe in recipes:
            if recipe["group"] == group:
                console.print(Padding(Text(recipe["name"], style="bold"), (0, 0, 0, 2)))
                models = f"model {recipe['student']}, without a teacher"
                if recipe["teacher"]:
                    models = f"student {recipe['student']}, teacher {recipe['teacher']}"
                console.print(Padding(Text(f"{recipe['purpose']}\n{models}"), (0, 0, 1, 4)))
    console.print("`dwakd recipes show NAME` prints one, `dwakd recipes copy NAME` copies it.")


def show(name: str) -> None:
    """The recipe as it is, comments included."""
    # The file's bytes: UTF-8 whatever the terminal's encoding, so that `> FILE` is a recipe.
    sys.stdout.buffer.write(find(name).read_bytes())


def copy(name: str, dest: Path | None, *, force: bool) -> Path:
    """Copies a recipe into a file or folder, by default here; returns the file.

    Raises UserError where the file exists already, unless `force`.
    """
    recipe = find(name)
    file = dest or Path(recipe.name)
    if file.is_dir():
        file = file / recipe.name
    if file.exists() and not force:
        raise UserError(f"`{file}` exists. Give another destination, or --force to overwrite it.")
    with explaining_writes(f"`{file}`"):
        replace_file(file, recipe.read_text(encoding="utf-8"))
    return file


def find(name: str) -> Traversable:
    """A shipped recipe by its name, with or without `.yml`. Raises UserError."""
    recipes = _shipped()
    name = name.removesuffix(".yml")
    if name not in recipes:
        nearest = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean `{nearest[0]}`?" if nearest else f"there are: {', '.join(recipes)}."
        raise UserError(f"No recipe is called `{name}`; {hint}")
    return recipes[name]


def describe(name: str, text: str) -> dict[str, Any]:
    """What the list says of a recipe: its opening comment, and its models."""
    opening = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        opening.append(line.lstrip("# ").rstrip())
    recipe = yaml.safe_load(text)
    teacher = (recipe.get("dwakd") or {}).get("teacher")
    return {
        "name": name,
        "group": name.partition("-")[0],
        "purpose": " ".join(opening),
        "student": recipe.get("base_model"),
        "teacher": teacher.get("base_model") if isinstance(teacher, dict) else teacher,
    }


def _shipped() -> dict[str, Traversable]:
    files = resources.files("dwakd_recipes").iterdir()
    return {
        file.name.removesuffix(".yml"): file
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".yml")
    }
