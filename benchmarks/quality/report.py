"""From trained students to figures: `dwakd evaluate` on each test set, tables, a picture.

python -m benchmarks.quality.report RECORD.json    # all tables of a record
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import say
from benchmarks.quality.materials import TEST_SETS, Materials, rendered
from benchmarks.quality.runs import Run, read_rows, result_of
from dwakd_plugin.io.files import replace_file

Results = dict[str, Any]

SAMPLING_SEEDS = (10, 20, 30)  # an answer to each row for each, as many as are asked for
# In the order of the tables: lower is better of the first.
METRICS = {"bits_per_byte": "bits per byte", "rouge_l": "ROUGE-L", "unended": "unended answers"}
# Where `dwakd evaluate` has them, and which of its own metrics brings them about.
_VALUE = {
    "bits_per_byte": ("bits_per_byte", "value"),
    "rouge_l": ("rouge_l", "mean"),
    "unended": ("responses", "unfinished_share"),
}
_ASKED = {"unended": "rouge_l"}


def evaluate(
    base: Materials,
    groups: dict[str, list[Run]],
    metrics: Sequence[str] = tuple(METRICS),
    samples: int = 1,
) -> Results:
    """Figures of every run on every test set, by group, and how many rows they are of.

    So many answers are sampled of each row. What is measured is kept beside its run.
    """
    names = list(dict.fromkeys(run.name for runs in groups.values() for run in runs))
    sampled = f"-{samples}_samples" if samples > 1 else ""
    kept = {run: base.runs / run / f"{'-'.join(metrics)}{sampled}.json" for run in names}
    missing = [run for run, file in kept.items() if not file.is_file()]
    if missing:
        folders = [base.runs / run for run in missing]
        asked = ",".join(dict.fromkeys(_ASKED.get(metric, metric) for metric in metrics))
        reports = {
            place: _dwakd_evaluate(base, place, folders, asked, samples) for place in TEST_SETS
        }
        for number, run in enumerate(missing):
            of_run = {place: found["models"][number] for place, found in reports.items()}
            found = {
                place: {metric: _value(one, metric) for metric in metrics}
                for place, one in of_run.items()
            }
            rows = {place: found["rows"] for place, found in reports.items()}
            replace_file(kept[run], json.dumps({"rows": rows, "figures": found}))
    measured = {run: json.loads(file.read_text(encoding="utf-8")) for run, file in kept.items()}
    results: Results = {
        "rows": measured[names[0]]["rows"],
        "settings": {
            group: {"dwakd": runs[0].dwakd, "learning_rate": runs[0].learning_rate}
            for group, runs in groups.items()
        },
        "seconds": {
            group: statistics.fmean(result_of(base, run)["seconds"] for run in runs)
            for group, runs in groups.items()
        },
        "groups": {},
    }
    for group, runs in groups.items():
        figures = [measured[run.name]["figures"] for run in runs]
        results["groups"][group] = {
            metric: {place: [each[place][metric] for each in figures] for place in TEST_SETS}
            | {"mean": [statistics.fmean(each[p][metric] for p in TEST_SETS) for each in figures]}
            for metric in metrics
        }
    return results


def at_start(base: Materials) -> dict[str, dict[str, float]]:
    """Bits per byte on each test set: of the student before any run, of the teacher with the tokens
    that it is left with, and of the teacher that it was made from."""
    models = {
        "student": base.student,
        "teacher": base.teacher,
        "untrimmed teacher": base.folder / "untrimmed",
    }
    figures = {}
    for place in TEST_SETS:
        found = _dwakd_evaluate(base, place, [*models.values()], "bits_per_byte")
        values = [one["bits_per_byte"]["value"] for one in found["models"]]
        figures[place] = dict(zip(models, values, strict=True))
    return figures


def _value(of_model: Results, metric: str) -> float:
    part, name = _VALUE[metric]
    return float(of_model[part][name])


def _dwakd_evaluate(
    base: Materials, place: str, folders: Sequence[Path], metrics: str, samples: int = 1
) -> Results:
    """The report of one `dwakd evaluate`. Answers that its folder holds are not sampled again."""
    rows = base.folder / "evaluation" / f"{place}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    # The prompts are written out: a template has one form, with an input or without.
    lines = (
        json.dumps({"instruction": rendered(row)[0], "output": row["output"]}) + "\n"
        for row in read_rows(base, place)
    )
    replace_file(rows, "".join(lines))
    output = base.folder / "evaluation" / base.pair / place
    command = [sys.executable, "-m", "dwakd_cli", "evaluate", str(folders[0]), str(rows), "--json"]
    command += [part for folder in folders[1:] for part in ("--against", str(folder))]
    command += ["--prompt-template", "{instruction}", "--metrics", metrics]
    seeds = ",".join(map(str, SAMPLING_SEEDS[:samples]))
    command += ["--seeds", seeds, "--max-new-tokens", str(base.longest)]
    command += ["--batch-size", "32", "--output", str(output)]
    say(f"evaluating {len(folders)} models on {place}")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ours − theirs, training seed by training seed, and its 95 % interval (Student's t).

    Both began from the same weights and read the same rows in the same order under a seed. The
    shorter list decides how many seeds are compared; fewer than two give an infinite interval.
    """
    from scipy.stats import t

    differences = [a - b for a, b in zip(ours, theirs, strict=False)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return mean, float("-inf"), float("inf")
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
    return mean, mean - half, mean + half


def tables(results: Results) -> str:
    """Markdown: each metric on each test set, and beside SFT under the same seeds."""
    places = [*TEST_SETS, "mean"]
    lines = []
    for metric in results["groups"]["sft"]:
        title = METRICS[metric]
        form = "{:.2f}" if metric == "rouge_l" else "{:.4f}"
        base = results["groups"]["sft"][metric]
        values, apart = [], []
        for group, found in results["groups"].items():
            head = f"| {group} | {len(found[metric]['mean'])} | "
            values.append(head + _cells(_spread(found[metric][place], form) for place in places))
            if group != "sft":
                apart.append(
                    head + _cells(_interval(found[metric][p], base[p], form) for p in places)
                )
        for kind, rows in (
            ("mean over training seeds (± standard deviation)", values),
            ("difference to SFT (95 % interval over training seeds)", apart),
        ):
            lines += [f"{title}, {kind}", "", "| | seeds | " + _cells(places)]
            lines += ["|---|---|" + "---|" * len(places), *rows, ""]
    return "\n".join(lines)


def _cells(texts: Iterable[str]) -> str:
    return " | ".join(texts) + " |"


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return form.format(values[0])
    return f"{form.format(statistics.fmean(values))} ± {form.format(statistics.stdev(values))}"


def _interval(ours: Sequence[float], theirs: Sequence[float], form: str) -> str:
    mean, low, high = difference(ours, theirs)
    signed = form.replace(":", ":+")
    if low == float("-inf"):
        return f"{signed.format(mean)} (one seed)"
    return f"{signed.format(mean)} ({signed.format(low)} to {signed.format(high)})"


def plot(results: Results, file: Path) -> None:
    """Each run's difference to SFT under the same seed, mean of the test sets, by metric."""
    from matplotlib.figure import Figure

    groups = [group for group in results["groups"] if group != "sft"]
    metrics = list(results["groups"]["sft"])
    figure = Figure(figsize=(5 * len(metrics), 1.2 + 0.38 * len(groups)), layout="constrained")
    all_axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(all_axes, metrics, strict=True):
        base = results["groups"]["sft"][metric]["mean"]
        for row, group in enumerate(groups):
            values = results["groups"][group][metric]["mean"]
            apart = [a - b for a, b in zip(values, base, strict=False)]
            mean, low, high = difference(values, base)
            axes.plot(apart, [row] * len(apart), "o", color="#4477aa", alpha=0.5, markersize=4)
            if len(apart) > 1:
                axes.plot([low, high], [row, row], color="#222222", linewidth=1.5)
            axes.plot([mean], [row], "|", color="#222222", markersize=12)
        axes.axvline(0, color="#999999", linewidth=0.8)
        better = "higher is better" if metric == "rouge_l" else "lower is better"
        axes.set_xlabel(f"{METRICS[metric]} against SFT ({better})")
        axes.set_yticks(range(len(groups)), groups)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def record_tables(results: Results) -> str:
    """Markdown: all of a record's tables: trials on dev, nats by kind of token, each comparison."""
    trials = sorted(results["trials"], key=lambda trial: trial["dev_bits_per_byte"])
    lines = ["| trial | learning rate | bits per byte on dev |", "|---|---|---|"]
    lines += [
        f"| {trial['name'].removeprefix('tune-')} | {trial['learning_rate']:g} | "
        f"{trial['dev_bits_per_byte']:.4f} |"
        for trial in trials
    ]
    kinds = ("all", "paired", "others", "first", "end")
    if "tokens" in results:  # which come last
        lines += ["", "| nats per token on dev | " + _cells(kinds), "|---|" + "---|" * len(kinds)]
    for name, found in results.get("tokens", {}).items():
        cells = (f"{found[kind]:.3f}" if kind in found else "" for kind in kinds)
        lines.append(f"| {name} | " + _cells(cells))
    for part, found in results["compared"].items():
        lines += ["", f"{part}: {tables(found)}".rstrip()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(record_tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["results"]))
