"""`dwakd evaluate`: how good a student is, by sampled answers, by its loss, and by its teacher."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.panel import Panel
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import JsonReport, TrustModels
from dwakd_cli.terminal import work_stages
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate import METRICS, OF_TEACHER

if TYPE_CHECKING:
    from dwakd_plugin.evaluate.subjects import Model, Request

REPORT, PICTURE = "report.json", "evaluation.png"
_SHOWN_PROMPT = 1200  # characters


def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A model, LoRA adapter, run or checkpoint: a folder, or a hub id."),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help="Rows with references: JSONL or JSON (instruction, input, output; or messages), "
            "or an axolotl recipe (YAML), which renders its own evaluation rows."
        ),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Another model, compared with the first row by row; may be repeated.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also say how near the models are to this one."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Of rouge_l, bits_per_byte, agreement, structure, with commas.",
            show_default="rouge_l, bits_per_byte; all with --teacher",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="One answer a row for each.")] = "10,20,30,40,50",
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest answer in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="From 0, which is greedy, under one seed.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(metavar="X", help="From 0.01 to 1, which samples from all tokens.")
    ] = 1.0,
    limit: Annotated[int | None, typer.Option(metavar="N", help="The first N rows only.")] = None,
    prompt_template: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="alpaca, chat, or a text or file with {instruction} and {input}. auto: as the "
            "run was trained; else the chat template; else alpaca.",
        ),
    ] = "auto",
    batch_size: Annotated[
        str, typer.Option(metavar="N", help="Answers made at once; auto: 64 on a GPU, else 8.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="As cpu or cuda:1; auto: the GPU, if any.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(metavar="NAME", help="auto: as stored on a GPU, float32 on the CPU."),
    ] = "auto",
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="Hold the models in 8 bit.")
    ] = False,
    teacher_in_8bit: Annotated[
        bool, typer.Option("--teacher-in-8bit", help="Hold the teacher in 8 bit.")
    ] = False,
    backend: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(metavar="NAME", help="transformers, or vllm for the answers (run on CPUs)."),
    ] = "transformers",
    trust_remote_code: TrustModels = False,
    output: Annotated[
        Path, typer.Option("--output", "--out", help="Folder for report, picture and answers.")
    ] = Path("evaluation"),
    force: Annotated[
        bool, typer.Option("--force", help="Make all answers again, and replace those there.")
    ] = False,
    json_output: JsonReport = False,
) -> None:
    """Evaluate a model on rows with references, alone or against others.

    ROUGE-L of answers sampled under several seeds, bits per byte of the references, and with
    --teacher the next byte's agreement and the distance of representation structure. Each with a
    bootstrap interval over rows.

    Shows the first prompt before it begins: a prompt format that the model was not trained on is
    the commonest mistake. Answers are kept as they are made; Ctrl-C exits with 130, and the same
    command goes on to the same end.

    Exit codes: 0 evaluated; 1 an error; 130 interrupted.
    """
    started = time.monotonic()
    chosen, numbers = read_metrics(metrics, teacher), read_seeds(seeds)
    if not temperature >= 0 or not 0.01 <= top_p <= 1:
        raise UserError(
            f"--temperature {temperature:g} and --top-p {top_p:g}: give a temperature from 0, and "
            "a top-p from 0.01 to 1."
        )
    for name, count in (("max-new-tokens", max_new_tokens), ("limit", limit)):
        if count is not None and count < 1:
            raise UserError(f"--{name} {count}: give a number from 1.")
    if temperature == 0:  # every seed would give the same answers
        numbers = numbers[:1]
    size = _batch_size(batch_size)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder.")
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    console = PlainConsole(stderr=json_output)
    with console.status("Looking at models and data"):
        from transformers.utils import logging

        from dwakd_plugin.evaluate import report as figures
        from dwakd_plugin.evaluate import subjects, work
        from dwakd_plugin.evaluate.model import Held
        from dwakd_plugin.models.sampling import Sampling
        from dwakd_plugin.tokenizers.template_date import template_date

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        request = subjects.Request(
            model=model,
            against=tuple(against or ()),
            teacher=teacher,
            data=data,
            limit=limit,
            prompt_template=prompt_template,
            metrics=chosen,
            seeds=numbers,
            sampling=Sampling(temperature, top_p, max_new_tokens),
            batch_size=size,
            backend=backend,
            held=Held(device, dtype, load_in_8bit, trust_remote_code),
            teacher_in_8bit=teacher_in_8bit,
            output=output,
            force=force,
        )
        models = subjects.open_models(request)
        day = subjects.day_of(request, models)
        with template_date(day):
            references, facts = subjects.read_data(request, models)
        references, facts["rows_left_out"] = subjects.keep_what_fits(models, references)
        facts["rows"] = len(references)
    _show_prompt(models[0], facts, console)
    with (
        template_date(day),
        _words_when_stopped(request, console),
        work_stages(console, "{task.description:<28}") as begin,
    ):
        work.evaluate(models, references, request, begin)
        report = {
            **facts,
            "seeds": list(request.seeds),
            "sampling": asdict(request.sampling),
            "backend": backend,
            "output": str(output),
            **figures.figures(models, references, request, begin),
        }
    report["seconds"] = round(time.monotonic() - started, 1)
    from dwakd_cli.evaluation_report import picture, show
    from dwakd_plugin.io.files import explaining_writes, replace_file

    with explaining_writes(output):
        output.mkdir(parents=True, exist_ok=True)
        replace_file(output / PICTURE, picture(report))
        replace_file(output / REPORT, json.dumps(report, indent=1))
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        show(report, console)


# Options ------------------------------------------------------------------------------------


def read_metrics(text: str | None, teacher: str | None) -> tuple[str, ...]:
    """The metrics of a list with commas; by default all that are available."""
    if text is None:
        return METRICS if teacher else METRICS[:2]
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise UserError(f"--metrics {text}: choose from {', '.join(METRICS)}, with commas.")
    needy = [name for name in names if name in OF_TEACHER]
    if needy and teacher is None:
        raise UserError(f"--metrics {needy[0]} compares with a teacher. Name it with --teacher.")
    return tuple(name for name in METRICS if name in names)


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds of a list with commas. Raises UserError."""
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: give different whole numbers from 0, as in 10,20,30.")
    return seeds


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"--batch-size {text}: give auto or a number from 1.")
    return int(text)


# What is shown ------------------------------------------------------------------------------


def _show_prompt(model: Model, facts: dict[str, Any], console: PlainConsole) -> None:
    """The first prompt, as the model reads it: a wrong format is the commonest mistake."""
    prompt = model.tokenizer.decode(model.rows[0].prompt)
    facts["first_prompt"] = prompt
    if len(prompt) > _SHOWN_PROMPT:
        prompt = f"{prompt[:_SHOWN_PROMPT]} ..."
    form = facts["prompt_template"]
    console.print(
        Panel(
            Text(prompt),
            title=Text(f"First prompt ({form['kind']}: {form['why']})"),
            expand=False,
        )
    )
    if facts["rows_left_out"]:
        console.print(
            f"{facts['rows_left_out']:,} of {facts['rows_left_out'] + facts['rows']:,} rows are "
            "left out: prompt and reference are longer than a model's positions.",
            style="yellow",
        )


@contextmanager
def _words_when_stopped(request: Request, console: PlainConsole) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if "rouge_l" in request.metrics:
            console.print(
                f"Stopped. The same command goes on: the answers so far are in {request.output}."
            )
        raise
