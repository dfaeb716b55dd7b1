"""`python -m benchmarks.quality`: trains all methods and ablations, evaluates, writes a report.

Everything lies below --folder, and trainings that are done are kept: stopped and started again, it
goes on with the next. The report is written anew with each comparison: SFT and `mapped`, the other
methods, SFT on more rows, ablations, switches.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, say, start, write_report
from benchmarks.quality import by_token, materials, methods, report
from benchmarks.quality.runs import Run, read_rows, result_of, train_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument(
        "instructions",
        type=Path,
        help="folder with dolly_{train,dev,test}.jsonl, selfinst_252.jsonl and vicuna_80.jsonl",
    )
    parser.add_argument("--folder", type=Path, default=Path("quality-benchmark"))
    parser.add_argument(
        "--student",
        default="small",
        help=f"{', '.join(materials.PRETRAINING)}; {materials.CUT}20, of 20 of the teacher's "
        "layers; or the folder of another one",
    )
    parser.add_argument(
        "--teacher",
        choices=materials.TEACHERS,
        default="tuned",
        help="fine-tuned on the training rows first, as the paper's are, or not",
    )
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=methods.LEARNING_RATES,
        help="SFT's trials; the other methods start from the best of them",
    )
    parser.add_argument("--rows", type=int, default=materials.TRAIN_ROWS, help="to train on")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--epochs", type=int, default=1, help="of each training")
    parser.add_argument(
        "--longest",
        type=int,
        default=materials.LONGEST,
        metavar="N",
        help="rows of at most N of the teacher's tokens, but for Vicuna's",
    )
    parser.add_argument(
        "--held-out-bytes",
        type=int,
        default=math.inf,
        metavar="N",
        help="measure on the first rows of each set whose responses have as many bytes",
    )
    parser.add_argument("--trials", type=int, default=3, help="of each method but SFT")
    parser.add_argument("--seeds", type=int, default=5, help="training seeds of SFT and mapped")
    parser.add_argument("--other-seeds", type=int, default=5, help="of the other methods")
    parser.add_argument("--ablation-seeds", type=int, default=3, help="0: no ablations")
    parser.add_argument("--switch-seeds", type=int, default=0, help="0: no switches")
    parser.add_argument(
        "--more-rows", nargs="*", type=float, default=[], help="times as many, for SFT alone"
    )
    parser.add_argument("--more-seeds", type=int, default=2, help="of SFT on more rows")
    parser.add_argument(
        "--metrics", nargs="+", choices=report.METRICS, default=list(report.METRICS)
    )
    parser.add_argument(
        "--without", nargs="*", default=[], choices=methods.METHODS[1:], help="methods to leave out"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1,
        choices=range(1, len(report.SAMPLING_SEEDS) + 1),
        help="answers to each row, for ROUGE-L and the share of answers without an end",
    )
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    begun = start(chosen.threads, False, ["axolotl", "transformers", "rouge-score"])
    base = materials.prepare(
        chosen.folder.resolve(),
        chosen.instructions,
        chosen.student,
        chosen.teacher,
        train_rows=chosen.rows,
        batch=chosen.batch,
        epochs=chosen.epochs,
        longest=chosen.longest,
        held_out_bytes=chosen.held_out_bytes,
    )
    results: dict[str, Any] = {
        "rows": {"train": chosen.rows, "dev": len(read_rows(base, "dev"))},
        "epochs": chosen.epochs,
        "compared": {},
    }
    name = f"quality_{base.pair}"

    def train(runs: list[Run]) -> list[float]:
        train_all(base, runs, chosen.processes, chosen.threads)
        return [result_of(base, run)["dev_bits_per_byte"] for run in runs]

    def compare(part: str, groups: dict[str, list[Run]]) -> None:
        # Seed by seed: what is stopped early has whole comparisons.
        train(sorted((run for runs in groups.values() for run in runs), key=lambda run: run.seed))
        found = report.evaluate(base, groups, chosen.metrics, chosen.samples)
        results["compared"][part], results["trials"] = found, trials(base)
        write_report(name, begun, results, [], chosen.out)
        report.plot(found, chosen.out / f"{name}_{part}.png")
        print(f"{part}\n\n{report.tables(found)}", flush=True)

    # The teacher reads the rows once, for all: in a run of its own, so that two do not both do it.
    first = Run("cache", {"variant": "paper"}, 1e-4, recipe={"max_steps": 1})
    train_all(base, [first], 1, chosen.processes * chosen.threads)
    tuned = {"sft": methods.tune_sft(train, chosen.learning_rates)}
    methods_runs: dict[str, list[Run]] = {}
    for together in (methods.HEADLINE, methods.METHODS):
        names = [one for one in together if one not in {*tuned, *chosen.without}]
        tuned |= methods.tune(names, tuned["sft"].learning_rate, train, chosen.trials)
        say("best on dev: " + ", ".join(run.name for run in tuned.values()))
        for method in tuned:
            seeds = chosen.seeds if method in methods.HEADLINE else chosen.other_seeds
            methods_runs[method] = methods.with_seeds(method, tuned[method], seeds)
        compare("methods", methods_runs)
    if chosen.more_rows:
        more = methods.more_rows(base, tuned["sft"], chosen.more_rows, chosen.more_seeds)
        compare("rows", {one: methods_runs[one] for one in methods.HEADLINE} | more)
    if "dwakd" in tuned and chosen.ablation_seeds > 0:
        compare("ablations", methods.ablations(tuned, chosen.ablation_seeds))
    if {"dwakd", "mapped"} <= tuned.keys() and chosen.switch_seeds > 0:
        compare("switches", methods.switches(tuned, chosen.switch_seeds))
    results["start"] = report.at_start(base)
    results["tokens"] = by_token.figures(
        base,
        {"start": base.student}
        | {name: base.runs / runs[0].name for name, runs in methods_runs.items()},
        {"teacher": base.teacher, "teacher, untuned": base.folder / "untuned"},
    )
    write_report(name, begun, results, [], chosen.out)


def trials(base: materials.Materials) -> list[dict[str, Any]]:
    """Every run on dev, with its settings."""
    files = sorted(base.runs.glob("tune-*/run.json"))
    kept = ("name", "dwakd", "learning_rate", "dev_bits_per_byte", "seconds")
    return [
        {key: json.loads(file.read_text(encoding="utf-8"))[key] for key in kept} for file in files
    ]


if __name__ == "__main__":
    main()
