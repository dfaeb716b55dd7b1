"""What surrounds the loss, beside the bare work that it can't do without.

    python -m benchmarks.around ROWS.jsonl STUDENT_TOKENIZER TEACHER_TOKENIZER

ROWS have `instruction`, `input` and `output`. Three things are timed in turn with their floor, in
one process: rows prepared for both models, beside both tokenizers' `encode_batch` and axolotl's own
preparation for one; a teacher's cache filled, beside the forward passes of its body; and bits per
byte of given answers, beside one forward pass over the same tokens. Teacher and evaluated model are
SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from benchmarks import measure
from benchmarks.measure import Report

NAME = "around"
PROMPT = "{instruction}\n{input}\n"
BATCH_TOKENS = 2048
Tokens = tuple[list[int], int]  # ids, and how many of them are the prompt


def main(
    rows: Annotated[Path, typer.Argument(help="JSONL: instruction, input, output.")],
    student: Annotated[Path, typer.Argument(help="Folder of a tokenizer.")],
    teacher: Annotated[Path, typer.Argument(help="Folder of another.")],
    prepared: Annotated[int, typer.Option(help="Rows that are prepared.")] = 15_000,
    read: Annotated[int, typer.Option(help="Rows that are read, and that are cached.")] = 500,
    rounds: int = 5,
    threads: int = 2,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = measure.RESULTS,
) -> None:
    # Before the libraries are loaded, which read it then.
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    measure.set_up(threads, 16.0)
    out = out.resolve()
    logging.disable(logging.WARNING)  # axolotl's, which says the whole recipe each time
    begun = measure.start(threads, False, ["axolotl", "transformers", "tokenizers", "datasets"])
    given = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    folders = student.resolve(), teacher.resolve()
    with tempfile.TemporaryDirectory() as work:
        os.environ["HF_DATASETS_CACHE"] = f"{work}/datasets"
        os.chdir(work)
        results = {
            "rows": {"prepared": min(prepared, len(given)), "read": min(read, len(given))},
            "tokenising": timed(tokenising(given[:prepared], folders), rounds),
            "caching": timed(caching(given[:read]), rounds),
            "evaluating": timed(evaluating(given[:read]), rounds),
        }
    targets = [
        measure.target(f"{work}: time / {floor}", ratio(results, work, floor), limit)
        for work, floor, limit in (
            ("tokenising", "encode_batch", 3),
            ("caching", "the body's forward passes", 1.11),
            ("evaluating", "one forward pass", 1.15),
        )
    ]
    measure.write_report(NAME, begun, results, targets, out)
    print(tables(results))


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> Report:
    seconds, disturbance = measure.alternate(runs, rounds)
    return {"seconds": seconds, "disturbance": disturbance}


def ratio(results: Report, work: str, floor: str) -> float:
    """How many times longer ours took, round by round."""
    seconds = results[work]["seconds"]
    return float(measure.ratio(seconds["dwakd"], seconds[floor])["median"])


def tables(results: Report) -> str:
    lines = ["| | seconds | dwakd / it |", "|---|---|---|"]
    for work in ("tokenising", "caching", "evaluating"):
        for name, seconds in results[work]["seconds"].items():
            times = "" if name == "dwakd" else f"{ratio(results, work, name):.2f}"
            lines.append(f"| {work}: {name} | {measure.spread(seconds)['median']:.1f} | {times} |")
    return "\n".join(lines)


def tokenising(
    rows: Sequence[dict[str, Any]], folders: tuple[Path, Path]
) -> dict[str, Callable[[], Any]]:
    """Rows into token ids and labels: for both models, for the student by axolotl alone, or texts
    alone. What is prepared is prepared anew each time."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager
    from transformers import LlamaConfig

    from dwakd_plugin.data.dual_tokenization import dual_tokenization
    from dwakd_plugin.recipe.schema import parse_recipe
    from dwakd_plugin.tokenizers.loading import load_tokenizer

    tokenizers = [load_tokenizer(str(folder), str(folder)) for folder in folders]
    for name, tokenizer in zip(("student", "teacher"), tokenizers, strict=True):
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.save_pretrained(name)
        LlamaConfig().save_pretrained(name)
    texts = [text for row in rows for text in (PROMPT.format_map(row), row["output"])]
    form = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
    plain: dict[str, Any] = {
        "base_model": "student",
        "special_tokens": {"pad_token": tokenizers[0].pad_token},
        "datasets": [{"path": "", "ds_type": "json", "type": form | {"format": PROMPT}}],
        "dataset_prepared_path": "",
        **{"output_dir": "run", "sequence_len": 4096, "learning_rate": 1e-4, "num_epochs": 1},
        **{"micro_batch_size": 1, "gradient_accumulation_steps": 1, "optimizer": "adamw_torch"},
        **{"bf16": False, "fp16": False},
    }
    taught = plain | {
        "plugins": ["dwakd_plugin.DWAKDPlugin"],
        "distillation": "dwakd",
        "dwakd": {"teacher": {"base_model": "teacher"}},
    }
    numbers = itertools.count()

    def prepare(recipe: dict[str, Any]) -> None:
        number = next(numbers)
        file = Path(f"{number}.jsonl")  # a name that nothing was kept under
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = [recipe["datasets"][0] | {"path": str(file)}]
        own = recipe | {"datasets": data, "dataset_prepared_path": f"prepared-{number}"}
        Path("recipe.yml").write_text(yaml.safe_dump(own), encoding="utf-8")
        PluginManager.get_instance().plugins.clear()
        cfg, config = load_cfg("recipe.yml"), parse_recipe(own)
        if config is None:
            load_datasets(cfg=cfg)
            return
        with dual_tokenization(cfg, config):
            load_datasets(cfg=cfg)

    return {
        "dwakd": lambda: prepare(taught),
        "axolotl, student alone": lambda: prepare(plain),
        "encode_batch": lambda: [each.backend_tokenizer.encode_batch(texts) for each in tokenizers],
    }


