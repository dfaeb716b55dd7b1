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
        help=f"{', '.join(materials.PRETRAINING)}, or the folder of another one",
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
    parser.add_argument("--seeds", type=int, default=5, help="training seeds of SFT, DSKD, DWA-KD")
    parser.add_argument("--other-seeds", type=int, default=5, help="of the other methods")
    parser.add_argument("--ablation-seeds", type=int, default=3, help="0: no ablations")
    parser.add_argument("--lever-seeds", type=int, default=2, help="0: none of them")
    parser.add_argument("--few-seeds", type=int, default=2, help="of four epochs on few rows")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=methods.METHODS[1:], help="methods to leave out"
    )
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    begun = start(chosen.threads, False, ["axolotl", "transformers", "rouge-score"])
    base = materials.prepare(
        chosen.folder.resolve(), chosen.instructions, chosen.student, chosen.teacher
    )

    def train(runs: list[Run]) -> list[float]:
        train_all(base, runs, chosen.processes, chosen.threads)
        return [result_of(base, run)["dev_bits_per_byte"] for run in runs]

    # The teacher reads the rows once, for all: in a run of its own, so that two do not both do it.
    first = Run("cache", {"variant": "paper"}, 1e-4, recipe={"max_steps": 1})
    train_all(base, [first], 1, chosen.processes * chosen.threads)
    tuned = {"sft": methods.tune_sft(train, chosen.learning_rates)}
    others = [method for method in methods.METHODS[1:] if method not in chosen.without]
    tuned |= methods.tune(others, tuned["sft"].learning_rate, train)
    say("best on dev: " + ", ".join(run.name for run in tuned.values()))
    compared: dict[str, dict[str, list[Run]]] = {"methods": {}}
    for method, best in tuned.items():
        seeds = chosen.seeds if method in methods.HEADLINE else chosen.other_seeds
        compared["methods"][method] = methods.with_seeds(method, best, seeds)
    if "dwakd" in tuned and chosen.ablation_seeds > 0:
        compared["ablations"] = methods.ablations(tuned, chosen.ablation_seeds)
    if "dwakd" in tuned and chosen.lever_seeds > 0:
        compared["levers"] = methods.levers(tuned, chosen.lever_seeds)
    if chosen.few_seeds > 0:
        compared["few"] = methods.few_rows(base, tuned, chosen.few_seeds)
    # Seed by seed, and ULD last, which is the slowest: what is stopped early has whole comparisons.
    for groups in compared.values():
        together = [(name == "uld", run) for name, runs in groups.items() for run in runs]
        train([run for _, run in sorted(together, key=lambda one: (one[0], one[1].seed))])
    results: dict[str, Any] = {
        "rows": {name: len(read_rows(base.rows(name))) for name in ("train", "dev")},
        "start": report.at_start(base),
        "trials": trials(base),
        "tokens": by_token.figures(
            base,
            {"start": base.student}
            | {name: base.runs / runs[0].name for name, runs in compared["methods"].items()},
            {"teacher": base.teacher, "teacher, untuned": base.folder / "untuned"},
        ),
        "compared": {name: report.evaluate(base, groups) for name, groups in compared.items()},
    }
    name = f"quality_{base.pair}"
    write_report(name, begun, results, [], chosen.out)
    for part, found in results["compared"].items():
        report.plot(found, chosen.out / f"{name}_{part}.png")
        print(f"{part}\n\n{report.tables(found)}")


def trials(base: materials.Materials) -> list[dict[str, Any]]:
    """Every run on dev, with its settings."""
    files = sorted(base.runs.glob("tune-*/run.json"))
    kept = ("name", "dwakd", "learning_rate", "dev_bits_per_byte", "seconds")
    return [
        {key: json.loads(file.read_text(encoding="utf-8"))[key] for key in kept} for file in files
    ]


if __name__ == "__main__":
    main()
