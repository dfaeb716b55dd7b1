"""What the projectors' initialisation is worth, on a real pair: at the start and after an epoch.

    python -m benchmarks.projector_init --folder small-pair

The pair is `benchmarks.small_pair`'s (prepared in the folder, unless it is there). Trains one
epoch of `dwakd warmup`; figures are of its held-out rows. Prints a Markdown table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks import small_pair

DWAKD = [sys.executable, "-c", "from dwakd_cli.main import main; main()"]


def main(
    folder: Annotated[Path, typer.Option(help="Where the pair is.")] = Path("small-pair"),
    seeds: Annotated[int, typer.Option(help="Random initialisations to average.")] = 3,
) -> None:
    folder = folder.resolve()
    small_pair.prepare(folder)
    small_pair.pretrain(folder)
    print("| init | seed | t2s CE at the start | accuracy | steps | t2s CE after them | accuracy |")
    print("|---|---|---|---|---|---|---|")
    for init, seed in [("shared_vocab", 7), *(("random", 7 + each) for each in range(seeds))]:
        report = warmed_up(folder, init, seed)
        (after,) = report["history"]
        figures = [
            f"{line['t2s_ce']:.2f} | {line['t2s_accuracy']:.1%}"
            for line in (report["before"], after)
        ]
        steps = -(-report["rows"]["train"] // report["settings"]["batch_size"])
        print(f"| {init} | {seed} | {figures[0]} | {steps} | {figures[1]} |", flush=True)


def warmed_up(folder: Path, init: str, seed: int) -> dict[str, Any]:
    """The report of one epoch of `dwakd warmup` on its recipe."""
    recipe = yaml.safe_load((folder / "dwakd.yml").read_text(encoding="utf-8"))
    recipe["seed"] = seed
    recipe["dwakd"]["projectors"] = {"init": init}
    file = folder / f"init-{init}-{seed}.yml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result = subprocess.run(
        [*DWAKD, "warmup", file.name, "--epochs", "1", "--json", "--output", f"{file.stem}.st"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    report: dict[str, Any] = json.loads(result.stdout)
    return report


if __name__ == "__main__":
    typer.run(main)
