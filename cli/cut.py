"""`dwakd cut`: a student out of a real model, with fewer layers, another tokenizer, or both."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dwakd_cli.console import PlainConsole
from dwakd_cli.options import JsonReport, TrustModels
from dwakd_cli.terminal import progress_bar
from dwakd_plugin.errors import UserError

if TYPE_CHECKING:
    from dwakd_plugin.data.passages import Passages
    from dwakd_plugin.models.cutting import Choice

RECORD, PICTURE = "dwakd_cut.json", "layers.png"
WINDOW, BATCH_TOKENS = 256, 2048
PASSAGE_CHARACTERS = 1000
_BAR = 28


def cut(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model.")],
    dest: Annotated[Path, typer.Argument(help="New folder for the student.")],
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="How many layers stay; the least go.")
    ] = None,
    keep_layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Exactly these, as in 0-3,5,29.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Goes under the model; or a hub id.")
    ] = None,
    train_tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="TEXTS", help="Train one on this file, as --texts, and take it."),
    ] = None,
    vocabulary: Annotated[
        int, typer.Option(metavar="N", help="Tokens of the one that is trained, from 512.")
    ] = 8192,
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="To measure on: one a line, or JSONL with text, output or messages. Default: "
            "Python's own documentation.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens to choose layers on, from 16.")
    ] = 2048,
    device: Annotated[str, typer.Option(help="As cpu or cuda:1; auto: the GPU, if any.")] = "auto",
    trust_remote_code: TrustModels = False,
    json_output: JsonReport = False,
) -> None:
    """Cut a student out of a real model: fewer layers, another tokenizer, or both.

    Leaves out the layers that change least what goes through them on texts, and makes the embedding
    and head rows of new tokens from those of the tokens that spell them. Reports bits per byte of
    held-out texts before and after each step. DEST is a folder that transformers loads.

    Exit codes: 0 written; 1 an error, and nothing is written.
    """
    from dwakd_plugin.io.folders import new_folder, refuse_content

    started = time.monotonic()
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    refuse_content(dest)
    if layers is None and keep_layers is None and tokenizer is None and train_tokenizer is None:
        raise UserError(
            "Nothing to do: say how many layers stay (--layers), or which tokenizer goes under the "
            "model (--tokenizer, --train-tokenizer), or both."
        )
    if tokenizer and train_tokenizer:
        raise UserError("Give --tokenizer or --train-tokenizer, not both.")
    for name, count, least in (("vocabulary", vocabulary, 512), ("tokens", tokens, 16)):
        if count < least:
            raise UserError(f"--{name} {count}: give a number from {least}.")
    console = PlainConsole(stderr=json_output)
    with console.status("Loading"):
        from dwakd_plugin.evaluate import model as models
        from dwakd_plugin.io.files import explaining_writes, replace_file
        from dwakd_plugin.models import cutting
        from dwakd_plugin.models.new_vocabulary import replace_vocabulary
        from dwakd_plugin.tokenizers.loading import load_tokenizer
        from dwakd_plugin.tokenizers.respelling import spellings

        held = models.Held(device, trust_remote_code=trust_remote_code)
        source = models.find_model(model)
        config = models.load_config(source, trust_remote_code=trust_remote_code)
        there = cutting.layer_count(config)
        kept = kept_of(keep_layers, layers, there)
        old = load_tokenizer(
            source.tokenizer,
            f"The tokenizer of `{model}`",
            end_remedy="Set its eos_token in tokenizer_config.json.",
            trust_remote_code=trust_remote_code,
        )
        new = _new_tokenizer(tokenizer, train_tokenizer, vocabulary, old, trust_remote_code)
        spelled = None if new is None else spellings(new, old)
        passages = _passages(texts, models.most_positions(config))
        student = models.load_model(source, config, held)
    report: dict[str, Any] = {
        "model": model,
        "destination": str(dest),
        "layers": there,
        "texts_from": "built-in sample" if texts is None else str(texts),
        "held_out_passages": len(passages.held_out),
        "parameters_before": student.num_parameters(),
        "influence": None,
        "choices": [],
        "tokenizer": None if spelled is None else _spelled(spelled),
    }
    stages: dict[str, float] = {}
    with progress_bar(console, "{task.description:<40}", "{task.percentage:>3.0f}%") as progress:

        def bits(title: str, its_model: Any, its_tokenizer: Any) -> None:
            task = progress.add_task(f"Bits per byte, {title}")
            stages[title] = _bits_per_byte(
                its_model,
                its_tokenizer,
                passages.held_out,
                lambda done, total: progress.update(task, completed=done, total=total),
            )

        bits("as it is", student, old)
        if kept is None:
            readers = _readers(student, old, passages, tokens)
            readings = len(readers) * cutting.readings(there, layers or there)
            task = progress.add_task("Which layers matter least", total=readings)
            influence, choices = cutting.choices(
                readers, there, layers or there, lambda: progress.advance(task)
            )
            del readers
            kept = _kept_by(_best(choices), there)
            report["influence"] = influence
            report["choices"] = [choice._asdict() for choice in choices]
        if len(kept) < there:
            cutting.keep_layers(student, kept)
            if spelled is not None:
                bits(_layers(kept), student, old)
        if spelled is not None:
            replace_vocabulary(student, spelled, len(old))
        report |= {"kept": kept, "parameters": student.num_parameters()}
        with new_folder(dest) as folder:
            with explaining_writes(dest, "Free some space, or choose another folder."):
                save_student(student, source, config, (old, new or old), folder)
            del student
            # What is written is what is measured: in its own precision, as anyone will load it.
            written = models.find_model(str(folder))
            loaded = models.load_config(written, trust_remote_code=trust_remote_code)
            final = _layers(kept) if len(kept) < there else "all layers"
            final += "" if spelled is None else ", new tokenizer"
            bits(final, models.load_model(written, loaded, held), new or old)
            report["bits_per_byte"] = stages
            report["seconds"] = round(time.monotonic() - started, 1)
            with explaining_writes(dest, "Free some space, or choose another folder."):
                replace_file(folder / RECORD, json.dumps(report, indent=1))
                if report["choices"]:
                    replace_file(folder / PICTURE, picture(report))
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        show(report, console)


# What is wanted -------------------------------------------------------------------------------


def kept_of(named: str | None, wanted: int | None, layers: int) -> list[int] | None:
    """The layers that stay; None where they are to be chosen.

    Raises UserError for layers that are not there, or more than there are.
    """
    there = f"The model has {layers} layers, 0 to {layers - 1}"
    if named is None:
        if wanted is not None and not 1 <= wanted <= layers:
            raise UserError(f"--layers {wanted}: {there}. Keep between 1 and {layers}.")
        return list(range(layers)) if wanted in (None, layers) else None
    kept: set[int] = set()
    for part in named.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UserError(
                f"--keep-layers {named}: `{part}` isn't a layer. Write it like 0-3,5,29."
            )
        if int(last or first) >= layers:
            raise UserError(f"--keep-layers {named}: {there}.")
        kept |= set(range(int(first), int(last or first) + 1))
    if not kept:
        raise UserError(f"--keep-layers {named} names no layer. Write it like 0-3,5,29.")
    if wanted is not None and wanted != len(kept):
        raise UserError(
            f"--keep-layers names {len(kept)} layers and --layers says {wanted}. Leave --layers "
            "out."
        )
    return sorted(kept)


def _new_tokenizer(
    name: str | None, texts: Path | None, vocabulary: int, old: Any, trust_remote_code: bool
) -> Any:
    """The student's tokenizer, loaded or trained; None where the model keeps its own."""
    if texts is not None:
        from dwakd_plugin.tokenizers.texts import read_texts
        from dwakd_plugin.tokenizers.training import train_tokenizer

        return train_tokenizer(read_texts(texts), vocabulary, like=old)
    if name is None:
        return None
    from dwakd_plugin.tokenizers.side import load_side

    tokenizer = load_side("student", name, trust_remote_code).tokenizer
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The student's tokenizer {name} has no end-of-text token (eos_token), so nothing "
            "would end an answer. Set one in its tokenizer_config.json."
        )
    return tokenizer


