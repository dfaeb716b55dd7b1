"""What a cached and a quantised teacher save, and what they cost in the loss, on a real pair.

    python -m benchmarks.teacher --folder small-pair

The pair is `benchmarks.small_pair`'s (prepared in the folder, unless it is there). A step is what
training does with a batch: collating, forward, loss, backward, optimizer.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from benchmarks import measure, small_pair
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.models.batches import teacher_batch
from dwakd_plugin.models.causal_lm import gather_positions
from dwakd_plugin.models.teacher.cache import TeacherCache
from dwakd_plugin.models.teacher.cached import fill, missing_rows, open_cache, teacher_rows
from dwakd_plugin.models.teacher.kept_states import row_key
from dwakd_plugin.models.teacher.loaded import Teacher, load_teacher
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.schema import TeacherConfig
from dwakd_plugin.train.open_run import OpenRun, open_run

DTYPES = ("auto", "float16", "bfloat16", "float8_e4m3")
BATCH = 8
States = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # see DualCollator.teacher_states
TERMS = ("ce", "t2s_ce", "student_kd", "teacher_kd", "hidden_dtw", "embed_dtw")


def main(
    folder: Annotated[Path, typer.Option(help="Where the pair is.")] = Path("small-pair"),
    rounds: Annotated[int, typer.Option(help="Timings of each step.")] = 7,
    batches: Annotated[int, typer.Option(help="Batches of 8 held-out rows for the losses.")] = 6,
    threads: int = 2,
    results: Path = measure.RESULTS,
    memory_only: Annotated[
        bool, typer.Option("--memory-only", help="Measure peaks anew, keep the other results.")
    ] = False,
    peak: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(threads)
    results, folder = results.resolve(), folder.resolve()
    if peak is None:
        small_pair.prepare(folder)
        small_pair.pretrain(folder)
    os.chdir(folder)
    recipe = yaml.safe_load(Path("dwakd.yml").read_text(encoding="utf-8"))
    if peak is not None:
        print(json.dumps(memory_of_two_steps(with_cache(recipe, peak or None))))
        return
    started = measure.start(threads, False, ["transformers", "bitsandbytes", "safetensors"])
    with (
        tempfile.TemporaryDirectory(dir=".") as work,
        open_run(Recipe(with_cache(recipe, None))) as run,
    ):
        caches, filling = fill_caches(run, Path(work), DTYPES[:1] if memory_only else DTYPES)
        if memory_only:
            before = json.loads((results / "teacher.json").read_text(encoding="utf-8"))
            report = before["results"]
            started = {key: before[key] for key in started} | {
                "memory_measured": started["date"],
                "memory_command": started["command"],
            }
        else:
            report = {
                "filling": filling,
                "step_seconds": timings(run, caches, rounds),
                "losses": loss_errors(run, caches, batches),
            }
        report["memory"] = memory(folder, caches["auto"].folder.resolve(), threads)
        teacher = run.distillation.teacher
        report["body_bytes"] = 4 * (teacher.parameters - teacher.embeddings.weight.numel())
    saved, steps = peak_saved(report), report["step_seconds"]
    targets = [
        measure.target("cached step / live step", steps["cached_to_live"]["median"], 0.6),
        measure.target(
            "cached step / step without the teacher's forward",
            steps["cached_to_subtracted"]["median"],
            1.15,
        ),
        measure.target(
            "peak memory saved / the teacher's body",
            saved / report["body_bytes"],
            1.0,
            at_least=True,
        ),
    ]
    measure.write_report("teacher", started, report, targets, results)


def with_cache(recipe: dict[str, Any], cache: str | None) -> dict[str, Any]:
    block = recipe["dwakd"]
    return recipe | {"dwakd": block | {"teacher": {"base_model": "teacher", "cache": cache}}}


def fill_caches(
    run: OpenRun, work: Path, dtypes: tuple[str, ...]
) -> tuple[dict[str, TeacherCache], dict[str, Any]]:
    """A cache of all rows per dtype; the teacher runs for the first, the others hold the same."""
    config = run.config.teacher
    tokenizer = load_teacher_tokenizer(config)
    rows = teacher_rows(run.trainer.train_dataset, run.trainer.eval_dataset)
    caches: dict[str, TeacherCache] = {}
    filling: dict[str, Any] = {}
    tokens = sum(int(labels[1:].ne(-100).sum()) for _, labels in rows)
    for dtype in dtypes:
        own = config.model_copy(update={"cache": str(work / dtype), "cache_dtype": dtype})
        cache = open_cache(own, "cpu", tokenizer)
        begun = time.perf_counter()
        if dtype == "auto":
            fill(own, "cpu", cache, missing_rows(cache, rows))
        else:
            weights = caches["auto"].load_weights("cpu")
            assert weights is not None
            cache.save_weights(weights)
            cache.append({row_key(*row): caches["auto"].read(*row) for row in rows})
        caches[dtype] = cache
        states = sum(file.stat().st_size for file in cache.folder.glob("states-*"))
        filling[dtype] = {"bytes_per_token": round(states / tokens, 1)}
        if dtype == "auto":
            filling[dtype]["seconds"] = round(time.perf_counter() - begun, 1)
    begun = time.perf_counter()
    caches["auto"].verify()
    filling["auto"]["verify_seconds"] = round(time.perf_counter() - begun, 2)
    return caches, filling | {"rows": len(rows), "response_tokens": tokens}


def timings(run: OpenRun, caches: dict[str, TeacherCache], rounds: int) -> dict[str, Any]:
    """Seconds of one step: live, from each cache, and with the teacher's states in memory."""
    trainer = run.trainer
    rows = [trainer.train_dataset[index] for index in range(BATCH)]
    given = run.distillation.teacher.hidden(trainer.data_collator(rows))
    step = stepper(run)
    calls: dict[str, Callable[[], Any]] = {
        "live": lambda: step(rows, None),
        "subtracted": lambda: step(rows, None, given),
    }
    for dtype, cache in caches.items():
        calls["cached" if dtype == "auto" else dtype] = lambda cache=cache: step(rows, cache.read)

    calls["collating_live"] = lambda: collated(run, rows, None)
    calls["collating_cached"] = lambda: collated(run, rows, caches["auto"].read)
    seconds, disturbance = measure.alternate(calls, rounds)
    return {
        **{name: measure.spread(values) for name, values in seconds.items()},
        "cached_to_live": measure.ratio(seconds["cached"], seconds["live"]),
        "cached_to_subtracted": measure.ratio(seconds["cached"], seconds["subtracted"]),
        "disturbance": round(disturbance, 3),
    }


