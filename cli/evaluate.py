"""`dwakd evaluate`: how good a student is, by sampled answers, by its loss, and by its teacher."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.text import Text

from dwakd_cli.console import PlainConsole
from dwakd_cli.terminal import progress_bar
from dwakd_cli.train import read_recipe, with_distillation
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes, replace_file, user_path

if TYPE_CHECKING:
    from dwakd_plugin.evaluate.figures import Amounts, Reading
    from dwakd_plugin.evaluate.generation import Sampling
    from dwakd_plugin.evaluate.model import Held, Source
    from dwakd_plugin.evaluate.responses import Response
    from dwakd_plugin.evaluate.rows import Encoded

METRICS = ("rouge_l", "bits_per_byte", "agreement", "structure")
OF_TEACHER = METRICS[2:]
REPORT, PICTURE = "report.json", "evaluation.png"
# Rows generated at once, where --batch-size is auto; halved where a GPU's memory runs out.
BATCH_GPU, BATCH_CPU, BATCH_VLLM = 64, 8, 256
_SHOWN_PROMPT = 1200  # characters


@dataclass(frozen=True)
class Options:
    """What the command line asks for, beside models and data."""

    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    batch_size: int | None  # None: auto
    backend: str
    output: Path


@dataclass
class Model:
    """A model to evaluate, the rows as it reads them, and what came of it."""

    source: Source
    role: str  # model, against or teacher
    tokenizer: Any
    config: Any
    stop: list[int]
    held: Held
    name: str = ""
    rows: list[Encoded] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the rows, in the data
    readings: list[Reading] | None = None
    responses: list[list[Response]] | None = None  # [seed][row]
    facts: dict[str, Any] = field(default_factory=dict)


def run(
    model: str,
    data: Path,
    *,
    against: list[str],
    teacher: str | None,
    metrics: str | None,
    seeds: str,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    limit: int | None,
    prompt_template: str,
    batch_size: str,
    device: str,
    dtype: str,
    load_in_8bit: bool,
    teacher_in_8bit: bool,
    backend: str,
    trust_remote_code: bool,
    output: Path,
    force: bool,
    json_output: bool,
) -> None:
    """Evaluates, writes the results into `output`, and reports. Raises UserError."""
    started = time.monotonic()
    chosen = read_metrics(metrics, teacher)
    numbers = read_seeds(seeds)
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

        from dwakd_plugin.evaluate.generation import Sampling
        from dwakd_plugin.evaluate.model import Held

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        options = Options(
            chosen,
            numbers,
            Sampling(temperature, top_p, max_new_tokens),
            size,
            backend,
            output,
        )
        held = Held(device, dtype, load_in_8bit, trust_remote_code)
        models = open_models(model, against, teacher, held, teacher_in_8bit)
        references, facts = read_data(data, models, prompt_template, limit)
        references, facts["rows_left_out"] = keep_what_fits(models, references)
        facts["rows"] = len(references)
    _show_prompt(models[0], facts, console)
    stores = _stores(models, options, force=force)
    with _words_when_stopped(options, console), _progress(console) as begin:
        evaluate(models, references, options, stores, begin)
        report = {
            **facts,
            "seeds": list(options.seeds),
            "sampling": asdict(options.sampling),
            "backend": backend,
            "output": str(output),
            **figures(models, references, options, begin),
        }
    report["seconds"] = round(time.monotonic() - started, 1)
    from dwakd_cli.evaluation_report import picture, show

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
    """The metrics of a list with commas; by default all that can be had."""
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


# Models and data ----------------------------------------------------------------------------


def open_models(
    model: str, against: list[str], teacher: str | None, held: Held, teacher_in_8bit: bool
) -> list[Model]:
    """All models with tokenizer and config, no weights: the first, those against, the teacher."""
    from dwakd_plugin.evaluate.model import (
        choose_device,
        find_model,
        load_config,
        stop_ids,
    )
    from dwakd_plugin.tokenizers.loading import load_tokenizer

    choose_device(held.device)
    names = [model, *against, *([teacher] if teacher else [])]
    roles = ["model", *["against"] * len(against), *(["teacher"] if teacher else [])]
    places = [_place(name) for name in names]
    for index, place in enumerate(places):
        if place in places[:index]:
            what = "the teacher" if roles[index] == "teacher" else "--against"
            raise UserError(
                f"`{names[index]}` is given twice, as {what} too: there is nothing to compare."
            )
    models = []
    for name, role in zip(names, roles, strict=True):
        source = find_model(name)
        tokenizer = load_tokenizer(
            source.tokenizer,
            f"The tokenizer of `{name}`",
            "Give a folder with tokenizer files.",
            end_remedy="Set `eos_token` in its tokenizer_config.json.",
            trust_remote_code=held.trust_remote_code,
        )
        config = load_config(source, trust_remote_code=held.trust_remote_code)
        own = replace(held, load_in_8bit=teacher_in_8bit) if role == "teacher" else held
        stop = stop_ids(source, tokenizer)
        models.append(Model(source, role, tokenizer, config, stop, own))
    for one, name in zip(models, short_names(names), strict=True):
        one.name = name
    return models


def _place(name: str) -> str:
    folder = user_path(name)
    return str(folder.resolve()) if folder.is_dir() else name


def short_names(names: Sequence[str]) -> list[str]:
    """As few last parts of each path as tell them apart."""
    for parts in range(1, max(name.count("/") for name in names) + 2):
        short = ["/".join(name.rstrip("/").split("/")[-parts:]) for name in names]
        if len(set(short)) == len(names):
            return short
    return list(names)


def read_data(
    data: Path, models: list[Model], prompt_template: str, limit: int | None
) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """References of each row, and what is said of the data; each model gets its rows."""
    from dwakd_plugin.evaluate.rows import choose_format, encode, end_of_turn, read_rows

    if data.suffix.lower() in (".yml", ".yaml"):
        if prompt_template != "auto":
            raise UserError("A recipe renders its own prompts. Leave --prompt-template out.")
        references = _read_recipe(data, models)
        kind, why = "recipe", "as axolotl renders the recipe's rows"
    else:
        if data.is_dir():
            raise UserError(f"The data `{data}` is a folder; give a JSONL file or a recipe.")
        rows = read_rows(data)[:limit]
        form = choose_format(prompt_template, rows, models[0].source, models[0].tokenizer)
        for one in models:
            if form.kind == "chat" and not one.tokenizer.chat_template:
                one.tokenizer.chat_template = models[0].tokenizer.chat_template
            if form.kind == "chat":
                one.stop = sorted({*one.stop, *end_of_turn(one.tokenizer)})
            one.rows = [encode(row, form, one.tokenizer, one.stop) for row in rows]
        references = [row.references for row in rows]
        kind, why = form.kind, form.why
    for one in models:
        one.rows = one.rows[:limit]
        # Where a recipe ends its responses otherwise, that is where they end.
        one.stop = sorted({*one.stop, *(row.response[-1] for row in one.rows)})
    return references[:limit], {
        "data": str(data),
        "prompt_template": {"kind": kind, "why": why},
    }


def _read_recipe(file: Path, models: list[Model]) -> list[tuple[str, ...]]:
    from dwakd_plugin.evaluate.rows import recipe_rows

    first = models[0]
    # Students of one tokenizer share their rows: both sides of a recipe are tokenised for nothing.
    alike = [
        one.role != "teacher"
        and one.tokenizer.get_vocab() == first.tokenizer.get_vocab()
        and one.tokenizer.chat_template == first.tokenizer.chat_template
        for one in models
    ]
    alike[0] = True
    others = [one for one, same in zip(models, alike, strict=True) if not same]
    recipe = read_recipe(file)
    if "dwakd" in recipe:
        recipe, _ = with_distillation(recipe, {})
    texts, encoded = recipe_rows(
        recipe,
        [(one.source, one.tokenizer, one.stop) for one in [first, *others]],
    )
    for one, same in zip(models, alike, strict=True):
        one.rows = encoded[0] if same else encoded[1 + others.index(one)]
    return [(text,) for text in texts]


def keep_what_fits(
    models: list[Model], references: list[tuple[str, ...]]
) -> tuple[list[tuple[str, ...]], int]:
    """Leaves out, for all models, rows that are longer than the positions of one of them.

    Returns the references that stay, and how many rows do not. Raises UserError where none stays.
    """
    from dwakd_plugin.evaluate.model import most_positions

    kept = list(range(len(references)))
    for one in models:
        positions = most_positions(one.config)
        if positions is not None:
            kept = [row for row in kept if sum(map(len, one.rows[row])) <= positions]
        if not kept:
            raise UserError(
                f"No row fits into the {positions} positions of `{one.source.name}`, prompt and "
                "reference together."
            )
    for one in models:
        one.rows, one.numbers = [one.rows[row] for row in kept], kept
    return [references[row] for row in kept], len(references) - len(kept)


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


# The work -----------------------------------------------------------------------------------


def _stores(models: list[Model], options: Options, *, force: bool) -> dict[str, Any]:
    """Where each student's responses are kept; those of other models or settings are refused."""
    if "rouge_l" not in options.metrics:
        return {}
    from dwakd_plugin.evaluate.model import identity
    from dwakd_plugin.evaluate.responses import ResponseStore, discard

    stores = {}
    for one in models:
        if one.role == "teacher":
            continue
        place = _place(one.source.name)
        slug = re.sub(r"[^\w.-]+", "-", one.name).strip("-.")
        file = options.output / (
            f"responses-{slug}-{hashlib.sha256(place.encode()).hexdigest()[:6]}.jsonl"
        )
        if force:
            discard(file)
        stores[one.name] = ResponseStore(
            file,
            identity(one.source, one.config, one.held)
            | asdict(options.sampling)
            | {"stop": one.stop, "backend": options.backend},
        )
    return stores


