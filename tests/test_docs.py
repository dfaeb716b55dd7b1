"""The documentation says what the code does: keys, commands, functions, messages; links lead on."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import typer
import yaml

from dwakd_cli.main import app
from dwakd_plugin.loss.variants import every_figure
from dwakd_plugin.recipe.reference import configuration_table
from dwakd_plugin.recipe.schema import VARIANTS, DWAKDConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*sorted((ROOT / "dwakd_plugin").rglob("*.py")), *sorted((ROOT / "cli").glob("*.py"))]
CODE_SPAN = re.compile(r"(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)")


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_the_table_of_keys_is_the_schema() -> None:
    page = read(ROOT / "docs" / "configuration.md")
    assert configuration_table() in page, (
        "run `python -m dwakd_plugin.recipe.reference` and paste its output"
    )


def test_every_key_has_a_description() -> None:
    blocks = [DWAKDConfig]
    while blocks:
        block = blocks.pop()
        for name, field in block.model_fields.items():
            assert field.description, f"{block.__name__}.{name}"
            parts = (field.annotation, *get_args(field.annotation))
            blocks += [part for part in parts if hasattr(part, "model_fields")]


def test_the_table_of_baselines_is_the_schemas() -> None:
    rows = {}
    for line in read(ROOT / "docs" / "baselines.md").splitlines():
        if found := re.fullmatch(r"\| `(\w+)` \| .+ \| (.+) \|", line):
            settings = yaml.safe_load("\n".join(re.findall(r"`(\w+: [\w.]+)`", found[2])))
            if "no weights" in found[2]:
                settings = {"student_weighting": "none", "teacher_weighting": "none"} | settings
            rows[found[1]] = {"loss": settings}
    assert {name: VARIANTS[name] for name in rows} == rows
    table_3 = read(ROOT / "docs" / "method.md").split("paper's Table 3")[1].split("\n\n")[0]
    assert set(VARIANTS) == {*rows, *re.findall(r"`(\w+)`(?= \(|,)", table_3)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readme_lists_every_page() -> None:
    listed = re.findall(r"\]\((docs/[^)#]+)\)", read(ROOT / "README.md"))
    assert {page.name for page in PAGES[1:]} == {Path(page).name for page in listed}


def test_axolotl_finds_the_plugin_by_its_entry_point() -> None:
    (entry,) = [e for e in entry_points(group="axolotl.plugins") if e.name == "dwakd"]
    # axolotl turns this into the dotted name that recipes use; two names would register twice.
    assert entry.value.replace(":", ".") == "dwakd_plugin.DWAKDPlugin"


# Commands -------------------------------------------------------------------------------------


def commands_of(page: Path) -> Iterator[tuple[str, bool]]:
    """What a page tells to type, and whether in a shell block, where it must be a command."""
    text = read(page)
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield line, True
    for _, span in CODE_SPAN.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield span, False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path) -> None:
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group)
    for line, in_block in commands_of(page):
        words = shlex.split(line.partition(" | ")[0], comments=True) if "dwakd " in line else []
        if words[:1] != ["dwakd"]:
            continue
        if in_block or words[1] in command.commands or words[1].startswith("-"):
            try:
                understand(command, words[1:])
            except click.UsageError as error:
                if not in_block and isinstance(error, click.BadOptionUsage):
                    continue  # a sentence may name an option without its value
                pytest.fail(f"{line}: {error.format_message()}")


def understand(command: click.Command, words: list[str]) -> None:
    """Parses subcommands and options and does nothing else: no callback, so that none can act.

    Raises click.UsageError where one is not known or lacks its value.
    """
    context = click.Context(command)
    _, rest, _ = command.make_parser(context).parse_args(list(words))
    if isinstance(command, click.Group) and rest and rest[0] != "COMMAND":
        if rest[0] not in command.commands:
            raise click.UsageError(f"there is no command {rest[0]}")
        understand(command.commands[rest[0]], rest[1:])


# Names and messages of the source ---------------------------------------------------------------


@pytest.mark.parametrize(("name", "fewest"), [("method", 20), ("architecture", 15)])
def test_functions_that_a_page_names_exist(name: str, fewest: int) -> None:
    page = read(ROOT / "docs" / f"{name}.md")
    everything = "\n".join(map(read, [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]))
    named = 0
    for _, span in CODE_SPAN.findall(page):
        if place := re.fullmatch(r"((?:tests/)?[\w/]+(?:\.py|/)): ([\w.]+)", span):
            file, function = place.groups()
            path = ROOT / file if file.startswith("tests/") else ROOT / "dwakd_plugin" / file
            text = read(path / "__init__.py" if path.is_dir() else path)
            *_, last = function.split(".")
            assert re.search(rf"^ *(def|class) {last}\b|^{last}\b.*=", text, re.MULTILINE), span
            named += 1
        elif re.fullmatch(r"_?[A-Za-z]\w*(\.\w+)*", span):
            assert re.search(rf"\b{span.split('.')[-1]}\b", everything), span
    assert named >= fewest


def test_every_logged_figure_is_explained() -> None:
    metrics = {figure.name for figure in every_figure() if figure.logged}
    page = read(ROOT / "docs" / "reading_the_curves.md")
    assert len(metrics) >= 10
    assert [name for name in (*metrics, "gamma") if f"| `{name}` |" not in page] == []


def texts_of(source: str) -> Iterator[str]:
    """Every string of a module as a reader sees it, with `…` for what is filled in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return "…"

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
            yield text(node).replace("%s", "…")


def test_messages_of_the_troubleshooting_page_exist() -> None:
    texts = [text for file in SOURCES for text in texts_of(read(file))]
    quoted, inside = [], False
    for line in read(ROOT / "docs" / "troubleshooting.md").splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.startswith(("| message |", "| status |")):
            inside = True
        elif inside and not line.startswith("|---"):
            cell = line.split(" | ")[0].removeprefix("| ")
            quoted.append(CODE_SPAN.fullmatch(cell).group(2).strip())  # type: ignore[union-attr]
    assert len(quoted) > 100
    gone = [message for message in quoted if not any(message in text for text in texts)]
    assert not gone, "no such message in the source any more"


def test_the_loop_of_ones_own_trainer_runs(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = read(ROOT / "docs" / "own_trainer.md")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(lab)
    names: dict[str, Any] = {}
    exec(compile(snippet, "docs/own_trainer.md", "exec"), names)
    history = names["history"]
    assert len(history) == 4 and history == sorted(history, reverse=True)
    assert len(set(names["token_map"].tolist())) > 100  # most tokens have a counterpart
