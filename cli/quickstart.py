"""`dwakd quickstart`: the main job on an embedded default, from nothing to a table.

Every training here is axolotl's own, started as a process on a recipe in the quickstart's folder,
so that whatever it does can be done again by hand: `cd quickstart && axolotl train dwakd.yml`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_cli.terminal import progress_bar
from dwakd_plugin.data.library_docs import Row, documentation_rows
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.held_out import alpaca_prompt, held_out_bits_per_byte, sample_answers
from dwakd_plugin.io.files import replace_file
from dwakd_plugin.models.small_student import create_student
from dwakd_plugin.models.smollm2 import prepare_teacher
from dwakd_plugin.tokenizers.training import train_tokenizer
from dwakd_plugin.train.health import standing_in

TRAIN_ROWS = 300
HELD_OUT_ROWS = 120
VOCABULARY = 4096
STUDENT = {"hidden_size": 256, "layers": 4, "heads": 4, "intermediate_size": 704, "seed": 7}
ANSWERS = 3
RECIPES = {
    "pretrain": "The student reads Python's documentation",
    "sft": "Fine-tuning without a teacher",
    "dwakd": "Fine-tuning with the teacher (DWA-KD)",
}
_STEP = re.compile(rb"(\d+)/(\d+) \[")


def run(folder: Path, *, json_output: bool) -> None:
    """Prepares, trains, measures and reports; what is there already is kept."""
    # One progress display: the libraries' own bars are for the trainings' logs.
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    console = PlainConsole(stderr=json_output)
    console.print(
        Panel(
            "Teacher  SmolLM2-135M-Instruct, with its own tokenizer\n"
            "Student  a Llama of 4M parameters with a tokenizer trained on the data\n"
            "Data     questions about the Python standard library, answered by its documentation\n"
            f"Folder   {folder.resolve()}",
            title="dwakd quickstart",
            expand=False,
        )
    )
    started = time.monotonic()
    seconds: dict[str, float] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(
        console, "{task.description:<44}", count="{task.percentage:>3.0f}%", width=24
    ) as progress:

        def stage(name: str, title: str, work: Callable[[Callable[[int, int], None]], Any]) -> Any:
            task = progress.add_task(title, total=1)
            begin = time.monotonic()
            result = work(lambda done, total: progress.update(task, completed=done / max(1, total)))
            progress.update(task, completed=1)
            seconds[name] = round(time.monotonic() - begin, 1)
            return result

        held_out = stage("prepare", "Models, tokenizer and data", lambda _: prepare(folder))
        for name, title in RECIPES.items():
            stage(name, title, lambda on_step, name=name: train(folder, name, on_step))
        report = stage(
            "measure",
            "Held-out loss and answers",
            lambda on_step: measure(folder, held_out, on_step),
        )
    report["warnings"] = standing_in(folder / "dwakd")
    report["seconds"] = seconds | {"all": round(time.monotonic() - started, 1)}
    replace_file(folder / "report.json", json.dumps(report, indent=1))
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        show(report, console)


def prepare(folder: Path) -> list[Row]:
    """Teacher, data, tokenizer, untrained student and recipes; returns the held-out rows."""
    prepare_teacher(folder / "teacher")
    documentation = documentation_rows(HELD_OUT_ROWS)
    train = documentation.train[:TRAIN_ROWS]
    texts = [alpaca_prompt(row) + row["output"] for row in train]
    # The recipes' data: rows for fine-tuning, plain text for the student's first reading.
    _write_lines(folder / "data" / "train.jsonl", train)
    _write_lines(folder / "data" / "held_out.jsonl", documentation.held_out)
    pretraining = [{"text": text} for text in documentation.pretraining_texts]
    _write_lines(folder / "data" / "pretraining.jsonl", pretraining)
    if not (folder / "untrained").is_dir():
        tokenizer = train_tokenizer([*texts, *documentation.pretraining_texts], VOCABULARY)
        create_student(folder / "untrained", tokenizer, **STUDENT, teacher=folder / "teacher")
    for name in RECIPES:
        recipe = resources.files("dwakd_recipes").joinpath(f"quickstart-{name}.yml").read_text()
        (folder / f"{name}.yml").write_text(recipe, encoding="utf-8")
    return documentation.held_out


def _write_lines(file: Path, rows: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, "".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, name: str, on_step: Callable[[int, int], None]) -> None:
    """Runs axolotl on one of the recipes, unless that was done; `on_step` hears its progress.

    Raises UserError with the end of axolotl's log where it fails.
    """
    output, done = folder / name, folder / name / "quickstart-done"
    if done.is_file():
        return
    shutil.rmtree(output, ignore_errors=True)  # an interrupted run starts over: it takes a minute
    log = folder / f"{name}.log"
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TQDM_DISABLE", None)  # its steps are the progress shown here
    command = [sys.executable, "-m", "axolotl.cli.main", "train", f"{name}.yml"]
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            [*command, "--launcher", "python"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on: axolotl would save and exit with 0
        ) as process,
    ):
        assert process.stdout is not None
        try:
            while chunk := process.stdout.read1(4096):
                stream.write(chunk)
                if steps := _STEP.findall(chunk):
                    on_step(*map(int, steps[-1]))
        except KeyboardInterrupt:
            process.kill()
            raise
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        raise UserError(
            f"axolotl ended with exit code {process.returncode} on {folder / name}.yml. The end of "
            f"{log}:\n" + "\n".join(f"  {line}" for line in tail)
        )
    done.touch()


def measure(
    folder: Path, held_out: list[Row], on_step: Callable[[int, int], None]
) -> dict[str, Any]:
    """Held-out bits per byte of the student's stages and of the teacher, and sampled answers."""
    stages = {
        "student before": "pretrain",
        "student after SFT": "sft",
        "student after DWA-KD": "dwakd",
        "teacher": "teacher",
    }
    report: dict[str, Any] = {"bits_per_byte": {}, "answers": []}
    questions = held_out[:ANSWERS]
    answers: dict[str, list[str]] = {}
    for index, (title, name) in enumerate(stages.items()):
        bits = held_out_bits_per_byte(folder / name, held_out)
        report["bits_per_byte"][title] = round(bits, 4)
        if title != "student before":
            answers[title] = sample_answers(folder / name, questions, 40, seed=None)
        on_step(index + 1, len(stages))
    for index, question in enumerate(questions):
        report["answers"].append(
            {
                "question": question["instruction"],
                "documentation": question["output"],
                **{title: texts[index] for title, texts in answers.items()},
            }
        )
    return report