Begin = Callable[[str], Callable[[int, int], None]]


def evaluate(
    models: list[Model],
    references: list[tuple[str, ...]],
    options: Options,
    stores: dict[str, Any],
    begin: Begin,
) -> None:
    """Loads one model after the other; each reads the references and answers the prompts."""
    from dwakd_plugin.evaluate.figures import read, symbols_of
    from dwakd_plugin.evaluate.model import load_model
    from dwakd_plugin.evaluate.rows import bytes_of_tokens
    from dwakd_plugin.models.causal_lm import causal_lm, output_head, parameter_count, short_dtype

    compares = any(name in options.metrics for name in OF_TEACHER)
    reads = compares or "bits_per_byte" in options.metrics
    for one in models:
        store = stores.get(one.name)
        if store is not None and options.backend == "vllm":
            _respond_with_vllm(one, options, store, begin)
        begin(f"Loading {one.name}")
        model = load_model(one.source, one.config, one.held)
        one.facts = {
            "parameters": parameter_count(causal_lm(model)),
            "precision": "8 bit" if one.held.load_in_8bit else short_dtype(causal_lm(model).dtype),
            "device": str(model.device),
        }
        if reads:
            symbols = None
            if compares:
                table = bytes_of_tokens(one.tokenizer)
                symbols = symbols_of(table, one.stop, output_head(model).weight.shape[0])
            one.readings = read(
                model, one.rows, symbols, progress=begin(f"{one.name} reads (rows)")
            )
        if store is not None and options.backend != "vllm":
            _respond(one, model, options, store, begin)
        if one.role == "teacher" and "rouge_l" in options.metrics:
            for student in models[:-1]:
                _read_samples(one, model, student, begin)
        del model


