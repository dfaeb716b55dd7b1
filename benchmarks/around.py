"""What surrounds training, each over its floor: rows prepared, a teacher cached, a model evaluated.

    python -m benchmarks.around
    python -m benchmarks.around ROWS.jsonl --student-tokenizer FOLDER --teacher-tokenizer FOLDER

Without arguments the rows are questions about Python's library, of which both tokenizers learn.
Each is whole work within this process, after imports: rows prepared from a recipe to data sets of
both sides, over both tokenizers' `encode_batch` of the same texts; a teacher cache filled, from the
teacher's folder to the last state on disk, over the body's forward of the same batches; and `dwakd
evaluate` with bits per byte alone, over the body's forward of the same rows, sorted by length, and
the head's of the responses. The models have SmolLM2's widths and random weights, and few layers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import measure
from benchmarks.measure import Report

NAME = "around"
PREPARED, ENCODED = "rows prepared", "both tokenizers' encode_batch"
CACHED, BODY = "teacher cache filled", "the body's forward"
EVALUATED, FORWARD = "dwakd evaluate", "one forward, sorted by length"
WHOLE = "dwakd evaluate, the whole process"
METRIC = {"metrics": "bits_per_byte", "prompt_template": "alpaca"}
PARTS = {"prepare": (PREPARED, ENCODED), "cache": (CACHED, BODY), "evaluate": (EVALUATED, FORWARD)}
VOCABULARY = {"student": 4096, "teacher": 8192}  # where no tokenizer is given

Run = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Rows of each part, and the models' shape."""

    prepared: int
    cached: int
    evaluated: int
    layers: dict[str, int]
    width: int
    inner: int
    heads: int


FULL = Sizes(100_000, 192, 500, {"student": 2, "teacher": 12}, 576, 1536, 9)
QUICK = Sizes(60, 12, 12, {"student": 1, "teacher": 2}, 48, 64, 3)


@dataclass(frozen=True)
class Place:
    """A folder with `student`, `teacher` and `rows.jsonl`; the recipe reads and writes there."""

    folder: Path
    rows: list[Row]
    threads: int
    padding: str  # a token of the student's: not every published tokenizer has one

    @property
    def recipe(self) -> dict[str, Any]:
        return {
            "base_model": str(self.folder / "student"),
            "plugins": ["dwakd_plugin.DWAKDPlugin"],
            "distillation": "dwakd",
            "dwakd": {"teacher": {"base_model": str(self.folder / "teacher")}},
            "datasets": [{"path": str(self.folder / "rows.jsonl"), "type": "alpaca"}],
            "dataset_prepared_path": str(self.folder / "prepared"),
            "output_dir": str(self.folder / "out"),
            "sequence_len": 2048,
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "optimizer": "adamw_torch",
            "learning_rate": 1e-4,
            "bf16": False,
            "fp16": False,
            "dataset_num_proc": self.threads,
            "special_tokens": {"pad_token": self.padding},
        }


# What is measured on --------------------------------------------------------------------------


