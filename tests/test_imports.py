"""Imports point one way: nothing is circular, and what is pure knows no library of models."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "dwakd_plugin").rglob("*.py"))


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(statements: list[ast.stmt]) -> set[str]:
    """The modules that these statements name, `from package import module` included."""
    names = set()
    for statement in statements:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            names.add(statement.module)
            names |= {f"{statement.module}.{alias.name}" for alias in statement.names}
    return names


TREES = {module(file): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
# What happens when a module is imported: what stands in functions comes later.
AT_IMPORT = {name: imported(tree.body) for name, tree in TREES.items()}


def test_no_circle() -> None:
    TopologicalSorter(
        {name: names & TREES.keys() - {name} for name, names in AT_IMPORT.items()}
    ).prepare()  # raises CycleError, which names the circle


def test_nobody_imports_the_commands() -> None:
    statements = [
        node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.stmt)
    ]
    assert not {one for one in imported(statements) if one.startswith("dwakd_cli")}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("dwakd_plugin.errors", ()),
        ("dwakd_plugin.config", ("dwakd_plugin.errors",)),
        ("dwakd_plugin.tokenizer_pair", ("dwakd_plugin.errors",)),
        *(
            (name, ("dwakd_plugin.config", "dwakd_plugin.loss"))
            for name in TREES
            if name.startswith("dwakd_plugin.loss")
        ),
    ],
)
def test_what_is_pure_stays_so(name: str, allowed: tuple[str, ...]) -> None:
    """The mathematics, the schema and the tokenizer analysis know neither axolotl nor a model."""
    foreign = ("axolotl", "transformers", "peft", "dwakd_plugin")
    assert not {
        one for one in AT_IMPORT[name] if one.startswith(foreign) and not one.startswith(allowed)
    }
