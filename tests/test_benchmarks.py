"""The quick forms of the benchmarks run, agree with the rivals, and report what they promise."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import measure, research
from benchmarks.around import PARTS as PARTS_AROUND
from benchmarks.gpu import parts
from benchmarks.gpu.__main__ import PARTS, Part, run_part
from benchmarks.gpu.parts import Place
from benchmarks.performance import section
from dwakd_plugin.loss.soft_dtw import soft_dtw

ROOT = Path(__file__).parents[1]


NAMES = ["soft_dtw", "objective", "gold", "mapped", "own_step", "around"]


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Popen[str]]]:
    """All side by side: they mostly import. One thread: two would wait for each other."""
    runs = {}
    for name in NAMES:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--threads", "1"]
        out = tmp_path_factory.mktemp(name)
        runs[name] = Popen(
            [*command, "--out", str(out)], cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True
        )
    yield runs
    for run in runs.values():
        run.kill()
        run.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_quick_form(name: str, quick_runs: dict[str, Popen[str]]) -> None:
    run = quick_runs[name]
    out, errors = run.communicate(timeout=180)
    assert run.returncode == 0, errors
    folder = Path(str(run.args[-1]))  # type: ignore[index]
    report = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert report["benchmark"] == name and report["quick"]
    assert f"benchmarks.{name} --quick" in report["command"]
    assert report["hardware"]["cpu"] and report["hardware"]["cores"] > 0
    assert report["versions"]["torch"] == version("torch")
    results = report["results"]
    if name == "soft_dtw":
        runs = [*results["seconds"].values(), *results["peak_bytes"].values()]
    elif name == "objective":
        runs = results["full"]["runs"].values()
        assert max(numbers(results["agreement"])) < 1e-4
    elif name == "mapped":
        runs = [*results["step"]["runs"].values(), *results["loss"]["runs"].values()]
    elif name == "around":
        runs = [results[part]["seconds"] for part in PARTS_AROUND]
        assert all(results[part]["counts"]["rows"] > 0 for part in PARTS_AROUND)
    else:
        runs = results["runs"].values()
    assert runs and all(figure > 0 for figure in numbers(list(runs)))
    assert out.strip() in section(report)
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.png"]


COMMANDS = sorted(
    file.stem
    for file in (ROOT / "benchmarks").glob("*.py")
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself_and_refuses_a_typo(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, code, said in (("--help", 0, "--help"), ("--hlep", 2, "--hlep")):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", option])
        with warnings.catch_warnings(action="ignore"), pytest.raises(SystemExit) as end:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")  # again, if imported
        assert end.value.code == code
        assert said in "".join(capsys.readouterr())


@pytest.mark.slow
def test_what_a_gpu_is_asked_runs_on_a_cpu(tmp_path: Path) -> None:
    """Every part with tiny shapes, so that on a card none fails for a silly reason."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    with Popen([*command, "--out", str(tmp_path)], cwd=ROOT, stderr=PIPE, text=True) as run:
        _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert report["card"] is None and report["quick"]
    left_out = {name for name, one in report["parts"].items() if "left_out" in one}
    assert left_out <= {"soft-DTW", "SmolLM2"}  # without triton, gguf and the embedded teacher
    done = {name: one["result"] for name, one in report["parts"].items() if "result" in one}
    assert done.keys() | left_out == PARTS.keys()
    assert all(done[name] for name in done)
    assert done["tests"]["files"] and not done["tests"]["passed"]
    assert done["training run"]["weights apart by"] == 0
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "no figure is a GPU's" in page and all(f"## {name}" in page for name in PARTS)


def failing(_: Place) -> None:
    raise ValueError("as it was told to")


def test_a_part_that_fails_or_takes_too_long_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(parts), "failing", failing)
    monkeypatch.setitem(vars(parts), "sleeping", lambda _: time.sleep(60))
    monkeypatch.setitem(vars(parts), "ending", lambda _: os._exit(7))
    place, context = Place("cpu", True, tmp_path), get_context("fork")
    found = run_part(Part("failing", 9, ()), place, 9, context)
    assert found["error"] == "ValueError: as it was told to" and "in failing" in found["where"]
    assert run_part(Part("sleeping", 1, ()), place, 1, context)["error"] == "not done after 1 s"
    assert run_part(Part("ending", 9, ()), place, 9, context)["error"].endswith("exit code 7")
    missing = run_part(Part("failing", 9, ("no_such_package",)), place, 9, context)
    assert missing == {"left_out": "no_such_package isn't installed"}


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    assert isinstance(value, int | float)
    return [value]


def test_peak_memory_counts_what_a_run_allocates() -> None:
    peak = measure.peak_memory(allocating, 64, threads=1, preload="torch")
    assert 64 <= peak / measure.MIB < 80  # the two are freed in between; a little for the rest


def allocating(mebibytes: int):  # type: ignore[no-untyped-def]
    inputs = torch.ones(32 * measure.MIB // 4)

    def run() -> float:
        first = torch.ones(mebibytes * measure.MIB // 4).sum()
        return float(first + torch.ones(mebibytes * measure.MIB // 4).sum() + inputs[0])

    return run


def test_rounds_alternate() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds, disturbance = measure.alternate(runs, 3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert 0 <= disturbance <= 1
    turns = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert turns == ["a", "b", "a", "b", "a", "b"][: len(turns)]


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_the_research_style_rival_is_right(gamma: float) -> None:
    """A rival that computes something else wouldn't be a rival."""
    cost = 2 * torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)).double()
    n, m = torch.tensor([20, 7, 1]), torch.tensor([24, 24, 3])
    found = []
    for function in (research.soft_dtw, soft_dtw):
        leaf = cost.clone().requires_grad_()
        values = function(leaf, n, m, gamma)
        values.sum().backward()
        found.append((values.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_a_target_is_met_or_not() -> None:
    assert measure.target("faster", 12, 10, at_least=True)["met"]
    assert not measure.target("smaller", 0.2, 0.15)["met"]
    assert not measure.target("smaller", math.nan, 0.15)["met"]