def _passages(file: Path | None, positions: int | None) -> Passages:
    from dwakd_plugin.data.library_docs import documentation_rows
    from dwakd_plugin.data.passages import passages
    from dwakd_plugin.tokenizers.texts import read_texts

    texts = documentation_rows().pretraining_texts if file is None else read_texts(file)
    # A token holds at least a byte, and a character at most four: no passage is too long.
    return passages(texts, min(PASSAGE_CHARACTERS, ((positions or 10**9) - 1) // 4))


# The work -------------------------------------------------------------------------------------


def _bits_per_byte(
    model: Any, tokenizer: Any, texts: Sequence[str], on_text: Callable[[int, int], None]
) -> float:
    """Bits of all tokens of the texts, each after the start of a text, over their bytes."""
    from dwakd_plugin.data.passages import plain_ids, start_of
    from dwakd_plugin.evaluate.figures import bits_per_byte, read

    start = [start_of(tokenizer)]
    rows = [(start, plain_ids(tokenizer, text)) for text in texts]
    readings = read(model, rows, None, BATCH_TOKENS, progress=on_text)
    return round(bits_per_byte(readings, texts).value, 4)


def _readers(model: Any, tokenizer: Any, passages: Passages, tokens: int) -> list[Any]:
    from dwakd_plugin.data.passages import windows
    from dwakd_plugin.models.cutting import Reader

    ids = windows(tokenizer, passages.choosing, WINDOW, tokens).to(model.device)
    return [Reader(model, rows) for rows in ids.split(BATCH_TOKENS // WINDOW)]


def _best(choices: Sequence[Choice]) -> Choice:
    return min(choices, key=lambda choice: choice.loss)


def _kept_by(choice: Choice, layers: int) -> list[int]:
    return [index for index in range(layers) if index not in choice.left_out]


def _spelled(spelled: list[list[int]]) -> dict[str, int]:
    return {
        "tokens": len(spelled),
        "exact": sum(len(ids) == 1 for ids in spelled),
        "averaged": sum(len(ids) > 1 for ids in spelled),
        "without_counterpart": sum(not ids for ids in spelled),
    }


def save_student(
    model: Any, source: Any, config: Any, tokenizers: tuple[Any, Any], folder: Path
) -> None:
    """Weights in the precision that the model is stored in, tokenizer, and how it generates."""
    import torch
    from transformers import GenerationConfig

    from dwakd_plugin.evaluate.model import stop_ids
    from dwakd_plugin.tokenizers.respelling import ends_like

    old, new = tokenizers
    try:
        generation = GenerationConfig.from_pretrained(source.weights)
    except OSError:  # many models have none
        generation = GenerationConfig()
    if new is not old:
        ends = ends_like(new, old, stop_ids(source, old))
        ids = {"bos_token_id": new.bos_token_id, "pad_token_id": new.pad_token_id}
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        settings = {key: value for key, value in generation.to_dict().items() if "token" not in key}
        generation = GenerationConfig(**settings, **ids)
        for key in ids:
            setattr(model.config, key, getattr(new, key))
    model.generation_config = generation
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model.to(dtype).save_pretrained(folder)
    new.save_pretrained(folder)


# The report -----------------------------------------------------------------------------------


def _layers(kept: Sequence[int]) -> str:
    return f"{len(kept)} layer" + ("" if len(kept) == 1 else "s")


def ranges(kept: Sequence[int]) -> str:
    """Layers as --keep-layers takes them.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs = [
        [index for _, index in run]
        for _, run in groupby(enumerate(kept), key=lambda pair: pair[1] - pair[0])
    ]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def show(report: dict[str, Any], console: PlainConsole) -> None:
    """Each layer's influence and whether it stays, how that was chosen; bits per byte by step."""
    if (influence := report["influence"]) is not None:
        table = Table(title="Layers, and how much they change what goes through them", box=None)
        table.add_column("layer", justify="right")
        table.add_column("1 − cos", justify="right")
        table.add_column()
        table.add_column()
        for index, value in enumerate(influence):
            bar = "━" * round(_BAR * value / (max(influence) or 1.0))
            went = "" if index in report["kept"] else "left out"
            table.add_row(str(index), f"{value:.3f}", bar, went)
        console.print(table)
        table = Table(title="Two ways to measure; the lower loss is taken")
        table.add_column("measured")
        table.add_column("layers kept")
        table.add_column("nats a token", justify="right")
        for choice in report["choices"]:
            kept = [index for index in range(report["layers"]) if index not in choice["left_out"]]
            table.add_row(choice["way"], ranges(kept), f"{choice['loss']:.3f}")
        console.print(table)
    console.print(f"Layers kept: {ranges(report['kept'])}")
    if (spelled := report["tokenizer"]) is not None:
        console.print(
            f"Tokens: {spelled['tokens']:,}; {spelled['exact']:,} have a row of the model's own, "
            f"{spelled['averaged']:,} the mean of several, {spelled['without_counterpart']:,} the "
            "mean of all."
        )
    table = Table(title=f"{report['held_out_passages']} passages of the {report['texts_from']}")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    for title, bits in report["bits_per_byte"].items():
        table.add_row(title, f"{bits:.3f}")
    console.print(table)
    console.print(
        f"{report['parameters_before'] / 1e6:,.1f}M parameters before, "
        f"{report['parameters'] / 1e6:,.1f}M now, in {report['destination']}. "
        f"{report['seconds']:.0f} s."
    )


def picture(report: dict[str, Any]) -> bytes:
    """A PNG: how much each layer changes its input and whether it stays; bits per byte by step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (bars, steps) = pyplot.subplots(
        1, 2, figsize=(10, 3.6), width_ratios=(3, 1), layout="constrained"
    )
    influence, bits = report["influence"], report["bits_per_byte"]
    colours = ["tab:blue" if i in report["kept"] else "tab:orange" for i in range(len(influence))]
    bars.bar(range(len(influence)), influence, color=colours)
    bars.set_title("1 − cos of what goes in and comes out (orange: left out)", fontsize=9)
    bars.set_xlabel("layer")
    steps.bar(range(len(bits)), list(bits.values()))
    names = [name.replace(", ", ",\n") for name in bits]
    steps.set_xticks(range(len(bits)), names, fontsize=7)
    steps.set_title("bits per byte", fontsize=9)
    for axes in (bars, steps):
        axes.grid(axis="y", linestyle=":")
    image = BytesIO()
    figure.savefig(image, format="png", dpi=130)
    pyplot.close(figure)
    return image.getvalue()
