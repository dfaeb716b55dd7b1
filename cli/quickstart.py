"""`dwakd quickstart`: the main job on an embedded default, from nothing to answers and a table.

Every training here is axolotl's own, started as a process on a recipe in the quickstart's folder,
so that whatever it does can be done again by hand: `cd quickstart && axolotl train dwakd.yml`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from importlib import resources
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_cli.logged_run import train_logged
from dwakd_cli.stages import Hear, Stages
from dwakd_plugin.data.library_docs import Row, documentation_rows
from dwakd_plugin.io.files import replace_file
from dwakd_plugin.models.smollm2 import prepare_teacher

TRAIN_ROWS = 200
HELD_OUT_ROWS = 120
LONGEST_ANSWER = 160  # characters: a CPU has minutes
# `dwakd cut teacher student --layers 24` on Python's documentation leaves these out.
LEFT_OUT = (12, 13, 14, 15, 17, 25)
VOCABULARY = 8192
ANSWERS = 5
RECIPES = {
    "adapt": "The teacher learns the task",
    "sft": "The student, fine-tuned alone",
    "dwakd": "The student, taught",
}
# Seconds on two cores, for the time that is left.
EXPECTED = {"prepare": 50.0, "adapt": 115.0, "sft": 165.0, "dwakd": 215.0, "measure": 60.0}
MODELS = {  # what is measured, by the folder that it lies in
    "student as cut": "student",
    "student, fine-tuned": "sft",
    "student, taught": "dwakd",
    "teacher": "adapt",
}


def run(folder: Path, *, json_output: bool) -> None:
    """Prepares, trains, measures and reports; what is there already is kept."""
    before = dict(os.environ)
    # The libraries' own bars are for the trainings' logs: here, there is one display. They read
    # this as they are imported, so none is before.
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    from dwakd_plugin.train.health import standing_in
    from dwakd_plugin.train.launch import axolotl_environment

    console = PlainConsole(stderr=json_output)
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    console.print(
        Panel(
            "Teacher  SmolLM2-135M-Instruct, which first learns the task itself\n"
            f"Student  {30 - len(LEFT_OUT)} of its 30 layers, and a tokenizer of {VOCABULARY:,} "
            "tokens of its own\n"
            f"Data     {TRAIN_ROWS} questions about the Python standard library, answered by its "
            "documentation\n"
            f"Folder   {folder.resolve()}\n"
            "The two trainings of the student take most of the time.",
            title="dwakd quickstart",
            expand=False,
        )
    )
    environment = axolotl_environment(before) | {"HF_HUB_OFFLINE": "1"}
    try:
        with Stages(console, EXPECTED) as stages:
            held_out = stages.run("prepare", "Models and data", lambda _: prepare(folder))
            for name, title in RECIPES.items():
                if is_done(folder, name):
                    stages.skip(name)
                else:
                    stages.run(
                        name, title, lambda hear, name=name: train(folder, name, environment, hear)
                    )
            report = stages.run(
                "measure",
                "Held-out loss and answers",
                lambda hear: measure(folder, held_out, hear),
            )
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command goes on with what is done in {folder}.")
        raise
    report["warnings"] = standing_in(folder / "dwakd")
    report["seconds"] = stages.seconds | {"all": round(time.monotonic() - started, 1)}
    replace_file(folder / "report.json", json.dumps(report, indent=1))
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        show(report, console)


# The stages -----------------------------------------------------------------------------------


def prompt(row: Row) -> str:
    """The text before the response, as the recipes' `format` has it."""
    return row["instruction"] + "\n"


def prepare(folder: Path) -> list[Row]:
    """Teacher, data, student and recipes; returns the held-out rows."""
    prepare_teacher(folder / "teacher")
    documentation = documentation_rows(HELD_OUT_ROWS)
    short, held_out = (
        [row for row in rows if len(row["output"]) <= LONGEST_ANSWER]
        for rows in (documentation.train, documentation.held_out)
    )
    _write_lines(folder / "data" / "train.jsonl", short[:TRAIN_ROWS])
    _write_lines(folder / "data" / "held_out.jsonl", held_out)
    if not (folder / "student").is_dir():
        texts = [prompt(row) + row["output"] for row in documentation.train]
        cut_student(folder, [*texts, *documentation.pretraining_texts])
    for name in RECIPES:
        (folder / f"{name}.yml").write_text(_recipe(name), encoding="utf-8")
    return held_out