def show(report: dict[str, Any], console: PlainConsole) -> None:
    """The report as tables, whichever way the figures fall."""
    bits = report["bits_per_byte"]
    table = Table(title=f"Held-out loss, {HELD_OUT_ROWS} questions")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    table.add_column("against SFT", justify="right")
    for title, value in bits.items():
        change = value - bits["student after SFT"]
        table.add_row(title, f"{value:.3f}", "" if change == 0 else f"{change:+.3f}")
    console.print(table)
    samples = Table(title="Greedy answers", show_lines=True)
    samples.add_column("question")
    columns = [key for key in report["answers"][0] if key != "question"]
    for column in columns:
        samples.add_column(column, overflow="fold")
    for answer in report["answers"]:
        texts = (shorten(answer[column], 160, placeholder=" …") for column in columns)
        samples.add_row(answer["question"], *texts)
    console.print(samples)
    gain = bits["student after SFT"] - bits["student after DWA-KD"]
    verdict = (
        f"The teacher saved {gain:.3f} bits per byte over fine-tuning alone."
        if gain > 0
        else f"The teacher did not help here: {-gain:.3f} bits per byte behind fine-tuning alone."
    )
    console.print(f"{verdict} All of it took {report['seconds']['all']:.0f} s.")
    for warning in report["warnings"]:
        console.print(Text(warning, style="yellow"))
