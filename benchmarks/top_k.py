"""What `mapped` loses with the teacher's k likeliest tokens instead of its states, on a real pair.

    python -m benchmarks.top_k --folder small-pair

The pair is `benchmarks.small_pair`'s (prepared in the folder, unless it is there). The student
learns some rows from a cache of states first, as an untrained one is far from any teacher; then the
same held-out batches go through the loss with the states, and with k tokens as a cache keeps them.
A minute or two on one core, and as much for the preparation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import small_pair
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.models.teacher.cached import open_cache
from dwakd_plugin.models.teacher.top_tokens import (
    BYTES_A_TOKEN,
    RowStates,
    pack,
    top_of_states,
    unpack,
)
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.train.open_run import OpenRun, open_run

KS = (8, 16, 32, 64, 128)
BATCH, TRAINED_ROWS, EPOCHS = 8, 160, 4


def main(
    folder: Annotated[Path, typer.Option(help="Where the pair is.")] = Path("small-pair"),
    batches: Annotated[int, typer.Option(help="Batches of 8 held-out rows.")] = 6,
    threads: int = 1,
) -> None:
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(threads)
    folder = folder.resolve()
    small_pair.prepare(folder)
    os.chdir(folder)
    recipe = small_pair.DWAKD | {
        "base_model": "untrained",
        "dwakd": {"teacher": {"base_model": "teacher", "cache": "few_states"}},
        "datasets": [_some("train", TRAINED_ROWS)],
        "test_datasets": [_some("held_out", BATCH * batches)],
    }
    with open_run(Recipe(recipe)) as run:
        learn(run)
        compare(run)


def _some(name: str, rows: int) -> dict[str, Any]:
    return {"path": f"data/{name}.jsonl", "type": "alpaca", "split": f"train[:{rows}]"}


def learn(run: OpenRun) -> None:
    trainer = run.trainer
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3)
    rows = list(trainer.train_dataset)
    for _ in range(EPOCHS):
        for start in range(0, len(rows), BATCH):
            inputs = trainer.data_collator(rows[start : start + BATCH])
            terms = trainer.loss_terms(inputs)
            (terms.total(run.config.loss) / terms.student_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()


def compare(run: OpenRun) -> None:
    """Prints the table."""
    trainer, teacher = run.trainer, run.distillation.teacher
    # Tokens that the teacher spells with several are the labels' with k tokens, and so here.
    trainer.distillation = replace(run.distillation, teacher=replace(teacher, spellings=None))
    cache = open_cache(run.config.teacher, "cpu", load_teacher_tokenizer(run.config.teacher))

    def likeliest(k: int) -> RowStates:
        def of_row(ids: Tensor, labels: Tensor) -> Any:
            return unpack(pack(top_of_states(cache.read(ids, labels), teacher.head, k)))

        return of_row

    whole, gradient = measured(run, cache.read)
    size = cache.identity["hidden_size"] * teacher.head.weight.itemsize
    print("| | bytes a token | KD, nats | its error | gradient's error | teacher_ce | labels |")
    print("|---|---|---|---|---|---|---|")
    print(f"| states | {size:,} | {whole['kd']:.4f} | | | {whole['teacher_ce']:.3f} | |")
    for k in KS:
        found, own = measured(run, likeliest(k))
        print(
            f"| {k} | {BYTES_A_TOKEN * k:,} | {found['kd']:.4f} "
            f"| {found['kd'] / whole['kd'] - 1:+.2%} "
            f"| {float((own - gradient).norm() / gradient.norm()):.2%} "
            f"| {found['teacher_ce']:.3f} | {found['kept']:.1%} |"
        )


def measured(run: OpenRun, said: Callable[..., Any]) -> tuple[dict[str, float], Tensor]:
    """Of held-out rows: means by token, and the distillation's gradient in the student's head."""
    trainer = run.trainer
    rows = list(trainer.eval_dataset)
    sums = dict.fromkeys(("kd", "ce", "kept", "pairs", "all"), 0.0)
    head, gradient = trainer.model.get_output_embeddings().weight, torch.zeros(())
    for start in range(0, len(rows), BATCH):
        collator = replace(trainer.data_collator, teacher_states=said)
        terms = trainer.loss_terms(collator(rows[start : start + BATCH]))
        gradient = gradient + torch.autograd.grad(terms.student_kd, head)[0]
        for name, value in (
            ("kd", terms.student_kd),
            ("ce", terms.teacher_ce),
            ("kept", terms.top_labels),
            ("pairs", terms.paired_tokens),
            ("all", terms.distilled_tokens),
        ):
            sums[name] += float(value)
    return {
        "kd": sums["kd"] / sums["all"],
        "teacher_ce": sums["ce"] / sums["pairs"],
        "kept": sums["kept"] / sums["pairs"],
    }, gradient


if __name__ == "__main__":
    typer.run(main)
