"""What a teacher is worth, as one picture, from records of the quality benchmark.

python -m benchmarks.gain

On the left each method reads the rows once or three times, whichever is better on dev.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.report import difference

RESULTS = Path(__file__).parent / "results"
STUDENTS = {
    "20 layers,\nGPT-2's tokenizer": "quality_128_cut20-gpt2",
    "20 layers,\n4,096 tokens": "quality_128_cut20",
    "8 layers,\n4,096 tokens": "quality_128_cut8",
}
READINGS = ("", "_3epochs")  # the endings of a student's records: rows read once, and three times
TITLES = {"dolly": "Dolly, the task", "self_instruct": "Self-Instruct", "vicuna": "Vicuna"}
NAMES = {"dwakd": "DWA-KD, tuned", "gold": "GOLD (TRL)", "uld": "ULD"}
_TIMES = {1: "once", 3: "three times"}
COLOURS = ("#4477aa", "#ee8866", "#999999")

Groups = dict[str, Any]
"""By method, then metric, then test set: the values under each training seed."""


def main() -> None:
    """Draw what a teacher is worth, as gain.png, and print the table of its left side."""
    records = {title: read(name) for title, name in STUDENTS.items()}
    best = {title: at_their_best(of_student) for title, of_student in records.items()}
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _against_sft(left, {title: (found, "mapped") for title, (found, _) in best.items()})
    left.set_title("mapped, three students, each at its best", fontsize="medium")
    once, *_ = next(iter(records.values()))
    found = _groups(once)
    names = [name for name in found if name != "sft"]
    _against_sft(right, {NAMES.get(name, name): (found, name) for name in names})
    right.set_title("every method on the first, rows read once", fontsize="medium")
    left.legend(fontsize="small", frameon=False)
    figure.savefig(RESULTS / "gain.png", dpi=130)
    print(table(best))


def read(name: str) -> list[dict[str, Any]]:
    """The records of a student, by how often rows are read; the first is always there."""
    first, *others = (RESULTS / f"{name}{ending}.json" for ending in READINGS)
    files = [first, *(file for file in others if file.is_file())]
    return [json.loads(file.read_text(encoding="utf-8"))["results"] for file in files]


def at_their_best(records: list[dict[str, Any]]) -> tuple[Groups, dict[str, int]]:
    """Each method of the record in which the best of its trials is the best on dev.

    And how often rows are read in that one.
    """
    found: Groups = {}
    readings: dict[str, int] = {}
    for method in dict.fromkeys(name for one in records for name in _groups(one)):
        best = min((one for one in records if method in _groups(one)), key=_on_dev(method))
        found[method], readings[method] = _groups(best)[method], best.get("epochs", 1)
    return found, readings


def _groups(record: dict[str, Any]) -> Groups:
    groups: Groups = record["compared"]["methods"]["groups"]
    return groups


def _on_dev(method: str) -> Callable[[dict[str, Any]], float]:
    return lambda record: min(
        trial["dev_bits_per_byte"]
        for trial in record["trials"]
        if trial["name"].startswith(f"tune-{method}-")
    )


def table(best: dict[str, tuple[Groups, dict[str, int]]]) -> str:
    """Markdown: `mapped` against SFT on each test set, and how often each reads the rows."""
    lines = [
        "| student | " + " | ".join(TITLES.values()) + " | rows read by SFT, by `mapped` |",
        "|---|" + "---|" * (len(TITLES) + 1),
    ]
    for title, (found, readings) in best.items():
        cells = [title.replace("\n", " ")]
        for place in TITLES:
            ours, theirs = (found[one]["bits_per_byte"][place] for one in ("mapped", "sft"))
            mean, low, high = (
                f"{value:+.3f}".replace("-", "−") for value in difference(ours, theirs)
            )
            cells.append(f"{mean} ({low} to {high})")
        cells.append(", ".join(_TIMES[readings[one]] for one in ("sft", "mapped")))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
