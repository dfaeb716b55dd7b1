"""One training: a recipe, axolotl in a process of its own, the student and its log in a folder."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import say
from benchmarks.quality.materials import FORMAT, NO_INPUT_FORMAT, Materials, rendered
from dwakd_plugin.io.files import replace_file

Settings = dict[str, Any]

DONE = "run.json"  # written last: its folder holds a whole run


@dataclass(frozen=True)
class Run:
    """What one training has of its own; everything else is the same for all."""

    name: str  # its folder
    dwakd: Settings  # the recipe's block, without the teacher
    learning_rate: float
    seed: int = 1
    recipe: Settings = field(default_factory=dict)  # other keys of it
    gold: Settings | None = None  # GOLDConfig's, where TRL's loss takes the place of ours
    gold_trainer: Settings | None = None  # the same, where its whole trainer does


def recipe(materials: Materials, run: Run) -> Settings:
    """The axolotl recipe of a run, with absolute paths."""
    cache = {"cache": str(materials.folder / f"states-{materials.teacher.name}")}
    return {
        "base_model": str(materials.student),
        **_padding(materials.student),
        "plugins": ["dwakd_plugin.DWAKDPlugin"],
        "distillation": "dwakd",
        "dwakd": {
            "teacher": {
                "base_model": str(materials.teacher),
                # New answers are read by the teacher itself.
                **({} if "own_answers" in run.dwakd else cache),
            },
            **run.dwakd,
        },
        "datasets": [dataset(materials.first_rows(materials.train_rows))],
        "dataset_prepared_path": str(materials.folder / "prepared"),
        "output_dir": str(materials.runs / run.name),
        "sequence_len": 512,
        "pad_to_sequence_len": False,
        "gradient_accumulation_steps": 1,
        "micro_batch_size": materials.batch,
        "num_epochs": materials.epochs,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "learning_rate": run.learning_rate,
        "warmup_ratio": 0.05,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "group_by_length": True,
        "logging_steps": 10,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "seed": run.seed,
        **run.recipe,
    }


@cache
def _padding(student: Path) -> Settings:
    """What to pad with, where the tokenizer does not say."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    if tokenizer.pad_token is not None:
        return {}
    return {"special_tokens": {"pad_token": tokenizer.unk_token or tokenizer.eos_token}}


def dataset(file: Path) -> Settings:
    """A data set of the recipe: rows in the benchmark's prompt."""
    form = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
    form |= {"format": FORMAT, "no_input_format": NO_INPUT_FORMAT}
    return {"path": str(file), "ds_type": "json", "type": form}


def train_all(materials: Materials, runs: Sequence[Run], processes: int, threads: int) -> None:
    """Trains what has not been trained yet, several at a time. Raises RuntimeError if one fails."""
    missing = [run for run in runs if result_of(materials, run) is None]
    context = get_context("forkserver")
    # Imports are half of a short run; they happen once, in the server that all are forked from.
    context.set_forkserver_preload(["benchmarks.quality.preloaded"])
    # What the server's libraries read as they load; a forked process cannot change it for all.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    os.environ |= {"OMP_WAIT_POLICY": "passive", "AXOLOTL_DO_NOT_TRACK": "1"}
    os.environ["HF_HUB_OFFLINE"] = "1"
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(_train, materials, run): run for run in missing}
        for count, done in enumerate(as_completed(waiting), start=1):
            run = waiting[done]
            result = done.result()
            say(
                f"[{count}/{len(missing)}] {run.name}: {result['dev_bits_per_byte']:.4f} bits a "
                f"byte on dev, {result['seconds']:.0f} s"
            )


def _train(materials: Materials, run: Run) -> Settings:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from transformers import AutoTokenizer

    from dwakd_plugin.evaluate.held_out import held_out_bits_per_byte

    begun = time.monotonic()
    folder = materials.runs / run.name
    shutil.rmtree(folder, ignore_errors=True)  # a run cut short begins anew: it takes minutes
    folder.mkdir(parents=True)
    file, log = folder.parent / f"{run.name}.yml", folder.parent / f"{run.name}.log"
    replace_file(file, yaml.safe_dump(recipe(materials, run), sort_keys=False))
    sys.stdout.flush()
    with log.open("wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    if run.gold is not None:
        from benchmarks.quality.gold import use_gold

        use_gold(
            run.gold, *map(AutoTokenizer.from_pretrained, (materials.student, materials.teacher))
        )
    own: Settings = {}
    if run.gold_trainer is not None:
        from benchmarks.quality.gold_trainer import train_with_gold

        lines = materials.first_rows(materials.train_rows).read_text(encoding="utf-8").splitlines()
        rows = [rendered(json.loads(line)) for line in lines]
        own = train_with_gold(recipe(materials, run), run.gold_trainer, rows)
    else:
        try:
            do_train(load_cfg(str(file)), TrainerCliArgs())
        except SystemExit as ended:
            raise RuntimeError(f"{run.name} ended with {ended.code}: see {log}") from ended
    sys.stdout.flush()
    trained = time.monotonic() - begun
    bits = held_out_bits_per_byte(folder, read_rows(materials, "dev"), lambda row: rendered(row)[0])
    result = {
        **asdict(run),
        "dev_bits_per_byte": bits,
        "seconds": trained,
        "curves": _curves(log),
        "loop_seconds": _loop_seconds(log),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **own,
    }
    replace_file(folder / DONE, json.dumps(result, indent=1))
    return result


def _curves(log: Path) -> dict[str, list[float]]:
    """The logged figures by name, from the dicts that the trainer prints."""
    curves: dict[str, list[float]] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("{'loss'"):
            for name, value in ast.literal_eval(line).items():
                curves.setdefault(name, []).append(float(value))
    return curves


def _loop_seconds(log: Path) -> float | None:
    """What the trainer says that its steps took together."""
    found = re.search(r"'train_runtime': '?([0-9.]+)", log.read_text(errors="replace"))
    return float(found[1]) if found else None


def read_rows(materials: Materials, name: str) -> list[Settings]:
    """Rows to measure on, with one reference each."""
    rows, seen = [], 0
    with materials.rows(name).open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            rows.append({**row, "output": rendered(row)[1]})
            seen += len(rows[-1]["output"].encode())
            if seen >= materials.held_out_bytes:
                break
    return rows


def result_of(materials: Materials, run: Run) -> Settings | None:
    """What a finished run left behind; None where it has not run, or ran with other settings."""
    file = materials.runs / run.name / DONE
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    return result if {key: result.get(key) for key in asdict(run)} == asdict(run) else None
