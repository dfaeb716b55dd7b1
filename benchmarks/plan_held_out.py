"""What `dwakd plan` predicts for runs that no constant of it was chosen on, and what they take.

    python -m benchmarks.plan_held_out --predict    # plans and writes it down
    python -m benchmarks.plan_held_out              # measures what was predicted

A prediction that is written down stays as it is; `benchmarks.plan_recorded` sets beside it what the
plan says today.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import MIB, RESULTS, say, start, target, write_report
from benchmarks.plan import (
    LIMIT,
    LORA,
    create_model,
    measure,
    prepare,
    short_run,
)

NAME = "plan_held_out"


@dataclass(frozen=True)
class HeldOut:
    """A run, and whether its teacher cache is full before it begins."""

    recipe: dict[str, Any]
    cache_is_full: bool = False


def random_models() -> dict[str, Any]:
    """Configs of a pair with tied heads and other vocabularies than any that was fitted on."""
    from transformers import LlamaConfig, Qwen2Config

    return {
        "qwen-tied": Qwen2Config(
            vocab_size=64_000,
            hidden_size=1152,
            intermediate_size=3072,
            num_hidden_layers=18,
            num_attention_heads=18,
            num_key_value_heads=6,
            tie_word_embeddings=True,
        ),
        "llama-tied": LlamaConfig(
            vocab_size=49_152,
            hidden_size=640,
            intermediate_size=1728,
            num_hidden_layers=14,
            num_attention_heads=10,
            num_key_value_heads=5,
            tie_word_embeddings=True,
        ),
    }


def configurations(folder: Path) -> dict[str, HeldOut]:
    """By name, in the order in which they were thought of."""
    embedded = str(folder / "small-pair" / "untrained"), str(folder / "small-pair" / "teacher")
    tied = str(folder / "llama-tied"), str(folder / "qwen-tied")
    gpt2 = str(folder / "gpt2"), str(folder / "qwen")
    checkpointing = {"gradient_checkpointing": True}
    return {
        "embedded, 384 tokens, batch 3, accumulation 4": HeldOut(
            short_run(folder, *embedded, 3, 384, gradient_accumulation_steps=4)
        ),
        "embedded, 512 tokens, batch 4, LoRA, checkpointing": HeldOut(
            short_run(folder, *embedded, 4, 512, **LORA, **checkpointing)
        ),
        "Qwen2 329M → Llama 101M, tied heads, 384 tokens, batch 2": HeldOut(
            short_run(folder, *tied, 2, 384)
        ),
        "Qwen2 260M → GPT-2 51M, 192 tokens, batch 3, cache full": HeldOut(
            short_run(folder, *gpt2, 3, 192, cache=str(folder / "full-states")), True
        ),
    }


def prepare_all(folder: Path) -> None:
    """The models and rows of `benchmarks.plan`, and the pair above."""
    prepare(folder)
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["output"] for line in lines]
    for name, config in random_models().items():
        create_model(folder / name, config, texts, 3000 if name.startswith("qwen") else 2500)


def predict(folder: Path, name: str, run: HeldOut) -> dict[str, Any]:
    """What the plan says now; a cache that is full is filled for it."""
    from dwakd_plugin.models.teacher.cache import INDEX
    from dwakd_plugin.plan import card, plan
    from dwakd_plugin.recipe import Recipe

    cache = run.recipe["dwakd"]["teacher"]["cache"]
    if run.cache_is_full and not (Path(cache) / INDEX).is_file():
        measure(folder, f"{name} (filling)", run.recipe)
    elif cache and not run.cache_is_full:
        shutil.rmtree(cache, ignore_errors=True)
    made = plan(Recipe(run.recipe), card("cpu"))
    return {
        "predicted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "predicted": {
            "bytes": round(made.total),
            "peak_is": made.peak,
            "parts": {part: round(size) for part, size in made.parts.items()},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("plan-benchmark"),
        help="models, rows and runs, as of benchmarks.plan",
    )
    parser.add_argument("--lock", type=Path, help="file to hold locked during each configuration")
    parser.add_argument(
        "--predict", action="store_true", help="write predictions down, measure not"
    )
    parser.add_argument("--again", action="store_true", help="measure also what was measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    import torch

    started = start(torch.get_num_threads(), False, ["transformers", "axolotl"])
    folder = options.folder.resolve()
    prepare_all(folder)
    file = options.results / f"{NAME}.json"
    before = json.loads(file.read_text(encoding="utf-8"))["results"] if file.is_file() else {}
    results: dict[str, Any] = {}
    for name, run in configurations(folder).items():
        with options.lock.open("a") if options.lock else contextlib.nullcontext() as held:
            if held is not None:
                fcntl.flock(held, fcntl.LOCK_EX)
            one = before.get(name) or predict(folder, name, run)
            if not options.predict:
                if name not in before:
                    raise SystemExit(f"{name} has no prediction: --predict first")
                if options.again or "measured" not in one:
                    one["measured"] = measure(folder, name, run.recipe)
        results[name] = one
        say(f"{name}: {one['predicted']['bytes'] / MIB:.0f} MiB predicted")
    targets = [
        target(f"prediction off by, {name}", abs(one["predicted"]["bytes"] / peak - 1), LIMIT)
        for name, one in results.items()
        if (peak := one.get("measured", {}).get("peak"))
    ]
    write_report(NAME, started, results, targets, options.results)


if __name__ == "__main__":
    main()
