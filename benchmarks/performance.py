"""Write the tables of docs/performance.md anew from benchmarks/results.

python -m benchmarks.performance
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from benchmarks import around, gold, mapped, objective, own_step, soft_dtw
from benchmarks.measure import RESULTS, Report, write_between

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
MODULES = (soft_dtw, objective, gold, mapped, own_step, around)
TABLES = {module.NAME: module.tables for module in MODULES}


def section(report: Report) -> str:
    """Where the figures come from, the figures, and how the targets fared."""
    hardware, versions = report["hardware"], report["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    lines = [
        f"`{report['command']}`, {report['date'][:10]}: {hardware['cpu']}, {hardware['cores']} "
        f"cores, {hardware['memory_gib']} GiB, {report['threads']} threads; {packages}. Others "
        f"took up to {max(disturbances(report)):.0%} of the CPU during timings.",
        "",
        TABLES[report["benchmark"]](report["results"]),
        "",
        "| | measured | | |",
        "|---|---|---|---|",
    ]
    for target in report["targets"]:
        bound = "at least" if target["at_least"] else "at most"
        verdict = "met" if target["met"] else "**not met**"
        measured = f"{target['measured']:.3g}"
        lines.append(f"| {target['name']} | {measured} | {bound} {target['limit']:g} | {verdict} |")
    return "\n".join(lines)


def disturbances(value: object) -> list[float]:
    """All figures called `disturbance`, at any depth."""
    if isinstance(value, list):
        return [one for item in value for one in disturbances(item)]
    if not isinstance(value, dict):
        return []
    own = value.get("disturbance", [])
    own = list(own.values()) if isinstance(own, dict) else [own] if own != [] else []
    return own + [one for item in value.values() for one in disturbances(item)]


def main() -> None:
    """Write the tables of docs/performance.md anew from benchmarks/results."""
    for name in TABLES:
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            print(f"{file} is not there: its table stays as it is. `python -m benchmarks.{name}`")
            continue
        report = json.loads(file.read_text(encoding="utf-8"))
        write_between(DOCUMENT, name, section(report))


if __name__ == "__main__":
    typer.run(main)
