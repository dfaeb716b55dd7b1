"""What a teacher is worth, as one picture, from the records of the quickstart and of the benchmark.

python -m benchmarks.gain
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.report import difference

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    quickstart, quality = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("quickstart", "quality_longer-tuned")
    )
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _by_seed(left, quickstart)
    _by_method(right, quality["results"]["compared"]["methods"]["groups"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "gain.png", dpi=130)


def _by_seed(axes: Axes, record: dict[str, Any]) -> None:
    """Bits per byte of the quickstart's held-out rows: alone and taught, under each seed."""
    for row, figures in enumerate(record["seeds"].values()):
        axes.plot([figures["taught"], figures["alone"]], [row, row], color="#bbbbbb", zorder=1)
        for name, colour, side in (("taught", "#4477aa", "right"), ("alone", "#777777", "left")):
            axes.plot([figures[name]], [row], "o", color=colour)
            text = f"   {name}, {figures[name]:.3f}   "
            axes.annotate(text, (figures[name], row), ha=side, va="center", fontsize="small")
    for name in ("student as cut", "teacher"):
        axes.axvline(record[name], color="#999999", linewidth=0.8, linestyle=":")
        axes.annotate(f" {name}", (record[name], -0.75), fontsize="small", va="top")
    axes.set_yticks(range(len(record["seeds"])), [f"seed {seed}" for seed in record["seeds"]])
    axes.set(xlim=(0.9, 1.95), ylim=(1.5, -0.8), xlabel="bits per byte (lower is better)")
    axes.set_title("A student cut from a real model (the demo)", fontsize="medium")


def _by_method(axes: Axes, groups: dict[str, Any]) -> None:
    """Each method's difference to SFT on the task, with the interval over training seeds."""
    base = groups["sft"]["bits_per_byte"]["dolly"]
    names = [name for name in groups if name != "sft"]
    for row, name in enumerate(names):
        mean, low, high = difference(groups[name]["bits_per_byte"]["dolly"], base)
        axes.plot([low, high], [row, row], color="#222222", linewidth=1.5)
        axes.plot([mean], [row], "o", color="#4477aa" if mean < 0 else "#bb5566")
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("bits per byte against fine-tuning alone (lower is better)")
    axes.set_title("A weak student on Dolly, by method", fontsize="medium")
    axes.invert_yaxis()


if __name__ == "__main__":
    main()
