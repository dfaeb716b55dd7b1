"""What is evaluated: the models, without their weights yet, and the rows as each reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.figures import Reading
from dwakd_plugin.evaluate.model import (
    Held,
    Source,
    choose_device,
    find_model,
    load_config,
    most_positions,
    run_record,
    stop_ids,
)
from dwakd_plugin.evaluate.responses import Response, date_of_responses
from dwakd_plugin.evaluate.rows import (
    Encoded,
    choose_format,
    encode,
    end_of_turn,
    read_rows,
    recipe_rows,
)
from dwakd_plugin.io.files import user_path
from dwakd_plugin.models.sampling import Sampling
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.reading import read_recipe
from dwakd_plugin.tokenizers.loading import load_tokenizer
from dwakd_plugin.tokenizers.template_date import read_date, today


@dataclass(frozen=True)
class Request:
    """What to evaluate, on what rows, and how."""

    model: str
    against: tuple[str, ...]
    teacher: str | None
    data: Path  # JSONL, JSON or a recipe
    limit: int | None  # of rows
    prompt_template: str
    metrics: tuple[str, ...]  # of METRICS
    seeds: tuple[int, ...]  # of the answers
    sampling: Sampling
    batch_size: int | None  # None: auto
    backend: str  # transformers or vllm
    held: Held
    teacher_in_8bit: bool
    output: Path  # folder of the answers
    force: bool  # makes answers again


@dataclass
class Model:
    """A model to evaluate, the rows as it reads them, and what was found."""

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


def open_models(request: Request) -> list[Model]:
    """All models with tokenizer and config, no weights: the first, those against, the teacher."""
    held, teacher = request.held, [request.teacher] if request.teacher else []
    choose_device(held.device)
    names = [request.model, *request.against, *teacher]
    roles = ["model", *["against"] * len(request.against), *["teacher"] * len(teacher)]
    places = [place(name) for name in names]
    for index, one in enumerate(places):
        if one in places[:index]:
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
        own = replace(held, load_in_8bit=request.teacher_in_8bit) if role == "teacher" else held
        stop = stop_ids(source, tokenizer)
        models.append(Model(source, role, tokenizer, config, stop, own))
    for made, name in zip(models, short_names(names), strict=True):
        made.name = name
    return models


def day_of(request: Request, models: list[Model]) -> date:
    """The day that chat templates print: that of answers made before, else of the run's rows."""
    kept = None if request.force else date_of_responses(request.output)
    if kept is not None:
        return kept
    for one in models:
        day = run_record(one.source).get("template_date")
        if day is not None:
            return read_date(day, one.source.name)
    return today()


def place(name: str) -> str:
    """A model's folder as one path, whatever way it was written; a hub id as it is."""
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
    request: Request, models: list[Model]
) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """References of each row, and what is said of the data; each model gets its rows."""
    data, limit = request.data, request.limit
    if data.suffix.lower() in (".yml", ".yaml"):
        if request.prompt_template != "auto":
            raise UserError("A recipe renders its own prompts. Leave --prompt-template out.")
        references = _read_recipe(data, models)
        kind, why = "recipe", "as axolotl renders the recipe's rows"
    else:
        if data.is_dir():
            raise UserError(f"The data `{data}` is a folder; give a JSONL file or a recipe.")
        rows = read_rows(data)[:limit]
        form = choose_format(request.prompt_template, rows, models[0].source, models[0].tokenizer)
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
    keys = read_recipe(file)
    recipe = Recipe.completed(keys, {}) if "dwakd" in keys else Recipe(keys)
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