def _respond(one: Model, model: Any, options: Options, store: Any, begin: Begin) -> None:
    from dwakd_plugin.evaluate.generation import respond, with_transformers

    gpu = model.device.type != "cpu"
    one.responses = respond(
        store,
        with_transformers(model, options.sampling, one.stop),
        one.tokenizer,
        _prompts(one),
        _limits(one, options),
        options.seeds,
        one.stop,
        options.batch_size or (BATCH_GPU if gpu else BATCH_CPU),
        begin(f"{one.name} answers"),
    )


def _respond_with_vllm(one: Model, options: Options, store: Any, begin: Begin) -> None:
    from dwakd_plugin.evaluate.generation import respond, with_vllm

    prompts, limits = _prompts(one), _limits(one, options)
    longest = max(len(prompt) + limits[row] for row, prompt in prompts.items())
    with with_vllm(one.source, one.held, options.sampling, one.stop, longest) as generate:
        one.responses = respond(
            store,
            generate,
            one.tokenizer,
            prompts,
            limits,
            options.seeds,
            one.stop,
            options.batch_size or BATCH_VLLM,
            begin(f"{one.name} answers"),
        )


def _prompts(one: Model) -> dict[int, list[int]]:
    return {number: row.prompt for number, row in zip(one.numbers, one.rows, strict=True)}


