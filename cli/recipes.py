"""`dwakd recipes`: the recipes that come with dwakd."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_plugin.errors import UserError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

# The first word of a recipe's name says what it is for; in the order of the list.
GROUPS = {
    "chat": "Today's models, chat data, one GPU",
    "several": "Two teachers, each of its own rows",
    "served": "A teacher on a server of its own, several GPUs",
    "axolotl": "An axolotl recipe of your own, with a teacher",
    "paper": "The paper's pairs on one GPU, and the teachers before they teach",
    "quickstart": "On a CPU: what `dwakd quickstart` runs",
}


app = typer.Typer(help="The recipes that come with dwakd.", no_args_is_help=True)


@app.command("list", epilog="Example:  dwakd recipes list --json")
def list_recipes(
    json_output: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the recipes: what each is for, its student and its teacher."""
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


@app.command(epilog="Example:  dwakd recipes show quickstart-dwakd")
def show(name: Annotated[str, typer.Argument(help="As in `dwakd recipes list`.")]) -> None:
    """Print a recipe."""
    # The file's bytes: UTF-8 whatever the terminal's encoding, so that `> FILE` is a recipe.
    sys.stdout.buffer.write(find(name).read_bytes())


@app.command(epilog="Example:  dwakd recipes copy quickstart-dwakd my-recipe.yml")
def copy(
    name: Annotated[str, typer.Argument(help="As in `dwakd recipes list`.")],
    dest: Annotated[Path | None, typer.Argument(help="File or folder; default: here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Copy a recipe, to make it yours."""
    from dwakd_plugin.io.files import explaining_writes, replace_file

    recipe = find(name)
    file = dest or Path(recipe.name)
    if file.is_dir():
        file = file / recipe.name
    if file.exists() and not force:
        raise UserError(f"`{file}` exists. Give another destination, or --force to overwrite it.")
    with explaining_writes(f"`{file}`"):
        replace_file(file, recipe.read_text(encoding="utf-8"))
    typer.echo(file)


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
    import yaml

    from dwakd_plugin.recipe.schema import parse_recipe

    opening = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        opening.append(line.lstrip("# ").rstrip())
    recipe = yaml.safe_load(text)
    config = parse_recipe(recipe)
    return {
        "name": name,
        "group": name.partition("-")[0],
        "purpose": " ".join(opening),
        "student": recipe.get("base_model"),
        "teacher": None if config is None else config.teachers_called,
    }


def _shipped() -> dict[str, Traversable]:
    from importlib import resources

    files = resources.files("dwakd_recipes").iterdir()
    return {
        file.name.removesuffix(".yml"): file
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".yml")
    }
