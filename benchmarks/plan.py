"""What `dwakd plan` says a run takes, against what it takes: peak resident memory on a CPU.

python -m benchmarks.plan [--only NAME ...]

Each configuration trains three steps through axolotl in a process of its own, on rows that fill
`sequence_len` on both sides, which is what the plan assumes. Memory counts from where everything is
imported and nothing is loaded; the kernel keeps the highest mark (VmHWM). The table in the docs is
`benchmarks.plan_recorded`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import (
    MIB,
    RESULTS,
    sampled,
    say,
    start,
    status_bytes,
    target,
    write_report,
)

NAME = "plan"
LIMIT = 0.15  # the plan may be off by so much
ROWS = 12
STEPS = 3
RUNTIME = (
    "tiny pair, batch 1"  # what is not tensors: the source of CPU_RUNTIME in dwakd_plugin.plan
)


# Models, rows and recipes -------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """The small pair's models, two random pairs, and rows longer than any run's."""
    from benchmarks import small_pair
    from dwakd_plugin.data.library_docs import documentation_rows

    folder.mkdir(parents=True, exist_ok=True)
    small_pair.prepare(folder / "small-pair")
    texts = documentation_rows(small_pair.HELD_OUT_ROWS).pretraining_texts
    rows = [
        {"instruction": "Read.", "input": "", "output": " ".join(texts[index::ROWS])[:12_000]}
        for index in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, config in random_models().items():
        vocabulary = 3000 if name in ("qwen", "llama") else 2500  # of tokenizers, not of heads
        create_model(folder / name, config, texts, vocabulary)


def random_models() -> dict[str, Any]:
    """Configs of models whose weights are random: only their sizes matter here."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    return {
        "qwen": Qwen2Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=16,
            tie_word_embeddings=True,
        ),
        "gpt2": GPT2Config(n_embd=512, n_layer=8, n_head=8),
        "llama": LlamaConfig(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=16,
            num_attention_heads=16,
        ),
        "tiny": LlamaConfig(
            vocab_size=3000,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        "small-llama": LlamaConfig(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=12,
            num_attention_heads=8,
        ),
    }


