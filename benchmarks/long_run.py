"""Thousands of optimizer steps of a tiny pair: memory, open files, threads, and the loss's truth.

    python -m benchmarks.long_run

Trains through axolotl, with checkpoints and evaluations on the way, once with a teacher that runs
in every step and once with a cached one, each in a process of its own. Every `--every` steps it
notes resident memory, open file handles and threads; memory's trend is the least-squares slope
after the first quarter. Every `--check-every` steps it computes the loss of the rows since the last
log line again, in float64, from copies of the same weights and by the loss's pure function, with a
teacher that is not cached, and compares with what was logged.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks import measure
from tests.conftest import ROWS, make_lab, tiny_recipe, write_rows

LOG_EVERY = 10
TEACHERS = ("live", "cached")
SLOPE_LIMIT = 2**20  # bytes for 1,000 steps
DRIFT_LIMIT = 1e-4  # relative, of float32 to float64

Sample = tuple[int, int, int, int]  # step, bytes resident, open handles, threads


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 2000,
    every: Annotated[int, typer.Option(help="Steps between two looks at the process.")] = 20,
    check_every: Annotated[
        int, typer.Option(help="Steps between two recomputed losses; 0: none.")
    ] = 200,
    results: Annotated[Path, typer.Option(help="Folder of the report.")] = measure.RESULTS,
    teacher: Annotated[str | None, typer.Option(hidden=True)] = None,
    lab: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    torch.set_num_threads(1)
    if teacher is not None and lab is not None:  # in the process of one run
        print("\n" + json.dumps(train(lab, teacher, steps, every, check_every)))
        return
    started = measure.start(1, False, ["axolotl", "transformers"])
    with tempfile.TemporaryDirectory(prefix="dwakd-long-run-") as folder:
        lab = make_lab(Path(folder))
        rows = [
            {**row, "instruction": f"{row['instruction']} ({turn})"}
            for turn in range(10)
            for row in ROWS
        ]
        write_rows(lab / "rows.jsonl", rows)
        runs = {name: _in_new_process(lab, name, steps, every, check_every) for name in TEACHERS}
    targets = []
    for name, run in runs.items():
        slope = run["memory_slope"]["bytes_per_1000_steps"]
        targets += [
            measure.target(f"{name} teacher: growth in MB per 1,000 steps", slope / 1e6, 1.0),
            measure.target(f"{name} teacher: handles gained", run["handles_gained"], 0),
            measure.target(f"{name} teacher: threads gained", run["threads_gained"], 0),
        ]
        if (drift := run["largest_drift"]) is not None:
            targets.append(measure.target(f"{name} teacher: drift of the loss", drift, DRIFT_LIMIT))
    report = {"steps": steps, "rows": len(rows), "runs": runs}
    measure.write_report("long_run", started, report, targets, results)


def _in_new_process(lab: Path, teacher: str, steps: int, every: int, check_every: int) -> Any:
    command = [sys.executable, "-m", "benchmarks.long_run", "--teacher", teacher, "--lab", str(lab)]
    command += ["--steps", str(steps), "--every", str(every), "--check-every", str(check_every)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr[-4000:])
    return json.loads(result.stdout.splitlines()[-1])


def train(lab: Path, teacher: str, steps: int, every: int, check_every: int) -> dict[str, Any]:
    """One run; returns what was seen."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    from dwakd_plugin.train.trainer import DWAKDTrainer

    folder = lab / teacher
    folder.mkdir()
    states = {"cache": str(folder / "states")} if teacher == "cached" else {}
    recipe = tiny_recipe(
        lab,
        folder,
        {"teacher": states},
        max_steps=steps,
        num_epochs=steps,
        val_set_size=0.1,
        eval_steps=max(1, steps // 8),
        save_steps=max(1, steps // 20),
        save_total_limit=2,
        logging_steps=LOG_EVERY,
        lr_scheduler="constant",
        learning_rate=3e-4,
    )
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    watch = Watch(lab, every, check_every)
    begin, compute = DWAKDTrainer.begin_distillation, DWAKDTrainer.compute_loss

    def begin_watched(self: Any, distillation: Any) -> None:
        begin(self, distillation)
        self.add_callback(watch)

    def compute_watched(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if model.training:
            watch.before_step(self, inputs, num_items_in_batch)
        return compute(self, model, inputs, return_outputs, num_items_in_batch)

    DWAKDTrainer.begin_distillation = begin_watched  # type: ignore[method-assign]
    DWAKDTrainer.compute_loss = compute_watched  # type: ignore[method-assign]
    do_train(load_cfg(str(file)), TrainerCliArgs())
    return watch.report(steps)


class Watch(TrainerCallback):
    """Looks at the process, and computes losses anew."""

    def __init__(self, lab: Path, every: int, check_every: int) -> None:
        self.every, self.check_every = every, check_every
        self.student = AutoModelForCausalLM.from_pretrained(lab / "student", dtype=torch.float64)
        self.teacher = double_teacher(lab / "teacher")
        self.projectors: Any = None
        self.samples: list[Sample] = []
        self.recomputed: list[float] = []
        self.drift: list[dict[str, float]] = []

    def before_step(self, trainer: Any, inputs: dict[str, Any], count: Any) -> None:
        """Computes the loss of the coming step where it is in a window that is checked."""
        if self.check_every == 0:
            return
        ahead = -(trainer.state.global_step + 1) % self.check_every
        if ahead >= LOG_EVERY:
            return
        if ahead == LOG_EVERY - 1:
            self.recomputed.clear()
        self.recomputed.append(self.loss(trainer, inputs, count))

    @torch.no_grad()
    def loss(self, trainer: Any, inputs: dict[str, Any], count: Any) -> float:
        """The training objective per label token in float64, from copies of the weights."""
        from dwakd_plugin.data.collator import split_batch
        from dwakd_plugin.loss import dwakd_loss
        from dwakd_plugin.models.projectors import Projectors
        from dwakd_plugin.models.student import student_states
        from dwakd_plugin.train.distillation import PROJECTORS

        ours, theirs = trainer.model.state_dict(), f"{PROJECTORS}."
        own = {name: value for name, value in ours.items() if not name.startswith(theirs)}
        self.student.load_state_dict(own)
        if self.projectors is None:
            size = self.student.config.hidden_size
            self.projectors = Projectors(size, self.teacher.hidden_size).double()
        self.projectors.load_state_dict(
            {name.removeprefix(theirs): ours[name] for name in ours if name.startswith(theirs)}
        )
        batch, rest = split_batch(inputs)
        batch.pop("teacher_hidden", None)  # what the cache had is checked too
        distillation, state = trainer.distillation, trainer.state
        config = distillation.config
        terms = dwakd_loss(
            student_states(self.student, batch, **rest),
            self.teacher.states(batch),
            self.projectors,
            loss=config.loss,
            soft_dtw=config.soft_dtw,
            gamma=distillation.gamma(state.global_step, state.max_steps),
        )
        total = terms.total(config.loss, distillation.kd_ramp(state.global_step))
        return float(total / float(count))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in (logs or {}) or not self.check_every:
            return
        if state.global_step % self.check_every:
            return
        expected = sum(self.recomputed) / len(self.recomputed)
        self.drift.append(
            {
                "step": state.global_step,
                "logged": logs["loss"],
                "recomputed": expected,
                "relative": abs(logs["loss"] - expected) / expected,
            }
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            own = Path("/proc/self")
            handles, threads = (len([*(own / what).iterdir()]) for what in ("fd", "task"))
            resident = measure.status_bytes("VmRSS")
            self.samples.append((state.global_step, resident, handles, threads))

    def report(self, steps: int) -> dict[str, Any]:
        late = [sample for sample in self.samples if sample[0] > steps // 4]
        slope, error = least_squares([s[0] for s in late], [s[1] for s in late])
        return {
            "memory_slope": {
                "bytes_per_1000_steps": round(1000 * slope),
                "standard_error": round(1000 * error),
                "from_step": late[0][0],
            },
            "resident_bytes": {"first": late[0][1], "last": late[-1][1]},
            "handles_gained": late[-1][2] - late[0][2],
            "threads_gained": late[-1][3] - late[0][3],
            "largest_drift": max((line["relative"] for line in self.drift), default=None),
            "drift": self.drift,
            "samples": self.samples,
        }


def double_teacher(folder: Path) -> Any:
    """The teacher in float64, with its body."""
    from dwakd_plugin.models.causal_lm import embedding_table, output_head
    from dwakd_plugin.models.teacher.loaded import Teacher

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return Teacher(
        embeddings=embedding_table(model),
        head=output_head(model).detached(),
        model=model,
        parameters=model.num_parameters(),
        attention="as loaded",
        precision="float64",
        device=torch.device("cpu"),
    )


def least_squares(x: list[int], y: list[int]) -> tuple[float, float]:
    """Slope of y over x, and its standard error where points scatter independently."""
    import numpy as np

    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))


if __name__ == "__main__":
    typer.run(main)
