"""`dwakd align`: the expected paths, the pictures, and the command on the tiny pair."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.utils.tee import close_debug_log
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner, Result

from dwakd_cli.alignment_picture import (
    AlignedSample,
    band_edges,
    figure_of,
    html_page,
    png_image,
    state_figures,
    terminal_table,
    token_summaries,
    token_texts,
    what_is_drawn,
)
from dwakd_cli.main import app
from dwakd_cli.without_packages import without_packages
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import Alignment, Head, ResponseStates, alignment_of, dwakd_loss
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.recipe.schema import SoftDTWConfig

Recipe = Callable[..., dict[str, Any]]
PNG = b"\x89PNG"
SOFT_DTW = SoftDTWConfig.model_validate({"band_width": 1.0, "band_entropy_coef": 0.5})


def states(positions: int, width: int, lengths: list[int]) -> ResponseStates:
    size = (3, len(lengths), positions, width)
    labels = torch.randint(9, size[1:3])
    return ResponseStates(
        *torch.randn(size), torch.tensor(lengths), Head(torch.randn(9, width)), labels
    )


@pytest.fixture
def batch() -> tuple[ResponseStates, ResponseStates, Projectors]:
    torch.manual_seed(5)
    return states(6, 8, [6, 3, 0]), states(9, 12, [7, 9, 4]), Projectors(8, 12)


@pytest.fixture
def sample() -> AlignedSample:
    torch.manual_seed(6)
    return drawn(["a", "b$", "<script>alert(1)</script>", "数", "e"], list("vwxyz12"))


def drawn(students: list[str], teachers: list[str], *names: str) -> AlignedSample:
    student = states(len(students), 8, [len(students)])
    teacher = states(len(teachers), 12, [len(teachers)])
    aligned = {}
    for name in names or ("before",):
        alignment = alignment_of(student, teacher, Projectors(8, 12), soft_dtw=SOFT_DTW)
        aligned[name] = Alignment(*(value[0] for value in vars(alignment).values()))
    return AlignedSample(1, "row 0 of <rows>", students, teachers, aligned)


# Tensors ------------------------------------------------------------------------------------


def test_every_path_goes_through_every_row_and_column(batch: Any) -> None:
    found = alignment_of(*batch, soft_dtw=SOFT_DTW, gamma=0.7)
    for path in (found.hidden_path, found.embed_path):
        for index, (n, m) in enumerate([(6, 7), (3, 9)]):
            inner = path[index, :n, :m]
            assert inner.min() >= 0
            assert inner.max() <= 1 + 1e-5
            assert (inner.sum(1) >= 1 - 1e-5).all()
            assert (inner.sum(0) >= 1 - 1e-5).all()
            assert inner[0, 0] == pytest.approx(1, abs=1e-5)
            assert inner[-1, -1] == pytest.approx(1, abs=1e-5)
            assert path[index].sum() == pytest.approx(inner.sum().item())
        assert not path[2].any()  # a sample without a student's side
    assert torch.allclose(found.attention[0].sum(1), torch.ones(6))
    assert torch.allclose(found.attention[1, :3].sum(1), torch.ones(3))


def test_it_is_the_alignment_of_the_loss(batch: Any) -> None:
    """By the loss's own figures, and by finite differences of the loss in the band's penalty."""
    terms = dwakd_loss(*batch, soft_dtw=SOFT_DTW, gamma=0.7)
    found = alignment_of(*batch, soft_dtw=SOFT_DTW, gamma=0.7)
    assert found.inside is not None
    assert int(found.inside.sum()) == int(terms.band_cells_inside)
    entropy = torch.special.entr(found.attention).sum()
    assert torch.isclose(entropy, terms.attention_entropy)
    assert alignment_of(*batch, soft_dtw=SoftDTWConfig(band=False)).inside is None
    # A penalty everywhere costs a path its length: d nDTW / d penalty is the path's mean length.
    lengths = []
    for penalty in (1.0, 1.001):
        everywhere = SoftDTWConfig.model_validate(
            {"band_width": 0.0, "band_entropy_coef": 0.0, "band_penalty": penalty}
        )
        lengths.append(dwakd_loss(*batch, soft_dtw=everywhere, gamma=0.7).hidden_dtw.double())
        path = alignment_of(*batch, soft_dtw=everywhere, gamma=0.7)
        assert path.inside is not None
        outside = (path.hidden_path * ~path.inside).sum()
    assert ((lengths[1] - lengths[0]) / 0.001).item() == pytest.approx(outside.item(), rel=1e-2)


def test_the_band_is_drawn_where_it_is(sample: AlignedSample) -> None:
    inside = sample.states["before"].inside
    assert inside is not None
    left, right = band_edges(inside)
    columns = torch.arange(inside.shape[1])
    for row, cells in enumerate(inside):
        first, last = left[0][2 * row], right[0][2 * row]
        assert left[1][2 * row : 2 * row + 2] == [row - 0.5, row + 0.5]
        assert torch.equal((columns > first) & (columns < last), cells)
    figure = figure_of(sample, 80)
    lines = figure.axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines] == [left[0], right[0]]
    image = figure.axes[0].get_images()[0].get_array()
    assert torch.allclose(torch.as_tensor(image.data), sample.states["before"].attention)
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names == sample.teacher_tokens


def test_rows_without_band_interrupt_its_edges() -> None:
    left, _ = band_edges(torch.tensor([[True, False], [False, False]]))
    assert left[0][:2] == [-0.5, -0.5]
    assert left[0][2] != left[0][2]


# Pictures -----------------------------------------------------------------------------------


def test_summaries_name_the_likeliest_tokens(sample: AlignedSample) -> None:
    alignment = sample.states["before"]
    for index, summary in enumerate(token_summaries(sample, alignment, 2)):
        best = int(alignment.attention[index].argmax())
        top, second = summary["attention"]
        assert (top["position"], top["token"]) == (best + 1, sample.teacher_tokens[best])
        assert top["share"] == pytest.approx(alignment.attention[index, best].item())
        assert second["share"] <= top["share"]
        assert summary["hidden_path"]["position"] == int(alignment.hidden_path[index].argmax()) + 1
    figures = state_figures(alignment)
    assert 0 < figures["hidden_path_in_band"] <= 1


class _Resources(HTMLParser):
    """Tags, and what a page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_is_escaped_and_whole(sample: AlignedSample) -> None:
    image = png_image(sample, 80)
    assert image.startswith(PNG)
    facts = {"student": "<b>s</b>", "teacher": "t & u", "gamma": 0.8}
    page = html_page(facts, [(sample, image)], 80)
    found = _Resources(page)
    assert "script" not in found.tags
    assert "rows" not in found.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert [address.split(",")[0] for address in found.fetched] == ["data:image/png;base64"]
    assert "url(" not in page