def read_rows(file: Path | None, count: int) -> list[Row]:
    """The first rows of a JSONL file, or questions about the standard library."""
    from dwakd_plugin.data.library_docs import documentation_rows

    if file is None:
        return [dict(row) for row in documentation_rows().train[:count]]
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def make_place(
    folder: Path, rows: list[Row], tokenizers: Mapping[str, Path | None], sizes: Sizes, threads: int
) -> Place:
    """Writes rows, and models of random weights with the tokenizers: those given, or trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dwakd_plugin.tokenizers.training import train_tokenizer

    _write_rows(folder / "rows.jsonl", rows)
    _write_rows(folder / "evaluated.jsonl", rows[: sizes.evaluated])
    for name, given in tokenizers.items():
        texts = (f"{row['instruction']} {row['output']}" for row in rows)
        tokenizer = _tokenizer(given) if given else train_tokenizer(texts, VOCABULARY[name])
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.width,
            intermediate_size=sizes.inner,
            num_hidden_layers=sizes.layers[name],
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads // 3,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        if given:  # as it was published: what transformers saves takes twice as long to read
            for file in [each for each in given.iterdir() if "token" in each.name]:
                shutil.copyfile(file, folder / name / file.name)
        else:
            tokenizer.save_pretrained(folder / name)
    return Place(folder, rows, threads, _tokenizer(folder / "student").eos_token)


def _write_rows(file: Path, rows: list[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _tokenizer(folder: Path) -> Any:
    from dwakd_plugin.tokenizers.loading import load_tokenizer

    return load_tokenizer(folder, f"The tokenizer of `{folder}`")


# Rows prepared --------------------------------------------------------------------------------


def prepare_rows(place: Place) -> Any:
    """The data set with both sides of each row, prepared anew."""
    from dwakd_plugin.recipe import Recipe
    from dwakd_plugin.train.open_run import open_rows

    for written in (place.folder / "prepared", Path(os.environ["HF_DATASETS_CACHE"])):
        shutil.rmtree(written, ignore_errors=True)
    with open_rows(Recipe(place.recipe)) as (_, (train, _), _):
        return train


def preparing(place: Place) -> tuple[dict[str, Run], dict[str, Any]]:
    from dwakd_plugin.evaluate.held_out import alpaca_prompt

    sides = {name: _tokenizer(place.folder / name).backend_tokenizer for name in VOCABULARY}
    # axolotl tokenises prompt and response apart.
    texts = [text for row in place.rows for text in (alpaca_prompt(row), row["output"])]

    def encode() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"  # axolotl switches it off
        for tokenizer in sides.values():
            tokenizer.encode_batch(texts)

    tokens = {name: _count(tokenizer, texts) for name, tokenizer in sides.items()}
    return {PREPARED: lambda: prepare_rows(place), ENCODED: encode}, {
        "rows": len(place.rows),
        **{f"{name}_tokens": number for name, number in tokens.items()},
    }


def _count(tokenizer: Any, texts: list[str]) -> int:
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))


# A teacher cached -----------------------------------------------------------------------------


def caching(place: Place, count: int) -> tuple[dict[str, Run], dict[str, Any]]:
    from dwakd_plugin.models.batches import teacher_batch
    from dwakd_plugin.models.causal_lm import hidden_states
    from dwakd_plugin.models.teacher.cached import (
        batches_of,
        fill,
        missing_rows,
        open_cache,
        response_tokens,
        teacher_rows,
    )
    from dwakd_plugin.models.teacher.loaded import load_teacher
    from dwakd_plugin.recipe import Recipe

    rows = teacher_rows(prepare_rows(place).select(range(min(count, len(place.rows)))))
    folder = place.folder / "states"
    recipe = Recipe.completed(place.recipe, {"cache": str(folder)})
    config = recipe.config.each_teacher[0]
    tokenizer = _tokenizer(place.folder / "teacher")

    def cache() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        opened = open_cache(config, "cpu", tokenizer)
        with opened.writing(wait=False):
            fill(config, "cpu", opened, missing_rows(opened, rows), tokenizer=tokenizer)

    missing = missing_rows(open_cache(config, "cpu", tokenizer), rows)
    model = load_teacher(config, "cpu").model
    assert model is not None
    batches = [
        teacher_batch(*map(list, zip(*(missing[key] for key in keys), strict=True)))
        for keys in batches_of(missing)
    ]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            hidden_states(model, batch["teacher_input_ids"], batch["teacher_attention_mask"])

    return {CACHED: cache, BODY: forward}, {
        "rows": len(rows),
        "tokens": sum(len(ids) for ids, _ in missing.values()),
        "padded_tokens": sum(batch["teacher_input_ids"].numel() for batch in batches),
        "response_tokens": response_tokens(missing),
    }


# A model evaluated ----------------------------------------------------------------------------


def evaluating(place: Place) -> tuple[dict[str, Run], dict[str, Any]]:
    from dwakd_cli.evaluate import evaluate
    from dwakd_plugin.evaluate.model import Held, find_model, load_config, load_model
    from dwakd_plugin.evaluate.rows import choose_format, encode, read_rows
    from dwakd_plugin.models.causal_lm import hidden_states, output_head

    folder, data = str(place.folder / "student"), place.folder / "evaluated.jsonl"

    def command() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate(folder, data, output=place.folder / "evaluation", **METRIC)

    source, tokenizer = find_model(folder), _tokenizer(place.folder / "student")
    model = load_model(source, load_config(source, trust_remote_code=False), Held())
    head, rows = output_head(model), read_rows(data)
    form = choose_format(METRIC["prompt_template"], rows, source, tokenizer)
    encoded = [encode(row, form, tokenizer, [tokenizer.eos_token_id]) for row in rows]
    encoded.sort(key=lambda row: -sum(map(len, row)))
    batches = list(_batches(encoded))

    @torch.no_grad()
    def forward() -> None:
        for ids, mask, places in batches:
            head.logits(hidden_states(model, ids, mask)[places])

    return {EVALUATED: command, FORWARD: forward}, {
        "rows": len(rows),
        "tokens": sum(len(row.prompt) + len(row.response) for row in encoded),
        "padded_tokens": sum(ids.numel() for ids, _, _ in batches),
        "response_tokens": sum(len(row.response) for row in encoded),
    }


def whole_evaluation(place: Place) -> float:
    """Seconds of the command as it is typed, in a process of its own."""
    model, data = place.folder / "student", place.folder / "evaluated.jsonl"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in METRIC.items()]
    started = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "dwakd_cli", "evaluate", str(model), str(data), *options),
            *("--output", str(place.folder / "evaluation-apart")),
        ],
        env=os.environ | {"OMP_NUM_THREADS": str(place.threads)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def _batches(rows: list[Any], tokens: int = 2048) -> Any:
    """Of rows from long to short: ids and mask (B, L) of at most so many tokens, and which states
    (B, L) predict a token of a response."""
    while rows:
        width = sum(map(len, rows[0]))
        some = rows[: max(1, tokens // width)]
        rows = rows[len(some) :]
        ids = torch.zeros(len(some), width, dtype=torch.long)
        mask, places = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for place, (prompt, response) in enumerate(some):
            length = len(prompt) + len(response)
            ids[place, :length] = torch.tensor([*prompt, *response])
            mask[place, :length] = 1
            places[place, len(prompt) - 1 : length - 1] = True
        yield ids, mask, places


# Together -------------------------------------------------------------------------------------


def compare(made: tuple[dict[str, Run], dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Seconds of each, alternated, and the ratio of the first to its floor."""
    runs, counts = made
    seconds, disturbance = measure.alternate(runs, rounds)
    work, floor = seconds
    return {
        "counts": counts,
        "seconds": seconds,
        "over_floor": measure.ratio(seconds[work], seconds[floor]),
        "disturbance": disturbance,
    }


