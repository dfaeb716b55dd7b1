"""Two teachers that know different halves of the data: the student of both beside each alone.

    python -m benchmarks.two_teachers --out benchmarks/results

Made from seeds: two sources of text, which go on from word to word by probabilities of their own
over the same words. A teacher learns from many rows of one source, another from many of the other;
the student, with another tokenizer, has few rows of both. Bits per byte of held-out rows of each
source (`evaluate.held_out`), for the student of the labels alone, of each teacher on all rows, of
both on all rows, and of each teacher's own rows. 8 minutes on one core.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
import yaml

SOURCES = ("north", "south")
WORDS, LENGTH = 40, 20  # in all, and of a row
NEXT = (0.6, 0.3, 0.1)  # how likely a word's followers are: 1.3 bits a word
MANY, FEW, HELD_OUT = 2_000, 24, 100  # rows of each source: a teacher's, the student's, to measure
TEACHER = {"hidden_size": 96, "layers": 3, "heads": 4, "intermediate_size": 256}
STUDENT = {"hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 160}
ALONE = "labels alone"


def rows_of(source: str, count: int, seed: str) -> list[dict[str, str]]:
    """Rows whose answers go on from the first word as their source does."""
    shared, own, rng = random.Random("words"), random.Random(source), random.Random(source + seed)
    words: list[str] = []
    while len(words) < WORDS:
        word = "".join(shared.choice("bdfgklmnprst") + shared.choice("aeiou") for _ in range(2))
        words += [] if word in words else [word]
    followers = {word: own.sample(words, len(NEXT)) for word in words}
    rows = []
    for _ in range(count):
        chain = [rng.choice(words)]
        while len(chain) < LENGTH:
            chain += rng.choices(followers[chain[-1]], NEXT)
        begin, answer = chain[0], " ".join(chain[1:])
        rows.append({"instruction": f"{source}: {begin}", "input": "", "output": answer})
    return rows


def prepare(seeds: int) -> None:
    """Rows, tokenizers and untrained models in the current folder; a student's of each seed."""
    from benchmarks.small_student import create_student
    from dwakd_plugin.tokenizers.training import train_tokenizer

    for name, count in [("many", MANY), *((str(seed), FEW) for seed in range(seeds))]:
        for source in SOURCES:
            lines = map(json.dumps, rows_of(source, count, name))
            Path(f"{source}_{name}.jsonl").write_text("\n".join(lines) + "\n")
    texts = [row["output"] for source in SOURCES for row in rows_of(source, 300, "texts")]
    for number, source in enumerate(SOURCES):
        # Whole words and their halves on the teachers' side, pieces on the student's.
        tokenizer = train_tokenizer(texts[number::2], 380)
        create_student(Path(f"untrained-{source}"), tokenizer, seed=number, **TEACHER)
    tokenizer = train_tokenizer(texts, 300)
    for seed in range(seeds):
        create_student(Path(f"untrained-{seed}"), tokenizer, seed=seed, **STUDENT)


def recipe(model: str, out: str, data: list[str], epochs: int, **keys: Any) -> dict[str, Any]:
    return {
        "base_model": model,
        "datasets": [{"path": f"{name}.jsonl", "type": "alpaca"} for name in data],
        "dataset_prepared_path": f"prepared/{out}",
        "output_dir": out,
        "sequence_len": 256,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_epochs": epochs,
        "learning_rate": 3e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": False,
        "fp16": False,
        "logging_steps": 20,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "pad_to_sequence_len": False,
        **keys,
    }


def train(keys: dict[str, Any]) -> Path:
    """Trains in this process; the output folder."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.integrations.base import PluginManager

    file = Path(f"{keys['output_dir']}.yml")
    file.write_text(yaml.safe_dump(keys))
    PluginManager.get_instance().plugins.clear()
    do_train(load_cfg(str(file)), TrainerCliArgs())
    return Path(keys["output_dir"])


def arms(seed: int) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """What teaches the student, by its name."""
    own = [{"name": source, "base_model": source} for source in SOURCES]
    yield ALONE, None
    for teacher in own:
        yield f"{teacher['name']}, all rows", {"teachers": [teacher]}
    yield "both, all rows", {"teachers": own}
    shared = [one | {"datasets": [f"{one['name']}_{seed}.jsonl"]} for one in own]
    yield "both, each its own rows", {"teachers": shared}


def measured(folder: Path) -> list[float]:
    """Bits per byte of held-out rows of each source."""
    from dwakd_plugin.evaluate.held_out import held_out_bits_per_byte

    return [
        held_out_bits_per_byte(folder, rows_of(source, HELD_OUT, "held_out"), batch_size=50)
        for source in SOURCES
    ]


def main(
    out: Annotated[Path | None, typer.Option(help="Where two_teachers.json goes.")] = None,
    seeds: int = 3,
    epochs: Annotated[int, typer.Option(help="Of the student.")] = 20,
) -> None:
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_TEE_STDOUT": "0"}
    import torch

    torch.set_num_threads(1)
    started, to = time.monotonic(), None if out is None else out.resolve()
    found: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="two-teachers-") as folder:
        os.chdir(folder)
        prepare(seeds)
        for source in SOURCES:
            teacher = train(recipe(f"untrained-{source}", source, [f"{source}_many"], 2))
            found[f"teacher {source}"] = [measured(teacher)]
        for seed in range(seeds):
            few = [f"{source}_{seed}" for source in SOURCES]
            for number, (name, block) in enumerate(arms(seed)):
                keys = recipe(f"untrained-{seed}", f"{number}-{seed}", few, epochs, seed=seed)
                if block is not None:
                    plugin = {"plugins": ["dwakd_plugin.DWAKDPlugin"], "distillation": "dwakd"}
                    keys |= plugin | {"dwakd": {"variant": "mapped", **block}}
                found.setdefault(name, []).append(measured(train(keys)))
        os.chdir("/")
    print(table(found))
    report = {
        "command": f"python -m benchmarks.two_teachers --seeds {seeds} --epochs {epochs}",
        "sources": SOURCES,
        "bits_per_byte": found,
        "seconds": round(time.monotonic() - started),
    }
    if to is not None:
        (to / "two_teachers.json").write_text(json.dumps(report, indent=1) + "\n")


def table(found: dict[str, list[list[float]]]) -> str:
    """Means over seeds, ± their standard deviation, in Markdown."""
    lines = [f"| bits per byte | {' | '.join(SOURCES)} | both |", "|---|---|---|---|"]
    for name, runs in found.items():
        columns = [*zip(*runs, strict=True), [mean(run) for run in runs]]
        cells = [
            f"{mean(column):.3f}" + (f" ± {stdev(column):.3f}" if len(column) > 1 else "")
            for column in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
