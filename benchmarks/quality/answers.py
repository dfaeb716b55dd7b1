"""`python -m benchmarks.quality.answers`: given, teacher-written and the student's own answers.

From the same student, teacher and prompts, in as many steps: fine-tuning; `mapped` on the rows'
answers, on answers that the teacher wrote (`dwakd answers`), and on either with a share of the
student's own in the second half; on the rows' answers again for as long as the student's own take;
and TRL's whole GOLDTrainer, which samples at the same share. Everything lies below --folder and is
kept, as in `benchmarks.quality`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import RESULTS, start, write_report
from benchmarks.quality import materials, report
from benchmarks.quality.methods import with_seeds
from benchmarks.quality.runs import Run, dataset, recipe, result_of, train_all

SHARE, LONGEST = 0.5, 64  # of a step's rows, and tokens of an answer
GIVEN, OWN, LONGER = "given", "given, then own", "given, as long"
SKEWED = "given, then own, skewed"  # by a divergence that no token of the student's makes large
WRITTEN, WRITTEN_OWN = "teacher's", "teacher's, then own"
RIVAL = "GOLD, own"
COMPARED = ("sft", GIVEN, OWN, SKEWED)
# Keys of GOLDConfig: sampled as ours are; its merge of the logits at the place that predicts them.
GOLD = {
    "lmbda": SHARE,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_completion_length": LONGEST,
    "uld_token_merge_strategy": "bayesian",
    "uld_use_hybrid_loss": True,
}
GOLD_TRIALS = {"alone": GOLD, "labels": GOLD | {"uld_crossentropy_weight": 1.0}}


def write_answers(base: materials.Materials, rate: float) -> Path:
    """The teacher's answers to the training rows, one each, as `dwakd answers` writes them."""
    file = base.folder / f"answers-{base.teacher.name}.jsonl"
    asked = recipe(base, Run("answers", {"variant": "mapped"}, rate))
    base.runs.mkdir(parents=True, exist_ok=True)
    path = base.runs / "answers.yml"
    path.write_text(yaml.safe_dump(asked, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "dwakd_cli", "answers", str(path), "--out", str(file)]
    subprocess.run([*command, "--max-new-tokens", str(LONGEST)], check=True)
    return file


def arms(base: materials.Materials, answers: Path, rate: float, steps: int) -> dict[str, Run]:
    """A run of each arm but GOLD's and LONGER, which hang on others' results."""
    mapped: dict[str, Any] = {"variant": "mapped"}
    sampled = {"share": SHARE, "max_new_tokens": LONGEST, "start_after": steps // 2}
    own, skewed = (sampled | {"divergence": name} for name in ("reverse_kl", "skewed_reverse_kl"))
    # Both kinds of rows are read twice at most: some prompts have no answer of the teacher's.
    same: dict[str, Any] = {"max_steps": steps, "num_epochs": 2}
    written = same | {"datasets": [dataset(answers)]}
    return {
        "sft": Run("sft", {"variant": "sft"}, rate, recipe=same),
        GIVEN: Run("given", mapped, rate, recipe=same),
        OWN: Run("given-own", mapped | {"own_answers": own}, rate, recipe=same),
        SKEWED: Run("given-own-skewed", mapped | {"own_answers": skewed}, rate, recipe=same),
        WRITTEN: Run("written", mapped, rate, recipe=written),
        WRITTEN_OWN: Run("written-own", mapped | {"own_answers": own}, rate, recipe=written),
    }


def gold_trials(given: Run) -> list[Run]:
    """GOLD's own trainer on the given rows: without the labels, as by default, and with them."""
    return [
        replace(given, name=f"gold-{name}-seed1", gold_trainer=settings)
        for name, settings in GOLD_TRIALS.items()
    ]


def seconds_of(base: materials.Materials, runs: list[Run]) -> float:
    """Of all steps of a run: of the one that other work disturbed least."""
    return min(result_of(base, run)["loop_seconds"] for run in runs)


def as_long(base: materials.Materials, given: list[Run], own: list[Run]) -> Run:
    """On given answers, in as many steps as take the time of those with own answers."""
    times = seconds_of(base, own) / seconds_of(base, given)
    steps = round(times * given[0].recipe["max_steps"])
    epochs = math.ceil(times * given[0].recipe["num_epochs"])
    return replace(given[0], name="longer", recipe={"max_steps": steps, "num_epochs": epochs})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.answers", description=__doc__
    )
    parser.add_argument("instructions", type=Path, help="as for `benchmarks.quality`")
    parser.add_argument("--folder", type=Path, default=Path("quality-benchmark"))
    parser.add_argument(
        "--student", default=f"{materials.CUT}20", help="as for `benchmarks.quality`"
    )
    parser.add_argument("--rows", type=int, default=240, help="to train on")
    parser.add_argument("--batch", type=int, default=3, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--held-out-bytes", type=int, default=5000, metavar="N")
    parser.add_argument(
        "--seeds", type=int, default=3, help=f"training seeds of {', '.join(COMPARED)}"
    )
    parser.add_argument("--other-seeds", type=int, default=1, help="of the others")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    begun = start(chosen.threads, False, ["axolotl", "transformers", "trl", "rouge-score"])
    base = materials.prepare(
        chosen.folder.resolve(),
        chosen.instructions,
        chosen.student,
        "tuned",
        train_rows=chosen.rows,
        batch=chosen.batch,
        held_out_bytes=chosen.held_out_bytes,
    )
    steps = chosen.rows // chosen.batch
    answers = write_answers(base, chosen.learning_rate)
    first = arms(base, answers, chosen.learning_rate, steps)

    def train(groups: dict[str, list[Run]]) -> None:
        together = [run for runs in groups.values() for run in runs]
        train_all(
            base, sorted(together, key=lambda run: run.seed), chosen.processes, chosen.threads
        )

    # The teacher reads each kind of rows once, for all runs on them.
    for name in (GIVEN, WRITTEN):
        short = replace(first[name], name=f"cache-{first[name].name}")
        short = replace(short, recipe={**short.recipe, "max_steps": 1})
        train_all(base, [short], 1, chosen.processes * chosen.threads)
    groups = {name: seeds_of(run, seeds_for(name, chosen)) for name, run in first.items()}
    trials = gold_trials(first[GIVEN])
    train({**groups, "trials": trials})
    best_trial = min(trials, key=lambda run: on_dev(base, [run]))
    groups[RIVAL] = seeds_of(best_trial, chosen.other_seeds)
    longer = as_long(base, groups[GIVEN], groups[OWN])
    groups[LONGER] = seeds_of(longer, chosen.other_seeds)
    train(groups)
    found = report.evaluate(base, groups)
    results = {
        "pair": base.pair,
        "rows": {"train": chosen.rows, "answered": len(answers.read_text().splitlines())},
        "steps": steps,
        "dev": {
            name: [result_of(base, run)["dev_bits_per_byte"] for run in runs]
            for name, runs in groups.items()
        },
        "loop_seconds": {name: seconds_of(base, runs) for name, runs in groups.items()},
        "sampling_seconds": {name: sampling_of(base, runs) for name, runs in groups.items()},
        "peak_bytes": {
            name: max(result_of(base, run)["peak_bytes"] for run in runs)
            for name, runs in groups.items()
        },
        "gold_trials": {run.name: on_dev(base, [run]) for run in trials},
        "compared": {"answers": found},
    }
    file = write_report("answers", begun, results, [], chosen.out)
    report.plot(found, file.with_suffix(".png"))
    print(report.tables(found), flush=True)


def seeds_for(name: str, chosen: argparse.Namespace) -> int:
    return int(chosen.seeds if name in COMPARED else chosen.other_seeds)


def seeds_of(run: Run, count: int) -> list[Run]:
    """The run, or that of the first seed, under so many seeds."""
    return with_seeds(run.name.removesuffix("-seed1"), replace(run, name=""), count)


def on_dev(base: materials.Materials, runs: list[Run]) -> float:
    return statistics.fmean(result_of(base, run)["dev_bits_per_byte"] for run in runs)


def sampling_of(base: materials.Materials, runs: list[Run]) -> float:
    """Seconds of sampling, in the run of `seconds_of`; 0 where no answer is the student's."""
    found = min((result_of(base, run) for run in runs), key=lambda each: each["loop_seconds"])
    return found.get("sampling_seconds", sum(found["curves"].get("own_seconds", [])))


if __name__ == "__main__":
    main()