def test_long_samples_are_cut_and_say_so() -> None:
    torch.manual_seed(7)
    long = drawn([f"s{index}" for index in range(30)], ["t"] * 25, "before", "after")
    assert what_is_drawn(long, 10) == (
        "the first 10 of 30 student and 10 of 25 teacher tokens (--tokens draws more)"
    )
    assert what_is_drawn(long, 30) == "30 student and 25 teacher tokens"
    figure = figure_of(long, 10)
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert len(panels) == 6
    assert all(axes.get_images()[0].get_array().shape == (10, 10) for axes in panels)
    titles = [axes.get_title().splitlines()[-1] for axes in panels]
    assert titles == ["before", "after"] * 3
    assert terminal_table(long, 10, 80).row_count == 10


@pytest.mark.parametrize("width", [32, 60, 120])
def test_the_terminal_is_never_too_narrow(sample: AlignedSample, width: int) -> None:
    console = Console(width=width, no_color=True, file=StringIO())
    console.print(terminal_table(sample, 80, width))
    text = console.file.getvalue()
    assert max(map(cell_len, text.splitlines())) <= width
    top = sample.states["before"].attention[0].max()
    assert f"{top:.0%}" in text
    assert ("soft-DTW path" in text) == (width >= 60)


def test_tokens_are_the_text_they_stand_for(lab: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lab / "student")
    ids = tokenizer("a 数\n", add_special_tokens=False)["input_ids"]
    shown = "".join(token_texts(tokenizer, ids))
    assert shown.startswith("a·")
    assert shown.endswith("⏎")
    assert re.search(r"数|\\xe6", shown)