def collated(run: OpenRun, rows: list[Any], states: States | None) -> dict[str, Any]:
    """A batch, with the teacher's states where they are known."""
    batch: dict[str, Any] = replace(run.trainer.data_collator, teacher_states=states)(rows)
    return batch


def stepper(run: OpenRun) -> Callable[..., float]:
    """One training step on rows; the learning rate is 0, so that every step is the same."""
    trainer, model = run.trainer, run.trainer.model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)

    def step(rows: list[Any], states: States | None, hidden: torch.Tensor | None = None) -> float:
        model.train()
        inputs = collated(run, rows, states)
        if hidden is not None:
            inputs["teacher_hidden"] = hidden
        count = (inputs["labels"][:, 1:] != -100).sum()
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=count)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def loss_errors(run: OpenRun, caches: dict[str, TeacherCache], batches: int) -> dict[str, Any]:
    """The loss on held-out rows with each kind of teacher, and how far it is from the live one.

    Per batch, the whole objective per label token; beside it, the teacher's own cross-entropy.
    """
    rows = list(run.trainer.eval_dataset)[: BATCH * batches]
    groups = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    live = run.distillation.teacher
    figures = {"live float32": objective(run, live, groups, None)}
    for dtype, cache in caches.items():
        figures[f"cached {dtype}"] = objective(run, live, groups, cache.read)
    for key in ("load_in_8bit", "load_in_4bit"):
        config = TeacherConfig.model_validate({"base_model": "teacher", key: True})
        figures[key] = objective(run, load_teacher(config, "cpu"), groups, None)
    exact = figures["live float32"]
    return {
        name: {
            "teacher_ce": round(statistics.mean(each["teacher_ce"] for each in given), 5),
            "loss": round(statistics.mean(each["loss"] for each in given), 6),
            **{
                f"{kind}_error": {
                    "mean": statistics.mean(errors := relative(given, exact, kind)),
                    "max": max(errors),
                }
                for kind in ("loss", "teacher_kd", "student_kd")
            },
        }
        for name, given in figures.items()
    }