def caching(rows: Sequence[dict[str, Any]]) -> dict[str, Callable[[], Any]]:
    """The teacher's states of the answers on disk, or its forward passes alone; both load it."""
    from transformers import AutoModel

    from dwakd_plugin.models.smollm2 import prepare_teacher
    from dwakd_plugin.models.teacher.cached import fill, missing_rows, open_cache
    from dwakd_plugin.recipe.schema import TeacherConfig
    from dwakd_plugin.tokenizers.loading import load_tokenizer

    prepare_teacher(Path("smollm2"))
    tokenizer = load_tokenizer("smollm2", "The teacher's tokenizer")
    encoded = tokens(rows, tokenizer)
    sides = [
        (torch.tensor(ids), torch.tensor([-100] * prompt + ids[prompt:])) for ids, prompt in encoded
    ]
    numbers = itertools.count()

    def filled() -> None:
        config = TeacherConfig(base_model="smollm2", cache=f"states-{next(numbers)}")
        cache = open_cache(config, "cpu", tokenizer)
        fill(config, "cpu", cache, missing_rows(cache, sides))

    def bare() -> None:
        forward(AutoModel.from_pretrained("smollm2", dtype=torch.float32), encoded)

    return {"dwakd": filled, "the body's forward passes": bare}


def evaluating(rows: Sequence[dict[str, Any]]) -> dict[str, Callable[[], Any]]:
    """Bits of the answers' tokens, or the logits of all tokens, by a model that is loaded."""
    from transformers import AutoModelForCausalLM

    from dwakd_plugin.evaluate.figures import read
    from dwakd_plugin.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2", "The model's tokenizer")
    model = AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.float32).eval()
    encoded = tokens(rows, tokenizer)
    pairs = [(ids[:prompt], ids[prompt:]) for ids, prompt in encoded]
    return {
        "dwakd": lambda: read(model, pairs, batch_tokens=BATCH_TOKENS),
        "one forward pass": lambda: forward(model, encoded),
    }


def tokens(rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[Tokens]:
    encoded = []
    for row in rows:
        prompt, answer = (
            tokenizer(text)["input_ids"][:512] for text in (PROMPT.format_map(row), row["output"])
        )
        encoded.append(([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    return encoded


@torch.no_grad()
def forward(model: Any, encoded: Sequence[Tokens]) -> None:
    """The model over all rows, sorted by length, at most `BATCH_TOKENS` with padding at once."""
    order = sorted((ids for ids, _ in encoded), key=len, reverse=True)
    while order:
        batch = order[: max(1, BATCH_TOKENS // len(order[0]))]
        del order[: len(batch)]
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(batch):
            ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
        model(input_ids=ids, attention_mask=mask)


if __name__ == "__main__":
    typer.run(main)