# The command --------------------------------------------------------------------------------


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["align", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.slow
def test_before_and_after_training(
    recipe: Recipe,
    train: Callable[..., Any],
    write: Callable[..., Path],
    tmp_path: Path,
) -> None:
    settings = recipe({"projectors": {"learning_rate": 0.03}}, max_steps=2, val_set_size=0.2)
    train(settings)
    close_debug_log()  # while open, axolotl holds on to the stdout that it found
    file, out = write(settings), Path(settings["output_dir"])
    pictures = tmp_path / "pictures"
    result = invoke(
        *(file, "--checkpoint", out / "checkpoint-2", "--before", "--tokens", "12"),
        *("--sample", "2", "--sample", "8", "--output", pictures, "--json"),
    )
    report = json.loads(result.stdout)
    assert [sample["sample"] for sample in report["samples"]] == [2, 8]
    assert report["samples_in_set"] == 8
    assert report["gamma"] == 0.8
    for sample in report["samples"]:
        assert Path(sample["png"]).read_bytes().startswith(PNG)
        assert sample["source"].startswith("evaluation set, row ")
        before, after = sample["states"].values()
        assert list(sample["states"]) == ["before training", "checkpoint-2"]
        assert before["attention_entropy"] != after["attention_entropy"]
        assert len(before["tokens"]) == sample["student_tokens"]
        for token in after["tokens"]:
            assert 0 < token["attention"][0]["share"] <= 1
        # The tokens are the response, and nothing of the prompt.
        text = "".join(token["token"] for token in before["tokens"])
        assert text.startswith("Function·")
    page = Path(report["html"]).read_text()
    assert page.count("<img") == 2
    assert sorted(path.name for path in pictures.iterdir()) == [
        *("alignment.html", "sample-2.png", "sample-8.png"),
    ]

    shown = invoke(file, "--output", pictures, "--tokens", "5").output
    assert "attention entropy" in shown
    assert "the first 5 of" in shown

    with pytest.raises(UserError, match="9: the evaluation set has 8 samples"):
        invoke(file, "--sample", "9")


def test_mistakes_are_messages(
    recipe: Recipe, write: Callable[..., Path], lab: Path, tmp_path: Path
) -> None:
    file = write(recipe({}))
    with pytest.raises(UserError, match=r"gone\.yml` does not exist"):
        invoke("gone.yml")
    with pytest.raises(UserError, match=r"holds no dwakd/projectors\.safetensors"):
        invoke(file, "--checkpoint", lab / "student")
    with pytest.raises(UserError, match="names no teacher"):
        invoke(write(recipe(None)))
    with pytest.raises(UserError, match="cannot be made"):
        invoke(write(recipe({})), "--output", lab / "rows.jsonl" / "pictures")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".yml") == [
        "alignment"
    ]


@pytest.mark.slow
def test_a_process_of_its_own_imports_nothing_for_generation_by_an_assistant(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = "lambda: print(*(name for name, it in sys.modules.items() if it), file=sys.stderr)"
    code = f"import atexit, sys; atexit.register({loaded}); from dwakd_cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "align", str(write(recipe({}))), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    imported = set(result.stderr.split())
    assert "transformers.generation.candidate_generator" in imported
    assert not imported & {"sklearn"}


def test_packages_that_a_command_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with without_packages(["wave", "json"]):
        assert find_spec("wave") is None  # how transformers asks
        assert sys.modules["json"] is json  # is imported, and stays
    assert "wave" not in sys.modules and find_spec("wave")


@pytest.mark.slow
def test_a_cache_is_used_but_not_filled(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    cache = tmp_path / "states"
    file = write(recipe({"teacher": {"cache": str(cache)}}))
    report = json.loads(invoke(file, "--json").stdout)
    assert not cache.exists()
    assert report["samples"][0]["source"].startswith("training set, row ")
