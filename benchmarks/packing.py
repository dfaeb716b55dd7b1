"""Tokens per second with sample packing and without, on a real pair, and the difference in loss.

    python -m benchmarks.packing --folder small-pair

The pair and its rows are `benchmarks.small_pair`'s (prepared in the folder, unless they are there),
long and short rows mixed as shuffling mixes them. Each way trains on the same rows: collating, both
models' forward, loss, backward, optimizer. Tokens are those of both sides that are not padding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from benchmarks import measure, small_pair
from benchmarks.teacher import stepper, with_cache
from dwakd_plugin.data.packing import LENGTH_COLUMN
from dwakd_plugin.models.batches import pack
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.train.open_run import OpenRun, open_run

UNPACKED = "unpacked, 8 rows"
WAYS = {UNPACKED: 0, "packed, 1 sequence": 1, "packed, 4 sequences": 4}  # of a micro-batch


def main(
    folder: Annotated[Path, typer.Option(help="Where the pair is.")] = Path("small-pair"),
    rows: Annotated[int, typer.Option(help="Rows that each way trains on.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timings of each way.")] = 3,
    threads: int = 2,
    results: Path = measure.RESULTS,
) -> None:
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(threads)
    results, folder = results.resolve(), folder.resolve()
    small_pair.prepare(folder)
    small_pair.pretrain(folder)
    os.chdir(folder)
    recipe = yaml.safe_load(Path("dwakd.yml").read_text(encoding="utf-8"))
    started = measure.start(threads, False, ["transformers"])
    packed = {"sample_packing": True, "attn_implementation": "sdpa", "val_set_size": 0}
    with open_run(Recipe(with_cache(recipe, None) | packed)) as run:
        train = run.trainer.train_dataset
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        chosen = [train[index] for index in order[:rows].tolist()]
        tokens = sum(len(row["input_ids"]) + len(row["teacher_input_ids"]) for row in chosen)
        batches = {name: batches_of(chosen, size, run) for name, size in WAYS.items()}
        step = stepper(run)
        runs: dict[str, Callable[[], Any]] = {
            name: partial(epoch, step, batches[name]) for name in batches
        }
        seconds, disturbance = measure.alternate(runs, rounds)
        losses = {name: loss_per_token(run, batches[name]) for name in batches}
    exact = losses[UNPACKED]
    report = {
        "tokens": tokens,
        "micro_batches": {name: len(each) for name, each in batches.items()},
        "tokens_per_second": {
            name: measure.spread([tokens / value for value in values])
            for name, values in seconds.items()
        },
        "speed_up": {
            name: measure.ratio(seconds[UNPACKED], seconds[name]) for name in list(WAYS)[1:]
        },
        "loss": losses,
        "disturbance": round(disturbance, 3),
    }
    error = max(abs(loss - exact) / exact for loss in losses.values())
    targets = [measure.target("largest relative difference of the loss", error, 1e-5)]
    measure.write_report("packing", started, report, targets, results)


def batches_of(rows: list[Any], sequences: int, run: OpenRun) -> list[list[Any]]:
    """What the collator gets: 8 rows, or so many packed sequences, at a time."""
    if sequences == 0:
        return [rows[start : start + 8] for start in range(0, len(rows), 8)]
    places = pack([row[LENGTH_COLUMN] for row in rows], run.cfg.sequence_len)
    packed = [[rows[place] for place in sequence] for sequence in places]
    return [packed[start : start + sequences] for start in range(0, len(packed), sequences)]


def epoch(step: Callable[..., float], batches: list[list[Any]]) -> None:
    for batch in batches:
        step(batch, None)


@torch.no_grad()
def loss_per_token(run: OpenRun, batches: list[list[Any]]) -> float:
    """The training objective of all batches, per label token."""
    model = run.trainer.model.train()  # there is no dropout in it
    total = tokens = 0.0
    for batch in batches:
        inputs = run.trainer.data_collator(batch)
        total += float(model(**inputs, num_items_in_batch=1)["loss"])
        tokens += int((inputs["labels"][:, 1:] != -100).sum())
    return total / tokens


if __name__ == "__main__":
    typer.run(main)
