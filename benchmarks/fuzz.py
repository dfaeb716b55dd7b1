"""Many cases of `tests/fuzz`, counted as they end: targets, cases, failures, seconds.

    python -m benchmarks.fuzz [--seed 7] [--few] [--out FOLDER]

The same targets that `make test` runs with few cases, with hypothesis' profile `fuzz` and a seed
that the report names: the same seed makes the same cases, on the same versions. Targets that need
the tokenizers of published models are skipped, and said to be, where these are not there.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from benchmarks import measure

TESTS = Path(__file__).parents[1] / "tests" / "fuzz"
LEAST = 10_000  # cases in all


class _Recorder:
    """What became of each test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2].removeprefix("test_")
        test = self.tests.setdefault(name, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 1)
        if report.outcome != "passed":
            test["outcome"] = report.outcome


def main(
    seed: Annotated[int | None, typer.Option(help="Of the cases; default: a new one.")] = None,
    few: Annotated[bool, typer.Option("--few", help="As few as `make test` runs.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = measure.RESULTS,
) -> None:
    seed = secrets.randbelow(2**31) if seed is None else seed
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    packages = ["hypothesis", "pydantic", "pyyaml", "tokenizers", "transformers", "axolotl"]
    started = measure.start(threads=1, quick=few, packages=packages)
    recorder = _Recorder()
    arguments = [str(TESTS), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    arguments += [] if few else ["--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}"]
    code = pytest.main(arguments, plugins=[recorder])
    from tests.fuzz.cases import CASES

    outcomes = [test["outcome"] for test in recorder.tests.values()]
    results = {
        "seed": None if few else seed,
        "tests": recorder.tests,
        "cases": dict(CASES),
        "cases_in_all": sum(CASES.values()),
        "failed": outcomes.count("failed"),
        "skipped": outcomes.count("skipped"),
        "seconds": round(sum(test["seconds"] for test in recorder.tests.values()), 1),
    }
    least = 1 if few else LEAST
    targets = [
        measure.target("failed targets", results["failed"], 0),
        measure.target("cases", results["cases_in_all"], least, at_least=True),
    ]
    measure.write_report("fuzz", started, results, targets, out)
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