def targets(results: Report) -> list[dict[str, Any]]:
    ratio = {part: results[part]["over_floor"]["median"] for part in PARTS}
    return [
        measure.target(f"{PREPARED}: time / {ENCODED}", ratio["prepare"], 3),
        measure.target(
            f"{CACHED}: tokens a second / {BODY}", 1 / ratio["cache"], 0.9, at_least=True
        ),
        measure.target(f"{EVALUATED}: time / {FORWARD}", ratio["evaluate"], 1.15),
    ]


def tables(results: Report) -> str:
    """The figures in Markdown."""
    lines = ["| | seconds | times its floor | of |", "|---|---|---|---|"]
    for part, (work, _) in PARTS.items():
        found = results[part]
        counts = ", ".join(
            f"{number:,} {name.replace('_', ' ')}" for name, number in found["counts"].items()
        )
        for name, values in found["seconds"].items():
            times = f"{found['over_floor']['median']:.3g}" if name == work else "its floor"
            lines.append(f"| {name} | {_spread(values)} | {times} | {counts} |")
    return "\n".join([*lines, f"| {WHOLE} | {_spread(results['whole'])} | | {counts} |"])


def _spread(seconds: list[float]) -> str:
    s = measure.spread(seconds)
    return f"{s['median']:.3g} ({s['min']:.3g} to {s['max']:.3g})"


def picture(results: Report, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(PARTS), figsize=(7, 4.5), layout="constrained")
    for row, part in zip(axes, PARTS, strict=True):
        found = results[part]["seconds"]
        row.barh(list(found), [statistics.median(values) for values in found.values()])
        row.invert_yaxis()
    axes[-1].set(xlabel="seconds")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(
    rows: Annotated[
        Path | None, typer.Argument(help="JSONL of instruction, input and output.")
    ] = None,
    student_tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with a tokenizer.json; else trained.")
    ] = None,
    teacher_tokenizer: Annotated[Path | None, typer.Option(help="The same.")] = None,
    quick: Annotated[bool, typer.Option(help="A smoke run of half a minute.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, and processes.")] = 2,
    memory_limit: Annotated[float, typer.Option(help="GiB; what needs more fails.")] = 18.0,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the picture.")] = (
        measure.RESULTS
    ),
) -> None:
    """Preparing rows, caching a teacher and evaluating, each over the least that it could take."""
    if quick:
        rounds = 1
    sizes = QUICK if quick else FULL
    measure.set_up(threads, memory_limit)
    started = measure.start(threads, quick, ["axolotl", "transformers", "tokenizers", "datasets"])
    tokenizers = {"student": student_tokenizer, "teacher": teacher_tokenizer}
    with tempfile.TemporaryDirectory(prefix="dwakd-around-") as folder:
        # Before the libraries that read them are imported.
        os.environ |= {
            "AXOLOTL_DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": f"{folder}/datasets",
            "RAYON_NUM_THREADS": str(threads),
        }
        place = make_place(
            Path(folder), read_rows(rows, sizes.prepared), tokenizers, sizes, threads
        )
        results: Report = {
            "sizes": asdict(sizes),
            "prepare": compare(preparing(place), rounds),
            "cache": compare(caching(place, sizes.cached), rounds),
            "evaluate": compare(evaluating(place), rounds),
            "whole": [whole_evaluation(place) for _ in range(rounds)],
        }
    file = measure.write_report(NAME, started, results, [] if quick else targets(results), out)
    picture(results, file.with_suffix(".png"))
    print(tables(results))


if __name__ == "__main__":
    typer.run(main)