def relative(
    given: list[dict[str, float]], exact: list[dict[str, float]], kind: str
) -> list[float]:
    return [
        abs(one[kind] - other[kind]) / abs(other[kind])
        for one, other in zip(given, exact, strict=True)
    ]


@torch.no_grad()
def objective(
    run: OpenRun, teacher: Teacher, groups: list[list[Any]], states_of_row: States | None
) -> list[dict[str, float]]:
    """Per batch: the objective and two of its terms per token, and the teacher's cross-entropy."""
    trainer = run.trainer
    trainer.model.train()  # the training objective; there is no dropout in it
    trainer.distillation = replace(run.distillation, teacher=teacher)
    result = []
    for rows in groups:
        inputs = collated(run, rows, states_of_row)
        terms = trainer.loss_terms(inputs)
        total = terms.total(run.config.loss, trainer.distillation.kd_ramp(0))
        batch = teacher_batch(
            *(
                [torch.tensor(row[f"teacher_{key}"]) for row in rows]
                for key in ("input_ids", "labels")
            )
        )
        hidden = inputs.get("teacher_hidden")
        if hidden is not None:
            batch["teacher_hidden"] = hidden
        states = replace(teacher, model=teacher.model).states(batch)
        flat = batch["teacher_index"]
        targets = gather_positions(batch["teacher_input_ids"], batch["teacher_positions"] + 1)
        ce = torch.nn.functional.cross_entropy(
            states.head.logits(states.hidden.flatten(0, 1)[flat]), targets.flatten()[flat]
        )
        result.append(
            {
                "loss": float(total / (inputs["labels"][:, 1:] != -100).sum()),
                "teacher_ce": float(ce),
                "teacher_kd": float(terms.teacher_kd / terms.teacher_tokens),
                "student_kd": float(terms.student_kd / terms.distilled_tokens),
            }
        )
    return result


def memory(folder: Path, cache: Path, threads: int) -> dict[str, list[dict[str, int]]]:
    """What processes of their own take for two steps, with the live teacher and with the cache."""
    command = [sys.executable, "-m", "benchmarks.teacher", "--threads", str(threads)]
    found: dict[str, list[dict[str, int]]] = {"live": [], "cached": []}
    for _ in range(3):
        for name, states in (("live", ""), ("cached", str(cache))):
            result = subprocess.run(
                [*command, "--folder", str(folder), "--peak", states],
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            found[name].append(json.loads(result.stdout.splitlines()[-1]))
    return found


def peak_saved(report: dict[str, Any]) -> float:
    """By how much the cache lowers the peak of resident memory: bytes, between medians."""
    live, cached = (
        statistics.median(one["peak"] for one in report["memory"][name])
        for name in ("live", "cached")
    )
    return live - cached


def memory_of_two_steps(recipe: dict[str, Any]) -> dict[str, int]:
    """Bytes of this process: the peak of what is resident over two training steps.

    Beside it, after the steps: what isn't a file's (`anonymous`), what is mapped from files, and
    what no other process shares (`own`, USS); `files_after_all_rows`: when every row was collated.
    """
    with open_run(Recipe(recipe)) as run:
        collator, rows = run.trainer.data_collator, run.trainer.train_dataset
        step = stepper(run)
        for start in (0, BATCH):
            step([rows[index] for index in range(start, start + BATCH)], collator.teacher_states)
        found = {
            "peak": measure.status_bytes("VmHWM"),
            "anonymous": measure.status_bytes("RssAnon"),
            "files": measure.status_bytes("RssFile"),
            "own": own_bytes(),
        }
        for start in range(0, len(rows), BATCH):
            collator([rows[index] for index in range(start, min(start + BATCH, len(rows)))])
        return found | {"files_after_all_rows": measure.status_bytes("RssFile")}


def own_bytes() -> int:
    """Resident and shared with no other process (USS)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    typer.run(main)