def _limits(one: Model, options: Options) -> dict[int, int]:
    """The largest number of new tokens of each row: the model's positions end it too."""
    from dwakd_plugin.evaluate.model import most_positions

    positions, most = most_positions(one.config), options.sampling.max_new_tokens
    return {
        number: most if positions is None else min(most, positions - len(prompt))
        for number, prompt in _prompts(one).items()
    }


def _read_samples(teacher: Model, model: Any, student: Model, begin: Begin) -> None:
    """What the teacher makes of the student's responses under the first seed."""
    from dwakd_plugin.evaluate.figures import bits_per_byte, read
    from dwakd_plugin.evaluate.model import most_positions

    assert student.responses is not None
    positions = most_positions(teacher.config) or float("inf")
    rows, texts = [], []
    for row, response in zip(teacher.rows, student.responses[0], strict=True):
        ids = teacher.tokenizer(response.text, add_special_tokens=False)["input_ids"]
        if response.text and len(row.prompt) + len(ids) + 1 <= positions:
            rows.append((row.prompt, [*ids, row.response[-1]]))
            texts.append(response.text)
    if rows:
        readings = read(model, rows, progress=begin(f"{teacher.name} reads {student.name}'s"))
        # A response that was cut off has no end to pay for.
        student.facts["samples"] = bits_per_byte(readings, texts, end=False)


# Figures ------------------------------------------------------------------------------------


def figures(
    models: list[Model], references: list[tuple[str, ...]], options: Options, begin: Begin
) -> dict[str, Any]:
    """All figures of all models, and those of the first against the others."""
    from dwakd_plugin.evaluate.figures import (
        bits_per_byte,
        interval,
        mean_of,
        rouge_l,
        without_words,
    )

    texts = [each[0] for each in references]
    amounts: dict[str, dict[str, Amounts]] = {one.name: {} for one in models}
    entries = []
    for one in models:
        entry: dict[str, Any] = {
            "name": one.name,
            "source": one.source.name,
            "role": one.role,
            **{key: one.facts[key] for key in ("parameters", "precision", "device")},
        }
        if one.responses is not None:
            progress = begin(f"ROUGE-L of {one.name}")
            flat = [response.text for seed in one.responses for response in seed]
            scores = rouge_l(flat, references * len(one.responses), progress)
            entry |= _rouge(scores.reshape(len(one.responses), -1), one, options)
            amounts[one.name]["rouge_l"] = mean_of(
                scores.reshape(len(one.responses), -1).mean(axis=0)
            )
            entry["rouge_l"]["interval"] = interval(amounts[one.name]["rouge_l"])
        if one.readings is not None and "bits_per_byte" in options.metrics:
            whole = bits_per_byte(one.readings, texts)
            amounts[one.name]["bits_per_byte"] = whole
            entry["bits_per_byte"] = _with_interval(whole) | {
                "without_end": bits_per_byte(one.readings, texts, end=False).value,
                "tokens": sum(len(each.bits) for each in one.readings),
                "bytes": int(whole.below.sum()),
            }
        if models[-1].role == "teacher" and one.role != "teacher":
            entry["to_teacher"] = _to_teacher(one, models[-1], texts, options)
        entries.append(entry)
    first, *others = models
    paired = [
        {
            "model": first.name,
            "against": other.name,
            "metric": metric,
            "difference": mine.value - theirs.value,
            "interval": interval(mine, theirs),
        }
        for other in others
        if other.role == "against"
        for metric, mine in amounts[first.name].items()
        for theirs in [amounts[other.name][metric]]
    ]
    wordless = without_words(references) if "rouge_l" in options.metrics else 0
    return {"models": entries, "paired": paired, "references_without_words": wordless}


