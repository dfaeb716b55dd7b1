"""`python -m benchmarks.quality`: trains all methods and ablations, evaluates, writes a report.

Everything lies below --folder, and trainings that are done are kept: stopped and started again, it
goes on with the next.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, say, start, write_report
from benchmarks.quality import materials, methods, report
from benchmarks.quality.runs import Run, read_rows, result_of, train_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument(
        "instructions",
        type=Path,
        help="folder with dolly_{train,dev,test}.jsonl, selfinst_252.jsonl and vicuna_80.jsonl",
    )
    parser.add_argument("--folder", type=Path, default=Path("quality-benchmark"))
    parser.add_argument("--seeds", type=int, default=5, help="training seeds of the headline")
    parser.add_argument("--uld-seeds", type=int, help="of ULD alone, which takes twice as long")
    parser.add_argument("--few-seeds", type=int, default=2, help="of four epochs on few rows")
    parser.add_argument("--ablation-seeds", type=int, default=3, help="and of DSKDv2 and DWA-KDv2")
    parser.add_argument("--skip-ablations", action="store_true")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=methods.METHODS[1:], help="methods to leave out"
    )
    parser.add_argument("--second-student", type=Path, help="folder of a second, tiny student")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    begun = start(chosen.threads, False, ["axolotl", "transformers", "rouge-score"])
    base = materials.prepare(chosen.folder.resolve(), chosen.instructions)

    def train(runs: list[Run]) -> list[float]:
        train_all(base, runs, chosen.processes, chosen.threads)
        return [result_of(base, run)["dev_bits_per_byte"] for run in runs]

    # The teacher reads the rows once, for all: in a run of its own, so that two do not both do it.
    first = Run("cache", {"variant": "full"}, 1e-4, recipe={"max_steps": 1})
    train_all(base, [first], 1, chosen.threads)
    tuned = {"sft": methods.tune_sft(train, methods.LEARNING_RATES, "tune", {})}
    others = [method for method in methods.METHODS[1:] if method not in chosen.without]
    tuned |= methods.tune(others, tuned["sft"].learning_rate, train)
    say("best on dev: " + ", ".join(run.name for run in tuned.values()))
    groups: dict[str, list[Run]] = {}
    for method, best in tuned.items():
        seeds = chosen.seeds if method in methods.HEADLINE else chosen.ablation_seeds
        if method == "uld" and chosen.uld_seeds is not None:
            seeds = chosen.uld_seeds
        groups[method] = methods.with_seeds(method, best, seeds)
    # Seed by seed, the slowest method last: what is stopped early has whole comparisons.
    order = {run.name: (name == "uld", run.seed) for name, runs in groups.items() for run in runs}
    train(
        sorted((run for runs in groups.values() for run in runs), key=lambda run: order[run.name])
    )
    if "dwakd" in tuned and not chosen.skip_ablations:
        ablated = methods.ablations(tuned["dwakd"], chosen.ablation_seeds)
        train([run for runs in ablated.values() for run in runs])
        groups |= {f"ablation: {name}": runs for name, runs in ablated.items()}
    students, compared = {"student": base.student}, {"main": groups}
    if chosen.few_seeds > 0:
        compared["few"] = methods.few_rows(base, tuned, chosen.few_seeds)
        train([run for runs in compared["few"].values() for run in runs])
    if chosen.second_student is not None:
        students["second"] = chosen.second_student.resolve()
        compared["second"] = methods.second_pair(
            students["second"], tuned, train, chosen.ablation_seeds
        )
        train([run for runs in compared["second"].values() for run in runs])
    results: dict[str, Any] = {
        "rows": {name: len(read_rows(base.rows(name))) for name in ("train", "dev")},
        "start": report.at_start(base, students),
        "trials": trials(base),
        "compared": {name: report.evaluate(base, name, own) for name, own in compared.items()},
    }
    write_report("quality", begun, results, [], chosen.out)
    for name, found in results["compared"].items():
        report.plot(
            found, chosen.out / ("quality.png" if name == "main" else f"quality_{name}.png")
        )
        print(f"{name}\n\n{report.tables(found)}")


def trials(base: materials.Materials) -> list[dict[str, Any]]:
    """Every run on dev, with its settings."""
    files = sorted((base.folder / "runs").glob("*tune-*/run.json"))
    kept = ("name", "dwakd", "learning_rate", "dev_bits_per_byte", "seconds")
    return [
        {key: json.loads(file.read_text(encoding="utf-8"))[key] for key in kept} for file in files
    ]


if __name__ == "__main__":
    main()