def create_model(dest: Path, config: Any, texts: list[str], vocabulary: int) -> None:
    """A model of random weights with a tokenizer of so many tokens, unless it is there."""
    if dest.is_dir():
        return
    import torch
    from transformers import AutoModelForCausalLM

    from dwakd_plugin.tokenizers.training import train_tokenizer

    tokenizer = train_tokenizer(texts, vocabulary)
    torch.manual_seed(0)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    partial = dest.with_name(f"{dest.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(dest)


LORA = {
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """Recipes by name."""
    embedded = str(folder / "small-pair" / "untrained"), str(folder / "small-pair" / "teacher")
    gpt2 = str(folder / "gpt2"), str(folder / "qwen")
    llama = str(folder / "small-llama"), str(folder / "llama")
    tiny = str(folder / "tiny"), str(folder / "tiny")
    checkpointing = {"gradient_checkpointing": True}
    return {
        RUNTIME: short_run(folder, *tiny, 1, 64),
        "embedded, batch 1": short_run(folder, *embedded, 1, 256),
        "embedded, batch 4": short_run(folder, *embedded, 4, 256),
        "embedded, batch 8": short_run(folder, *embedded, 8, 256),
        "embedded, batch 8, checkpointing": short_run(folder, *embedded, 8, 256, **checkpointing),
        "embedded, batch 8, LoRA": short_run(folder, *embedded, 8, 256, **LORA),
        "embedded, batch 8, teacher cached": short_run(
            folder, *embedded, 8, 256, cache=str(folder / "states")
        ),
        "Qwen2 260M → GPT-2 51M, batch 2": short_run(folder, *gpt2, 2, 256),
        "Llama 271M → Llama 72M, batch 4, LoRA, checkpointing": short_run(
            folder, *llama, 4, 512, **LORA, **checkpointing
        ),
        "Llama 271M → Llama 72M, batch 2": short_run(folder, *llama, 2, 512),
    }


def short_run(
    folder: Path,
    student: str,
    teacher: str,
    batch: int,
    length: int,
    *,
    cache: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A recipe of three steps on rows that fill `length` on both sides."""
    return {
        "base_model": student,
        "plugins": ["dwakd_plugin.DWAKDPlugin"],
        "distillation": "dwakd",
        "dwakd": {"variant": "paper", "teacher": {"base_model": teacher, "cache": cache}},
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "excess_length_strategy": "truncate",
        "sequence_len": length,
        "pad_to_sequence_len": False,
        "micro_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "bf16": False,
        "fp16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataset_num_proc": 1,
        "seed": 7,
    } | settings


# One run ------------------------------------------------------------------------------------


def run_one(recipe: Path) -> dict[str, Any]:
    """Trains a recipe in this process; bytes of resident memory above what the imports left.

    `peak` is the kernel's own high-water mark; `anonymous` leaves file pages out (a checkpoint that
    is mapped counts as resident while it is read), sampled; `at_training` is what was resident when
    the first step began.
    """
    import axolotl.cli.train
    import axolotl.train
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from transformers import AutoModelForCausalLM  # noqa: F401

    from dwakd_plugin.train.trainer import DWAKDTrainer

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    baseline, anonymous = status_bytes("VmRSS"), status_bytes("RssAnon")
    marks: dict[str, int] = {}
    seconds: list[float] = []
    train = DWAKDTrainer.train

    def marked(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        marks["at_training"] = status_bytes("VmRSS") - baseline
        marks["peak_before"] = status_bytes("VmHWM") - baseline
        result = train(trainer, *args, **kwargs)
        seconds.append(result.metrics["train_runtime"] / STEPS)
        marks["peak_of_training"] = status_bytes("VmHWM") - baseline
        return result

    DWAKDTrainer.train = marked  # type: ignore[method-assign]
    with sampled("RssAnon") as samples:
        axolotl.cli.train.do_train(load_cfg(str(recipe)), TrainerCliArgs())
    return {
        "baseline": baseline,
        "peak": status_bytes("VmHWM") - baseline,
        "anonymous": max(samples) - anonymous,
        **marks,
        "seconds_per_step": round(seconds[0], 2),
    }


def measure(folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Runs one configuration in a fresh process. Raises where it fails."""
    place = folder / "runs" / "".join(c if c.isalnum() else "-" for c in name)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    file = place / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe | {"output_dir": str(place / "out")}, sort_keys=False))
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    result = place / "result.json"
    command = [sys.executable, "-m", "benchmarks.plan", "--one", str(file), str(result)]
    with (place / "log.txt").open("wb") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


def compare(folder: Path, name: str, recipe: dict[str, Any], lock: Path | None) -> dict[str, Any]:
    """Plans and measures one configuration."""
    from dwakd_plugin.plan import card, plan
    from dwakd_plugin.recipe import Recipe

    with lock.open("a") if lock else contextlib.nullcontext() as held:
        if held is not None:
            fcntl.flock(held, fcntl.LOCK_EX)
        if recipe["dwakd"]["teacher"]["cache"]:
            shutil.rmtree(recipe["dwakd"]["teacher"]["cache"], ignore_errors=True)
        made = plan(Recipe(recipe), card("cpu"))
        measured = measure(folder, name, recipe)
    error = made.total / measured["peak"] - 1
    say(f"{name}: {made.total / MIB:.0f} MiB planned, {measured['peak'] / MIB:.0f} measured")
    return {
        "planned": round(made.total),
        "error": error,
        "peak_is": made.peak,
        "parts": {part: round(size) for part, size in made.parts.items()},
        "planned_seconds_per_step": made.seconds_per_step,
        "measured": measured,
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
        help="models, rows and runs; made where it is not there",
    )
    parser.add_argument("--only", nargs="*", default=[], help="parts of configurations' names")
    parser.add_argument("--lock", type=Path, help="file to hold locked during each configuration")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        recipe_file, result = options.one
        result.write_text(json.dumps(run_one(recipe_file)), encoding="utf-8")
        return
    if options.only and options.results == RESULTS:
        parser.error("--only needs another folder as --results: it would drop the other rows")
    import torch

    started = start(torch.get_num_threads(), False, ["transformers", "axolotl"])
    folder = options.folder.resolve()
    prepare(folder)
    results = {
        name: compare(folder, name, recipe, options.lock)
        for name, recipe in configurations(folder).items()
        if not options.only or any(part in name for part in options.only)
    }
    targets = [
        target(f"plan off by, {name}", abs(one["error"]), LIMIT) for name, one in results.items()
    ]
    write_report(NAME, started, results, targets, options.results)


if __name__ == "__main__":
    main()