def cut_student(folder: Path, texts: list[str]) -> None:
    """The teacher without the layers that matter least, over a tokenizer trained on the texts."""
    from dwakd_cli.cut import save_student
    from dwakd_plugin.evaluate import model as models
    from dwakd_plugin.io.folders import new_folder
    from dwakd_plugin.models.cutting import keep_layers, layer_count
    from dwakd_plugin.models.new_vocabulary import replace_vocabulary
    from dwakd_plugin.tokenizers.loading import load_tokenizer
    from dwakd_plugin.tokenizers.respelling import spellings
    from dwakd_plugin.tokenizers.training import train_tokenizer

    source = models.find_model(str(folder / "teacher"))
    config = models.load_config(source, trust_remote_code=False)
    old = load_tokenizer(source.tokenizer, "The teacher's tokenizer")
    new = train_tokenizer(texts, VOCABULARY, like=old)
    student = models.load_model(source, config, models.Held("cpu"))
    keep_layers(student, [n for n in range(layer_count(config)) if n not in LEFT_OUT])
    replace_vocabulary(student, spellings(new, old), len(old))
    with new_folder(folder / "student") as place:
        save_student(student, source, config, (old, new), place)


def _recipe(name: str) -> str:
    return resources.files("dwakd_recipes").joinpath(f"quickstart-{name}.yml").read_text()


def _write_lines(file: Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, "".join(json.dumps(row) + "\n" for row in rows))


def is_done(folder: Path, name: str) -> bool:
    """Whether this recipe, as it stands, was trained to its end."""
    done = folder / name / "quickstart-done"
    return done.is_file() and done.read_text(encoding="utf-8") == _recipe(name)


def train(folder: Path, name: str, environment: dict[str, str], hear: Hear) -> None:
    """Runs axolotl on one of the recipes; `hear` is told how far it is, and its losses.

    Raises UserError with the end of axolotl's log where it fails.
    """
    shutil.rmtree(folder / name, ignore_errors=True)  # an interrupted run starts over
    train_logged(
        folder / f"{name}.yml",
        folder / f"{name}.log",
        environment,
        lambda heard: hear(heard.share, heard.losses),
        folder,
    )
    replace_file(folder / name / "quickstart-done", _recipe(name))


def measure(folder: Path, held_out: list[Row], hear: Hear) -> dict[str, Any]:
    """Held-out bits per byte of the student's stages and of the teacher, and greedy answers."""
    from dwakd_plugin.evaluate.held_out import held_out_bits_per_byte, sample_answers

    report: dict[str, Any] = {"held_out_rows": len(held_out), "bits_per_byte": {}}
    questions = held_out[:ANSWERS]
    answers = [
        {"question": row["instruction"], "documentation": row["output"]} for row in questions
    ]
    for index, (title, name) in enumerate(MODELS.items()):
        # Where the recipes ran: an adapter names its model as the recipe does.
        with contextlib.chdir(folder):
            bits = held_out_bits_per_byte(Path(name), held_out, prompt)
            texts = sample_answers(Path(name), questions, 32, seed=None, prompt=prompt)
        report["bits_per_byte"][title] = round(bits, 4)
        for answer, text in zip(answers, texts, strict=True):
            answer[title] = text
        hear((index + 1) / len(MODELS))
    return report | {"answers": answers}


# The report -----------------------------------------------------------------------------------


def show(report: dict[str, Any], console: PlainConsole) -> None:
    """Each question with every model's answer under it, then the loss, whichever way it falls."""
    for answer in report["answers"]:
        console.print(Text(f"\n{answer['question']}", style="bold"))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", min_width=21)
        grid.add_column(max_width=100)
        for title, text in answer.items():
            if title != "question":
                grid.add_row(f"  {title}", " ".join(text.split()))
        console.print(grid)
    console.print()
    bits = report["bits_per_byte"]
    table = Table(title=f"Loss on {report['held_out_rows']} held-out questions")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    table.add_column("against fine-tuned", justify="right")
    for title, value in bits.items():
        change = value - bits["student, fine-tuned"]
        table.add_row(title, f"{value:.3f}", "" if change == 0 else f"{change:+.3f}")
    console.print(table)
    gain = bits["student, fine-tuned"] - bits["student, taught"]
    verdict = (
        f"The teacher saved {gain:.3f} bits per byte over fine-tuning alone."
        if gain > 0
        else f"The teacher did not help here: {-gain:.3f} bits per byte behind fine-tuning alone."
    )
    console.print(f"{verdict} All of it took {report['seconds']['all']:.0f} s.")
    for warning in report["warnings"]:
        console.print(Text(warning, style="yellow"))
