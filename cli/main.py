"""The `dwakd` command: its subcommands, in the order of its help."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

import dwakd_plugin
from dwakd_cli import recipes
from dwakd_cli.adapt import adapt
from dwakd_cli.align import align
from dwakd_cli.answers import answers
from dwakd_cli.boundary import error_boundary
from dwakd_cli.cache import cache
from dwakd_cli.check import check
from dwakd_cli.cut import cut
from dwakd_cli.evaluate import evaluate
from dwakd_cli.export import export
from dwakd_cli.plan import plan
from dwakd_cli.train import train
from dwakd_cli.warmup import warmup

app = typer.Typer(
    name="dwakd",
    help="Cross-tokenizer knowledge distillation for axolotl.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does, and both would
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dwakd {dwakd_plugin.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", is_eager=True)
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """`debug` and `version` act before any subcommand runs."""
    # They warn at import of kernels that this machine has no use for.
    for library in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(library).setLevel(logging.ERROR)


def quickstart(
    folder: Annotated[
        Path, typer.Option(help="Where models, data, recipes and results go.")
    ] = Path("quickstart"),
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of tables.")
    ] = False,
) -> None:
    """Distil a real teacher into a small student on this machine's CPU, in minutes.

    The teacher is SmolLM2-135M-Instruct, which learns the task first; the student is cut out of it
    and gets a tokenizer of its own; the data are Python's own documentation. The student is trained
    with axolotl twice: without a teacher, and with. Ends with each model's answers to held-out
    questions and a table of their loss. A second call goes on where the first one stopped.
    """
    from dwakd_cli.quickstart import run

    run(folder, json_output=json_output)


# Each command, and what its help ends with.
for command, example in {
    train: "train sft.yml --teacher Qwen/Qwen1.5-1.8B --load-in-8bit",
    adapt: "adapt sft.yml --teacher Qwen/Qwen1.5-1.8B --load-in-8bit",
    answers: "answers recipe.yml --out rows.jsonl --samples 4 --keep shortest",
    warmup: "warmup recipe.yml --epochs 5 --plot warmup.png",
    cache: "cache recipe.yml --load-in-4bit --dtype float8_e4m3",
    plan: "plan sft.yml --teacher Qwen/Qwen1.5-1.8B --gpu 24GB",
    quickstart: "quickstart --folder first-try",
    cut: "cut HuggingFaceTB/SmolLM2-135M-Instruct student --layers 20 --texts rows.jsonl",
    check: "check Qwen/Qwen1.5-1.8B gpt2 --texts train.jsonl",
    align: "align recipe.yml --checkpoint outputs/dwakd --sample 3",
    export: "export outputs/sft my-student --dtype bfloat16",
    evaluate: "evaluate outputs/dwakd test.jsonl --against outputs/sft",
}.items():
    app.command(epilog=f"Example:  dwakd {example}")(command)
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 an error with a message, 130 interrupted."""
    from dwakd_cli.terminal import writable

    with writable(), error_boundary():
        app(prog_name="dwakd")
