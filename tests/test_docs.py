"""The documentation says what the code does: the key table comes from the schema, links lead on."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from dwakd_plugin.config import DWAKDConfig, configuration_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_keys_is_the_schema() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert configuration_table() in page, "run `python -m dwakd_plugin.config` and paste its output"


def test_every_key_has_a_description() -> None:
    blocks = [DWAKDConfig]
    while blocks:
        block = blocks.pop()
        for name, field in block.model_fields.items():
            assert field.description, f"{block.__name__}.{name}"
            if hasattr(field.annotation, "model_fields"):
                blocks.append(field.annotation)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_axolotl_finds_the_plugin_by_its_entry_point() -> None:
    (entry,) = [e for e in entry_points(group="axolotl.plugins") if e.name == "dwakd"]
    # axolotl turns this into the dotted name that recipes use; two names would register twice.
    assert entry.value.replace(":", ".") == "dwakd_plugin.DWAKDPlugin"
