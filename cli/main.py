"""The `dwakd` command: its subcommands, and the one place where errors become messages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperArgument

import dwakd_plugin
from dwakd_plugin.errors import UserError


def _keep_help(init: Callable[..., None]) -> Callable[..., None]:
    """Since 8.5, click's arguments have a `help` too, and typer 0.25 loses its own to it."""

    @wraps(init)
    def keeping(self: Any, *, help: str | None = None, **settings: Any) -> None:
        init(self, help=help, **settings)
        self.help = help

    return keeping


TyperArgument.__init__ = _keep_help(TyperArgument.__init__)  # type: ignore[method-assign]

app = typer.Typer(
    name="dwakd",
    help="Cross-tokenizer knowledge distillation for axolotl.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


# Options that several commands take.
Recipe = Annotated[Path, typer.Argument(help="An axolotl recipe (YAML).")]
Teacher = Annotated[
    str | None, typer.Option(help="Hub id or folder of the teacher; goes before the recipe's.")
]
LoadIn8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="Hold the teacher in 8 bit.")]
LoadIn4Bit = Annotated[
    bool, typer.Option("--load-in-4bit", help="Hold the teacher in 4 bit (nf4).")
]
TeacherCache = Annotated[Path | None, typer.Option(help="Folder for the teacher's hidden states.")]


def _teacher(
    base_model: str | None, load_in_8bit: bool, load_in_4bit: bool, cache: Path | None
) -> dict[str, Any]:
    """What the command line says of the teacher, as keys of `dwakd.teacher`."""
    given = {
        "base_model": base_model,
        "load_in_8bit": load_in_8bit or None,
        "load_in_4bit": load_in_4bit or None,
        "cache": str(cache) if cache else None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _share(value: float) -> float:
    if not 0.01 <= value <= 1:
        raise typer.BadParameter(f"{value:g} is not from 0.01 to 1.")
    return value


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
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


@app.command(
    epilog="Example:  dwakd train sft.yml --teacher Qwen/Qwen1.5-1.8B --load-in-8bit",
)
def train(
    recipe: Recipe,
    further: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- ARGUMENTS...]",
            help="For axolotl, as in `-- --learning-rate 1e-4`.",
            show_default=False,
        ),
    ] = None,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    teacher_cache: TeacherCache = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Goes before the recipe's: mapped, dskd, sft, ... (docs/baselines.md).",
        ),
    ] = None,
    launcher: Annotated[
        Literal["python", "accelerate", "torchrun"] | None,
        typer.Option(
            metavar="NAME",
            help="python, accelerate or torchrun. Default: python for one process, else accelerate "
            "(CPU: torchrun).",
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes on this machine; default: one a GPU."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show what would run, stop.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print what ran as JSON; axolotl's output to stderr.")
    ] = False,
) -> None:
    """Train a recipe with a teacher, through axolotl.

    Any axolotl recipe for supervised fine-tuning will do: with --teacher it needs no edit. The
    plugin and the switch are added, everything is checked before a model is loaded, and what
    axolotl was given is kept in OUTPUT_DIR/dwakd/recipe.yml.

    What follows a `--` goes to axolotl, as in `-- --learning-rate 1e-4`; what follows a second `--`
    goes to its launcher.

    Ctrl-C lets axolotl save and stop; a second one kills it. Exit codes: axolotl's own; 1 for an
    error with a message; 130 and 143 when interrupted or terminated.
    """
    from dwakd_cli.train import run

    sys.exit(
        run(
            recipe,
            further or [],
            teacher=_teacher(teacher, load_in_8bit, load_in_4bit, teacher_cache),
            variant=variant,
            launcher=launcher,
            processes=nproc,
            resume=resume,
            dry_run=dry_run,
            json_output=json_output,
        )
    )


