"""`dwakd align`: how a sample's tokens align, before training or after."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import JsonReport, RecipeFile, Teacher
from dwakd_cli.without_packages import without_packages
from dwakd_plugin.errors import UserError

if TYPE_CHECKING:
    from dwakd_cli.alignment_picture import AlignedSample
    from dwakd_plugin.recipe import Recipe

BEFORE = "before training"
PAGE = "alignment.html"


def align(
    recipe: RecipeFile,
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
    json_output: JsonReport = False,
) -> None:
    """Draw how the tokens of a sample align between student and teacher.

    Shows the cross-model attention, the band around it, and the expected soft-DTW paths of the
    hidden states and of the embeddings, each student token against each teacher token. Loads both
    models as training would, and trains nothing.
    """

    # The libraries' own warnings: a user couldn't put anything right in them.
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TRL_EXPERIMENTAL_SILENCE": "1"}
    console = PlainConsole(stderr=json_output)
    from dwakd_plugin.recipe import Recipe

    given = {} if teacher is None else {"base_model": teacher}
    read = Recipe.read(recipe, given)
    read.check_one_teacher("dwakd align")
    read = without_an_empty_cache(read)
    config = read.config
    from dwakd_plugin.loss import trained_projectors

    if not trained_projectors(config.loss):
        raise UserError(
            f"The loss of this recipe (variant `{config.variant}`) has neither attention nor "
            "projectors, so there is nothing to draw. Use a variant that attends (paper, dskd) or "
            "projects paired tokens (dskdv2)."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)  # before models are loaded for nothing
    except OSError as error:
        raise UserError(f"The folder {output} cannot be made: {error.strerror}") from error
    for change in read.changes:
        console.print(change, style="yellow")
    states: dict[str, Path | None] = {}
    if before or checkpoint is None:
        states[BEFORE] = None
    if checkpoint is not None:
        states[checkpoint.resolve().name] = checkpoint
    numbers = list(dict.fromkeys(sample or [])) or [1]
    # For drafts by an assistant: no answer is generated here. A model's own code may need it.
    trusts_code = config.teacher.trust_remote_code or bool(read.keys.get("trust_remote_code"))
    unneeded = () if trusts_code else ("sklearn",)
    facts: dict[str, Any] = {}
    aligned: list[AlignedSample] = []
    for state, folder in states.items():
        with console.status(Text(f"Loading both models: {state}")), without_packages(unneeded):
            facts, found = align_samples(read, folder, numbers, state)
        aligned = [
            replace(one, states=earlier.states | one.states)
            for earlier, one in zip(aligned or found, found, strict=True)
        ]
    report = write(output, facts, aligned, tokens)
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        show(report, aligned, tokens, console)


def without_an_empty_cache(recipe: Recipe) -> Recipe:
    """The recipe without a teacher cache that is yet to be filled: it would be, with every row."""
    from dwakd_plugin.models.teacher.cache import INDEX

    cache = recipe.config.teacher.cache
    if cache is None or (Path(cache) / INDEX).is_file():
        return recipe
    return recipe.with_teacher(cache=None)


def align_samples(
    recipe: Recipe, checkpoint: Path | None, numbers: Sequence[int], state: str
) -> tuple[dict[str, Any], list[AlignedSample]]:
    """Who and with which γ, and the samples as they align in one state.

    Samples are numbered from 1 in the evaluation set, or in the training set where there is none.
    γ is that of training's end, in every state, so that states compare.
    """
    from dwakd_cli.alignment_picture import AlignedSample, token_texts
    from dwakd_plugin.train.open_run import open_run

    with open_run(recipe, checkpoint) as opened:
        # axolotl is imported by now, and quietly so.
        from dwakd_plugin.data.dual_tokenization import SOURCE_COLUMN
        from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
        from dwakd_plugin.loss import Alignment, alignment_of
        from dwakd_plugin.train.warmup import both_sides

        trainer, distillation = opened.trainer, opened.distillation
        soft_dtw = opened.config.soft_dtw
        held_out = trainer.eval_dataset is not None
        dataset = trainer.eval_dataset if held_out else trainer.train_dataset
        name = "evaluation" if held_out else "training"
        teacher_tokenizer = load_teacher_tokenizer(opened.config.teacher)
        trainer.model.eval()
        found = []
        for number in numbers:
            if not 1 <= number <= len(dataset):
                raise UserError(
                    f"--sample {number}: the {name} set has {len(dataset)} samples. Give a number "
                    f"from 1 to {len(dataset)}."
                )
            row = dataset[number - 1]
            inputs = trainer.data_collator([row])
            student, teacher = both_sides(trainer.model, distillation.teacher, inputs)
            if min(int(student.lengths), int(teacher.lengths)) == 0:
                raise UserError(
                    f"--sample {number} has no response token for one of the models, so nothing "
                    "aligns. Choose another."
                )
            alignment = alignment_of(
                student,
                teacher,
                distillation.projectors,
                soft_dtw=soft_dtw,
                gamma=soft_dtw.gamma_end,
            )
            if not bool(
                alignment.attention.isfinite().all() & alignment.hidden_path.isfinite().all()
            ):
                raise UserError(
                    f"The alignment of sample {number} ({state}) is not finite: a model or the "
                    "projectors hold NaN or infinity."
                )
            matrices = {
                key: None if value is None else value[0].cpu()
                for key, value in vars(alignment).items()
            }
            found.append(
                AlignedSample(
                    number=number,
                    source=f"{name} set, {distillation.rows.locate(int(row[SOURCE_COLUMN]))}",
                    student_tokens=token_texts(
                        trainer.processing_class, _response(row["input_ids"], row["labels"])
                    ),
                    teacher_tokens=token_texts(
                        teacher_tokenizer,
                        _response(row["teacher_input_ids"], row["teacher_labels"]),
                    ),
                    states={state: Alignment(**matrices)},
                )
            )
        facts = {
            "student": recipe.base_model,
            "teacher": distillation.pair["teacher"],
            "gamma": soft_dtw.gamma_end,
            "samples_in_set": len(dataset),
        }
        return facts, found


def _response(ids: Any, labels: Any) -> list[int]:
    """The tokens that are predicted at response positions, in order."""
    return [int(token) for token, label in zip(ids[1:], labels[1:], strict=True) if label != -100]


def write(
    output: Path, facts: dict[str, Any], samples: Sequence[AlignedSample], tokens: int
) -> dict[str, Any]:
    """Writes the pictures; returns what `--json` prints."""
    from dwakd_cli.alignment_picture import (
        html_page,
        png_image,
        state_figures,
        token_summaries,
    )
    from dwakd_plugin.io.files import explaining_writes, replace_file

    drawn = [(sample, png_image(sample, tokens)) for sample in samples]
    files = {sample.number: output / f"sample-{sample.number}.png" for sample in samples}
    with explaining_writes(output):
        for sample, image in drawn:
            replace_file(files[sample.number], image)
        replace_file(output / PAGE, html_page(facts, drawn, tokens))
    return {
        **facts,
        "samples": [
            {
                "sample": sample.number,
                "source": sample.source,
                "student_tokens": len(sample.student_tokens),
                "teacher_tokens": len(sample.teacher_tokens),
                "png": str(files[sample.number]),
                "states": {
                    state: {
                        **state_figures(alignment),
                        "tokens": token_summaries(sample, alignment, 3),
                    }
                    for state, alignment in sample.states.items()
                },
            }
            for sample in samples
        ],
        "html": str(output / PAGE),
    }


def show(
    report: dict[str, Any], samples: Sequence[AlignedSample], tokens: int, console: PlainConsole
) -> None:
    from dwakd_cli.alignment_picture import terminal_table, what_is_drawn

    for sample, reported in zip(samples, report["samples"], strict=True):
        console.print(terminal_table(sample, tokens, console.width))
        console.print(f"Drawn: {what_is_drawn(sample, tokens)}")
        for state, figures in reported["states"].items():
            words = f"{state}: attention entropy {figures['attention_entropy']:.2f} nats"
            if figures["band_share"] is not None:
                words += (
                    f"; the band has {figures['band_share']:.0%} of the cells and "
                    f"{figures['hidden_path_in_band']:.0%} of the hidden states' path"
                )
            console.print(words)
        console.print()
    console.print("Pictures", *(sample["png"] for sample in report["samples"]))
    console.print(f"Page {report['html']}")