def _rouge(scores: Any, one: Model, options: Options) -> dict[str, Any]:
    """scores: (seeds, rows)."""
    assert one.responses is not None
    means = scores.mean(axis=1)
    all_responses = [response for seed in one.responses for response in seed]
    count = len(all_responses)
    return {
        "rouge_l": {
            "mean": float(means.mean()),
            "std": float(means.std(ddof=1)) if len(means) > 1 else None,
            "per_seed": {
                str(seed): float(mean) for seed, mean in zip(options.seeds, means, strict=True)
            },
        },
        "responses": {
            "mean_tokens": sum(each.tokens for each in all_responses) / count,
            "unfinished_share": sum(not each.ended for each in all_responses) / count,
            "empty_share": sum(not each.text.strip() for each in all_responses) / count,
        },
    }


def _to_teacher(
    one: Model, teacher: Model, texts: list[str], options: Options
) -> dict[str, Any] | None:
    """How near a student is to the teacher; None where their tokens cannot be compared."""
    from dwakd_plugin.evaluate.figures import nearness
    from dwakd_plugin.evaluate.rows import bytes_of_tokens, token_ends

    entry: dict[str, Any] = {}
    if "samples" in one.facts:
        entry["teacher_bits_per_byte_of_samples"] = _with_interval(one.facts["samples"])
    if not any(name in options.metrics for name in OF_TEACHER):
        return entry
    sides = []
    for side in (one, teacher):
        assert side.readings is not None
        table = bytes_of_tokens(side.tokenizer)
        ends = [
            token_ends(row.response, text, table)
            for row, text in zip(side.rows, texts, strict=True)
        ]
        sides.append(list(zip(side.readings, ends, strict=True)))
    found = nearness(*sides, texts)
    if found is None:
        return entry | {"rows_compared": 0}
    entry["rows_compared"] = len(texts) - found.rows_left_out
    if "agreement" in options.metrics:
        entry["places_compared"] = int(found.agreement.below.sum())
        entry["next_byte_agreement"] = _with_interval(found.agreement)
        entry["next_byte_divergence_bits"] = _with_interval(found.divergence)
    if "structure" in options.metrics:
        entry["structure_cosine"] = _spread(found.cosine)
        entry["structure_inner_product"] = _spread(found.inner)
    return entry


def _with_interval(amounts: Amounts) -> dict[str, Any]:
    from dwakd_plugin.evaluate.figures import interval

    return {"value": amounts.value, "interval": interval(amounts)}


def _spread(values: Any) -> dict[str, float]:
    """What a box plot shows: quartiles, whiskers at the last value within 1.5 of their range."""
    import numpy as np

    low, middle, high = (float(x) for x in np.percentile(values, [25, 50, 75]))
    reach = 1.5 * (high - low)
    return {
        "mean": float(values.mean()),
        "median": middle,
        "q1": low,
        "q3": high,
        "whisker_low": float(values[values >= low - reach].min()),
        "whisker_high": float(values[values <= high + reach].max()),
    }


# Progress -----------------------------------------------------------------------------------


@contextmanager
def _progress(console: PlainConsole) -> Iterator[Begin]:
    """Yields a function that begins a stage and returns what hears (done, total) of it."""
    with progress_bar(console, "{task.description:<28}") as progress:
        current: list[Any] = []

        def begin(title: str) -> Callable[[int, int], None]:
            if current:
                progress.remove_task(current.pop())
            current.append(progress.add_task(title, total=None))
            task = current[0]
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield begin
        if current:
            progress.remove_task(current.pop())


@contextmanager
def _words_when_stopped(options: Options, console: PlainConsole) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if "rouge_l" in options.metrics:
            console.print(
                f"Stopped. The same command goes on: the answers so far are in {options.output}."
            )
        raise