@app.command(
    epilog="Example:  dwakd warmup recipe.yml --epochs 5 --plot warmup.png",
)
def warmup(
    recipe: Recipe,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    teacher_cache: TeacherCache = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Epochs at most.")] = 10,
    patience: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Stop after so many epochs that improve nothing."),
    ] = 2,
    teacher_space: Annotated[
        bool,
        typer.Option("--teacher-space", help="Train s2t too, on the teacher-space KL; dear."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="The file; by default it lies beside OUTPUT_DIR and is named after it."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the course of training (PNG).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train again, and replace what lies at --output.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Train the projectors with both models frozen, before distillation begins.

    Each model reads each row once; every epoch after that trains on the states kept. Stops early
    on held-out rows (the recipe's, else 5 % of the data) and keeps the best epoch's projectors, for
    `dwakd.projectors.path` of the recipe.

    What is finished and has the same models, rows and settings is not repeated. Ctrl-C exits with
    130, and the same command then goes on after the last whole epoch.

    Exit codes: 0 the file is there; 1 an error; 130 interrupted.
    """
    from dwakd_cli.warmup import run

    run(
        recipe,
        teacher=_teacher(teacher, load_in_8bit, load_in_4bit, teacher_cache),
        epochs=epochs,
        patience=patience,
        teacher_space=teacher_space,
        output=output,
        plot=plot,
        force=force,
        json_output=json_output,
    )


@app.command(
    epilog="Example:  dwakd cache recipe.yml --load-in-4bit --dtype float8_e4m3",
)
def cache(
    recipe: Recipe,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the states; goes before the recipe's. By default it lies beside "
            "OUTPUT_DIR and is named after it.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float8_e4m3"] | None,
        typer.Option(help="How to keep the states; auto: as computed.", show_default="auto"),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that the teacher reads at once.", show_default="2048"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute nothing: compare every checksum.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Let the teacher read every row once, and keep its hidden states for training.

    Training from the cache loads the teacher's head and embeddings and never its body. Says what
    it takes on disk before it begins. Ctrl-C exits with 130; the same command goes on from there,
    and adds the rows that the recipe has got since.
    """
    from dwakd_cli.cache import run

    run(
        recipe,
        teacher=_teacher(teacher, load_in_8bit, load_in_4bit, teacher_cache)
        | ({"cache_dtype": dtype} if dtype else {}),
        batch_tokens=batch_tokens,
        verify=verify,
        json_output=json_output,
    )


@app.command(
    epilog="Example:  dwakd plan sft.yml --teacher Qwen/Qwen1.5-1.8B --gpu 24GB",
)
def plan(
    recipe: Recipe,
    teacher: Teacher = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    teacher_cache: TeacherCache = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="What it should fit on: 24GB, A100-80GB, ..., or cpu.",
            show_default="the GPU found, else the CPU",
        ),
    ] = None,
    response_share: Annotated[
        float,
        typer.Option(
            metavar="X",
            callback=_share,
            help="How much of a row is response, 0.01 to 1; the rest is prompt.",
        ),
    ] = 1.0,
    data: Annotated[
        bool,
        typer.Option("--data", help="Tokenise the data and plan for its longest rows."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the parts (PNG).")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if it does not fit.")] = (
        False
    ),
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Say what a run will take in memory and time, before anything large is downloaded.

    Needs both models' configs alone. Memory by part at the worst moment of a step, the largest
    micro-batch that fits, an estimate of the time, and what would help, in order of effect. Rows
    are taken to be as long as `sequence_len`, the worst case, unless --data.

    Exit codes: 0 planned, whether it fits or not; 1 an error; 3 with --strict, does not fit.
    """
    from dwakd_cli.plan import run

    fits = run(
        recipe,
        teacher=_teacher(teacher, load_in_8bit, load_in_4bit, teacher_cache),
        gpu=gpu,
        response_share=response_share,
        data=data,
        plot=plot,
        json_output=json_output,
    )
    if strict and not fits:
        raise typer.Exit(3)


@app.command(
    epilog="Example:  dwakd quickstart --folder first-try",
)
def quickstart(
    folder: Annotated[
        Path, typer.Option(help="Where models, data, recipes and results go.")
    ] = Path("quickstart"),
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of tables.")
    ] = False,
) -> None:
    """Distil a real teacher into a small student on this machine's CPU, in minutes.

    Prepares SmolLM2-135M-Instruct as the teacher and a 4M-parameter student with a tokenizer of its
    own, takes Python's own documentation as data, and trains with axolotl: once without a teacher,
    once with. Ends with a table of the student's held-out loss before and after each. A second call
    goes on where the first one stopped.
    """
    from dwakd_cli.quickstart import run

    run(folder, json_output=json_output)


@app.command(
    epilog="Example:  dwakd check Qwen/Qwen1.5-1.8B gpt2 --texts train.jsonl",
)
def check(
    teacher: Annotated[str, typer.Argument(help="The teacher's folder or hub id.")],
    student: Annotated[str, typer.Argument(help="The student's folder or hub id.")],
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Your data: one text a line, or JSONL with text, instruction/output or messages. "
            "Default: a built-in sample of 16 languages, code and numbers."
        ),
    ] = None,
    show: Annotated[
        str | None, typer.Option(help="Draw this text's tokens instead of the first text's.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the tokens into a PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it all as an HTML page.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if the verdict is poor.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let the tokenizers' repositories run code."),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Tell whether two tokenizers are fit for distillation, before any weight is loaded.

    Compares the vocabularies and how both cut the same texts, in bytes; looks at special tokens,
    chat templates, normalisation, digits, white space and languages; says what to do about each
    finding, and draws both cuts of a text. Verdict: good, workable or poor.

    Exit codes: 0 checked, whatever the verdict; 1 an error; 3 with --strict, a poor verdict.
    """
    from dwakd_cli.check import run

    verdict = run(
        teacher,
        student,
        texts_file=texts,
        drawn_text=show,
        png=png,
        html=html,
        trust_remote_code=trust_remote_code,
        json_output=json_output,
    )
    if strict and verdict == "poor":
        raise typer.Exit(3)


@app.command(
    epilog="Example:  dwakd align recipe.yml --checkpoint outputs/dwakd --sample 3",
)
def align(
    recipe: Recipe,
    sample: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Which sample of the evaluation set (of the training set, where there is none), "
            "from 1; may be repeated.",
            show_default="1",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A run's output folder or checkpoint: align as it does after training."),
    ] = None,
    before: Annotated[
        bool, typer.Option("--before", help="With --checkpoint: before training too, beside it.")
    ] = False,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Draw so many tokens a side.")
    ] = 80,
    output: Annotated[
        Path, typer.Option(help="Folder for the pictures (PNG) and the page (HTML).")
    ] = Path("alignment"),
    teacher: Teacher = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Draw how the tokens of a sample align between student and teacher.

    Shows the cross-model attention, the band around it, and the expected soft-DTW paths of the
    hidden states and of the embeddings, each student token against each teacher token. Loads both
    models as training would, and trains nothing.
    """
    from dwakd_cli.align import run

    run(
        recipe,
        teacher=teacher,
        samples=sample or [],
        checkpoint=checkpoint,
        before=before,
        tokens=tokens,
        output=output,
        json_output=json_output,
    )


@app.command(
    epilog="Example:  dwakd export outputs/sft my-student --dtype bfloat16",
)
def export(
    run: Annotated[Path, typer.Argument(help="A run's output folder, or a checkpoint.")],
    dest: Annotated[Path, typer.Argument(help="The new folder.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            metavar="NAME",
            help="Precision of the weights: float32, bfloat16, float16, or auto: as they are.",
        ),
    ] = "auto",
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Export a LoRA adapter without merging it.")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(help="The adapter's base model, where it is not at its recorded place."),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of weights, as in 5GB.")] = "5GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the models' repositories run code.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model at DEST.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Then upload it to this hub repository; needs `hf auth login`."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a repository that is created public.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Export the student of a run: weights, tokenizer and model card, and nothing else.

    RUN is a run's output folder or one of its checkpoints. A LoRA adapter is merged into its base
    model unless --keep-adapter. The new folder is read back in a process of its own and compared
    with the run's student before it appears at DEST; on any error nothing is left there.

    Computes in float32 on the CPU, which takes 4 bytes of memory a parameter.

    Exit codes: 0 the student is at DEST, and on the hub where that was asked for; 1 an error.
    """
    from dwakd_cli.export import run as run_export

    run_export(
        run,
        dest,
        dtype=dtype,
        keep_adapter=keep_adapter,
        base_model=base_model,
        shard_size=shard_size,
        trust_remote_code=trust_remote_code,
        force=force,
        push_to=push_to_hub,
        private=not public,
        json_output=json_output,
    )


@app.command(
    epilog="Example:  dwakd evaluate outputs/dwakd test.jsonl --against outputs/sft",
)
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
        typer.Option(metavar="NAME", help="transformers, or vllm for the answers (untested)."),
    ] = "transformers",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the models' repositories run code.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "--out", help="Folder for report, picture and answers.")
    ] = Path("evaluation"),
    force: Annotated[
        bool, typer.Option("--force", help="Make all answers again, and replace those there.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
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
    from dwakd_cli.evaluate import run

    run(
        model,
        data,
        against=against or [],
        teacher=teacher,
        metrics=metrics,
        seeds=seeds,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        limit=limit,
        prompt_template=prompt_template,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        load_in_8bit=load_in_8bit,
        teacher_in_8bit=teacher_in_8bit,
        backend=backend,
        trust_remote_code=trust_remote_code,
        output=output,
        force=force,
        json_output=json_output,
    )


recipes_app = typer.Typer(help="The recipes that come with dwakd.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.command("list", epilog="Example:  dwakd recipes list --json")
def recipes_list(
    json_output: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the recipes: what each is for, its student and its teacher."""
    from dwakd_cli.recipes import list_recipes

    list_recipes(json_output=json_output)


@recipes_app.command("show", epilog="Example:  dwakd recipes show quickstart-dwakd")
def recipes_show(name: Annotated[str, typer.Argument(help="As in `dwakd recipes list`.")]) -> None:
    """Print a recipe."""
    from dwakd_cli.recipes import show

    show(name)


@recipes_app.command("copy", epilog="Example:  dwakd recipes copy quickstart-dwakd my-recipe.yml")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="As in `dwakd recipes list`.")],
    dest: Annotated[Path | None, typer.Argument(help="File or folder; default: here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Copy a recipe, to make it yours."""
    from dwakd_cli.recipes import copy

    typer.echo(copy(name, dest, force=force))


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 an error with a message, 130 interrupted."""
    from dwakd_cli.terminal import writable

    with writable(), error_boundary():
        app(prog_name="dwakd")


@contextmanager
def error_boundary() -> Iterator[None]:
    """Ends the process with a message and an exit code where a user can put the error right."""
    try:
        yield
    except (UserError, OSError) as error:
        # Of the file system's own errors those that name a file: too long a name, no permission.
        if "--debug" in sys.argv or (isinstance(error, OSError) and error.filename is None):
            raise
        if isinstance(error, OSError):
            error = UserError(f"{error.filename}: {error.strerror}.")
        from dwakd_cli.console import PlainConsole

        # Unbroken lines: a command in a message can be copied.
        PlainConsole(stderr=True).print(f"Error: {error}", style="red", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
