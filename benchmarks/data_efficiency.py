"""How many rows of fine-tuning give what `mapped` gives on N; from the quality benchmark.

python -m benchmarks.data_efficiency

Each record is of one number of rows, which the teacher has learnt before and which both methods
read once: of `python -m benchmarks.quality` with another `--rows`, which is named after N as
RECORDS has it. Between two numbers of rows bits per byte are taken as linear in their logarithm.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import typer
from matplotlib.figure import Figure

from benchmarks.gain import COLOURS, TITLES
from benchmarks.quality.report import difference

RESULTS = Path(__file__).parent / "results"
FEWEST, RECORDS = "quality_128_cut8.json", "quality_128_cut8_rows*.json"
Curve = dict[int, list[float]]  # bits per byte under each seed, by the number of rows


def main() -> None:
    """Draw rows against bits per byte as data_efficiency.png, and print the table."""
    if not list(RESULTS.glob(RECORDS)):
        raise SystemExit(
            f"{RESULTS} has no {RECORDS}. Run `python -m benchmarks.quality` with several numbers "
            "of rows, and keep its records there under such names."
        )
    curves = {place: read(place) for place in TITLES}
    print(table(curves["dolly"]))
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (place, (alone, taught)) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        for curve, name, colour in ((alone, "SFT", "#777777"), (taught, "mapped", COLOURS[0])):
            means = [float(np.mean(values)) for values in curve.values()]
            axes.plot([*curve], means, color=colour, label=name)
            for rows, values in curve.items():
                axes.plot([rows] * len(values), values, ".", color=colour)
        axes.set_xscale("log", base=2)
        axes.set_xticks([*alone], [str(rows) for rows in alone])
        axes.set(title=TITLES[place], xlabel="rows")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("bits per byte (lower is better)")
    figure.axes[0].legend(fontsize="small", frameon=False)
    figure.savefig(RESULTS / "data_efficiency.png", dpi=130)


def read(place: str) -> tuple[Curve, Curve]:
    """Of all records SFT's and `mapped`'s bits per byte on a test set, fewest rows first."""
    curves: tuple[Curve, Curve] = ({}, {})
    for file in (*RESULTS.glob(FEWEST), *RESULTS.glob(RECORDS)):
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["results"]
        groups = results["compared"]["methods"]["groups"]
        for curve, name in zip(curves, ("sft", "mapped"), strict=True):
            curve[results["rows"]["train"]] = groups[name]["bits_per_byte"][place]
    alone, taught = (dict(sorted(curve.items())) for curve in curves)
    return alone, taught


def equal_rows(alone: Curve, bits: float) -> float:
    """The rows of fine-tuning with so many bits per byte; beyond the curve's ends ±inf."""
    rows, means = [*alone], [float(np.mean(values)) for values in alone.values()]
    for (few, before), (many, after) in zip(
        zip(rows, means, strict=True), zip(rows[1:], means[1:], strict=True), strict=False
    ):
        if before >= bits >= after:
            share = (before - bits) / (before - after)
            return math.exp(math.log(few) + share * math.log(many / few))
    return math.inf if bits < min(means) else -math.inf


def table(curves: tuple[Curve, Curve]) -> str:
    """Markdown: both methods by rows, the difference over seeds, and what SFT needs for it."""
    alone, taught = curves
    lines = [
        "| rows | SFT | `mapped` | difference | as good as SFT on |",
        "|---|---|---|---|---|",
    ]
    for rows in alone:
        mean, low, high = difference(taught[rows], alone[rows])
        equal = equal_rows(alone, float(np.mean(taught[rows])))
        beyond = f"more than {max(alone):,}" if equal > 0 else f"fewer than {min(alone):,}"
        as_good = f"{equal:,.0f} rows" if math.isfinite(equal) else beyond
        lines.append(
            f"| {rows:,} | {np.mean(alone[rows]):.3f} | {np.mean(taught[rows]):.3f} "
            f"| {mean:+.3f} ({low:+.3f} to {high:+.3f}) | {as_good} |"
        )
    return (
        "\n".join(lines).replace("-", "−").replace("|−−−|−−−|−−−|−−−|−−−|", "|---|---|---|---|---|")
    )


if __name__ == "__main__":
    typer.run(main)
