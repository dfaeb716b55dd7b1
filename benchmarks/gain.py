"""What a teacher is worth, as one picture, from records of the quality benchmark.

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
STUDENTS = {
    "20 layers,\nGPT-2's tokenizer": "quality_128_cut20-gpt2.json",
    "20 layers,\n4,096 tokens": "quality_128_cut20.json",
    "8 layers,\n4,096 tokens": "quality_128_cut8.json",
}
TITLES = {"dolly": "Dolly, the task", "self_instruct": "Self-Instruct", "vicuna": "Vicuna"}
NAMES = {"dwakd": "DWA-KD, tuned", "gold": "GOLD (TRL)", "uld": "ULD"}
COLOURS = ("#4477aa", "#ee8866", "#999999")

Groups = dict[str, Any]
"""By method, then metric, then test set: the values under each training seed."""


def main() -> None:
    """Draw what a teacher is worth, as gain.png, from the records of the quality benchmark."""
    records = {title: groups(RESULTS / file) for title, file in STUDENTS.items()}
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _against_sft(left, {title: (found, "mapped") for title, found in records.items()})
    left.set_title("mapped, three students", fontsize="medium")
    title, found = next(iter(records.items()))
    names = [name for name in found if name != "sft"]
    _against_sft(right, {NAMES.get(name, name): (found, name) for name in names})
    right.set_title(f"every method, {title.replace(chr(10), ' ')}", fontsize="medium")
    left.legend(fontsize="small", frameon=False)
    figure.savefig(RESULTS / "gain.png", dpi=130)


def groups(record: Path) -> Groups:
    """What a record has of the methods that it compared."""
    results = json.loads(record.read_text(encoding="utf-8"))["results"]
    found: Groups = results["compared"]["methods"]["groups"]
    return found


def _against_sft(axes: Axes, rows: dict[str, tuple[Groups, str]]) -> None:
    """Differences to SFT on each test set, with the intervals over training seeds."""
    for shift, place, colour in zip((-0.2, 0.0, 0.2), TITLES, COLOURS, strict=True):
        for row, (found, name) in enumerate(rows.values()):
            ours, theirs = (found[one]["bits_per_byte"][place] for one in (name, "sft"))
            mean, low, high = difference(ours, theirs)
            label = TITLES[place] if row == 0 else None
            axes.plot([low, high], [row + shift] * 2, color=colour, linewidth=1.5)
            axes.plot([mean], [row + shift], "o", color=colour, markersize=5, label=label)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [*rows])
    axes.set_xlabel("bits per byte against SFT (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()


if __name__ == "__main__":
    typer.run(main)
