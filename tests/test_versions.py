"""What dwakd takes from axolotl is there, as it takes it: `.ci/newest` asks its newest."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.utils.collators import DataCollatorForSeq2Seq

from dwakd_plugin.data.collator import DualCollator
from dwakd_plugin.plugin import DWAKDPlugin
from dwakd_plugin.train.trainer import DWAKDTrainer

ROOT = Path(__file__).parents[1]


def _imports() -> Iterator[tuple[str, str]]:
    """(module, name) of everything that our code imports from axolotl, wherever it does."""
    for folder in ("dwakd_plugin", "cli"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("axolotl"):
                    for alias in node.names:
                        yield str(node.module), alias.name
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        if alias.name.startswith("axolotl"):
                            yield alias.name, ""


@pytest.mark.parametrize(("module", "name"), sorted(set(_imports())))
def test_an_import_from_axolotl_is_there(module: str, name: str) -> None:
    loaded = importlib.import_module(module)
    assert not name or hasattr(loaded, name)


OVERRIDDEN = [
    (ours, theirs, name)
    for ours, theirs in (
        (DWAKDPlugin, BasePlugin),
        (DWAKDTrainer, AxolotlTrainer),
        (DualCollator, DataCollatorForSeq2Seq),
    )
    for name, value in vars(ours).items()
    if inspect.isfunction(value) and (not name.startswith("__") or name == "__call__")
]


@pytest.mark.parametrize(("ours", "theirs", "name"), OVERRIDDEN)
def test_an_override_takes_what_axolotl_hands_it(ours: Any, theirs: Any, name: str) -> None:
    """A hook or method of the same name takes every argument that the one it replaces takes."""
    if not hasattr(theirs, name):
        # Our own, then, and no hook that has gone: those have these names.
        assert theirs is not BasePlugin or name.startswith("_")
        return
    taken = inspect.signature(getattr(ours, name)).parameters
    anything = {parameter.kind for parameter in taken.values()}
    for parameter in inspect.signature(getattr(theirs, name)).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            assert parameter.kind in anything
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert parameter.name in taken or inspect.Parameter.VAR_KEYWORD in anything
        else:
            assert parameter.name in taken or inspect.Parameter.VAR_POSITIONAL in anything


def test_the_code_of_tokenizer_model_files_can_be_read() -> None:
    """It is generated for one protobuf, and says so only where a `tokenizer.model` is opened."""
    assert importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto


def test_axolotl_finds_the_plugin_under_the_name_that_the_readme_gives() -> None:
    """From 0.21 on by this entry point; another spelling would make it two plugins."""
    (found,) = (each for each in entry_points(group="axolotl.plugins") if each.name == "dwakd")
    assert found.value.replace(":", ".") == "dwakd_plugin.DWAKDPlugin"
