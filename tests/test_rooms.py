"""The rooms of `dwakd_plugin`: imports between them point one way, and only to what is on show."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dwakd_plugin"
FILES = sorted(PACKAGE.rglob("*.py"))
CLI = sorted((ROOT / "cli").glob("*.py"))
# From the ground up: each imports only what stands above it here. One line is one floor.
FLOORS = (
    ("errors",),
    ("io",),
    ("recipe",),
    ("tokenizers",),
    ("loss",),
    ("models",),
    ("data",),
    ("train",),
    ("evaluate", "export", "plan"),
    ("plugin",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FOREIGN = ("axolotl", "transformers", "peft", "torch")  # what the rooms on the ground do without


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """The room of a module; empty for the package itself, whose names load on first use."""
    return name.removeprefix("dwakd_plugin").removeprefix(".").split(".")[0]


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The modules that these statements name, `from package import module` included."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


TREES = {module(file): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
# What happens when a module is imported: what stands in functions comes later.
AT_IMPORT = {name: imported(iter(tree.body)) for name, tree in TREES.items()}
EVER = {name: imported(ast.walk(tree)) for name, tree in TREES.items()}
COMMANDS = [imported(ast.walk(ast.parse(file.read_text(encoding="utf-8")))) for file in CLI]


def arrows() -> set[tuple[str, str]]:
    """(room, room it imports from), for every import, within functions too."""
    return {
        (room(name), room(other))
        for name, names in EVER.items()
        for other in names
        if other.startswith("dwakd_plugin.") and room(name)
    } - {(each, each) for each in FLOOR}


def test_every_room_has_its_floor() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert found - {"__init__", "__pycache__", "py"} == FLOOR.keys()
    rooms = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    assert len(rooms) <= 10
    assert len([path for path in PACKAGE.iterdir() if path.suffix == ".py"]) <= 3


def test_no_arrow_points_up() -> None:
    # The version stands in the package itself, which any room may read.
    upward = {(a, b) for a, b in arrows() if b in FLOOR and FLOOR[b] >= FLOOR[a]}
    assert not upward


def test_the_picture_in_the_documentation_is_this_one() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    drawn = {row[1].strip(" `"): re.findall(r"`(\w+)`", row[3]) for row in rows}
    assert list(drawn) == list(FLOOR), "in this order"
    found = {each: {b for a, b in arrows() if a == each} for each in FLOOR}
    assert {each: set(others) for each, others in drawn.items()} == found


def test_no_circle() -> None:
    TopologicalSorter(
        {name: names & TREES.keys() - {name} for name, names in AT_IMPORT.items()}
    ).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", [path.parent.name for path in PACKAGE.glob("*/__init__.py")])
def test_a_room_says_what_it_is_for_and_what_others_may_use(name: str) -> None:
    tree = TREES[f"dwakd_plugin.{name}"]
    assert ast.get_docstring(tree)
    (shown,) = [
        set(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    within = {path.stem for path in (PACKAGE / name).iterdir()} - {"__init__", "__pycache__"}
    others = [names for module_name, names in EVER.items() if room(module_name) != name]
    used = {
        other.split(".")[2]
        for names in (*others, *COMMANDS)
        for other in names
        if other.startswith(f"dwakd_plugin.{name}.")
    }
    assert used <= shown, "another room uses what is not on show"
    assert shown & within <= used, "nobody uses it"


def test_nobody_imports_the_commands() -> None:
    assert not {one for names in EVER.values() for one in names if one.startswith("dwakd_cli")}


@pytest.mark.parametrize("name", [name for name in TREES if room(name) in ("errors", "recipe")])
def test_the_recipe_is_read_without_torch(name: str) -> None:
    assert not {one for one in AT_IMPORT[name] if one.startswith(FOREIGN)}


@pytest.mark.parametrize("name", [name for name in TREES if room(name) in ("tokenizers", "loss")])
def test_the_mathematics_knows_no_library_of_models(name: str) -> None:
    assert not {one for one in AT_IMPORT[name] if one.startswith(FOREIGN[:3])}


@pytest.mark.parametrize("file", [*FILES, *CLI], ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_has_one_job(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= 400
    # Shorter ones want a reason: an `__init__` shows a room, and a command may be small.
    assert lines >= 30 or file.name == "__init__.py" or file in CLI
