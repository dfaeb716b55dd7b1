"""What a teacher is worth, as one picture, from a record of the quality benchmark.

python -m benchmarks.gain
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.report import difference

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "quality_cut20-tuned120.json"
TITLES = {"dolly": "Dolly, the task", "self_instruct": "Self-Instruct", "vicuna": "Vicuna"}
NAMES = {"dwakd": "paper", "gold": "GOLD (TRL)", "uld": "ULD"}
COLOURS = ("#4477aa", "#ee8866", "#999999")


def main() -> None:
    """Draw what a teacher is worth, as gain.png, from the record of the quality benchmark."""
    results = json.loads(RECORD.read_text(encoding="utf-8"))["results"]
    groups = results["compared"]["methods"]["groups"]
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _by_seed(left, groups)
    _by_method(right, groups)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "gain.png", dpi=130)


def _by_seed(axes: Axes, groups: dict[str, Any]) -> None:
    """Bits per byte of the task's test rows: alone and taught, under each seed."""
    alone, taught = (groups[name]["bits_per_byte"]["dolly"] for name in ("sft", "mapped"))
    for row, (before, after) in enumerate(zip(alone, taught, strict=True)):
        axes.plot([after, before], [row, row], color="#bbbbbb", zorder=1)
    for values, name, colour in ((taught, "mapped", COLOURS[0]), (alone, "SFT", "#777777")):
        axes.plot(values, range(len(values)), "o", color=colour, label=name)
    axes.set_yticks(range(len(alone)), [f"seed {seed}" for seed in range(1, len(alone) + 1)])
    axes.set(xlabel="bits per byte on Dolly (lower is better)")
    axes.legend(fontsize="small", frameon=False)
    axes.invert_yaxis()


def _by_method(axes: Axes, groups: dict[str, Any]) -> None:
    """Each method's difference to SFT on each test set, with the interval over training seeds."""
    names = [name for name in groups if name != "sft"]
    for shift, place, colour in zip((-0.2, 0.0, 0.2), TITLES, COLOURS, strict=True):
        for row, name in enumerate(names):
            ours, theirs = (groups[one]["bits_per_byte"][place] for one in (name, "sft"))
            mean, low, high = difference(ours, theirs)
            label = TITLES[place] if row == 0 else None
            axes.plot([low, high], [row + shift] * 2, color=colour, linewidth=1.5)
            axes.plot([mean], [row + shift], "o", color=colour, markersize=5, label=label)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    axes.set_xlabel("bits per byte against SFT (lower is better)")
    axes.legend(fontsize="small", frameon=False)
    axes.invert_yaxis()


if __name__ == "__main__":
    typer.run(main)
