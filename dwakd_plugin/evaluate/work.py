"""The models at work, one after the other: each reads the references and answers the prompts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dwakd_plugin.evaluate import OF_TEACHER
from dwakd_plugin.evaluate.figures import bits_per_byte, read, symbols_of
from dwakd_plugin.evaluate.generation import respond
from dwakd_plugin.evaluate.model import identity, load_model, most_positions
from dwakd_plugin.evaluate.responses import ResponseStore, discard
from dwakd_plugin.evaluate.rows import bytes_of_tokens
from dwakd_plugin.evaluate.subjects import Model, Request, place
from dwakd_plugin.models.causal_lm import causal_lm, output_head, parameter_count, short_dtype
from dwakd_plugin.models.sampling import Generator, with_transformers
from dwakd_plugin.models.vllm import AT_ONCE as BATCH_VLLM
from dwakd_plugin.models.vllm import with_vllm

# Rows generated at once, where the batch size is auto; halved where a GPU's memory runs out.
BATCH_GPU, BATCH_CPU = 64, 8

# Begins a stage of the work by its title; what it returns hears (done, total).
Begin = Callable[[str], Callable[[int, int], None]]


def _stores(models: list[Model], request: Request) -> dict[str, ResponseStore]:
    """Where each student's responses are kept; those of other models or settings are refused."""
    if "rouge_l" not in request.metrics:
        return {}
    stores = {}
    for one in models:
        if one.role == "teacher":
            continue
        slug = re.sub(r"[^\w.-]+", "-", one.name).strip("-.")
        checksum = hashlib.sha256(place(one.source.name).encode()).hexdigest()
        file = request.output / f"responses-{slug}-{checksum[:6]}.jsonl"
        if request.force:
            discard(file)
        stores[one.name] = ResponseStore(
            file,
            identity(one.source, one.config, one.held)
            | asdict(request.sampling)
            | {"stop": one.stop, "backend": request.backend},
        )
    return stores


def evaluate(
    models: list[Model],
    references: list[tuple[str, ...]],
    request: Request,
    begin: Begin,
) -> None:
    """Loads one model after the other; each reads the references and answers the prompts.

    Raises UserError where answers of other models or settings lie in the output folder.
    """
    stores = _stores(models, request)
    compares = any(name in request.metrics for name in OF_TEACHER)
    reads = compares or "bits_per_byte" in request.metrics
    for one in models:
        store = stores.get(one.name)
        if store is not None and request.backend == "vllm":
            limits = _limits(one, request)
            longest = max(len(prompt) + limits[row] for row, prompt in _prompts(one).items())
            generate = with_vllm(
                one.source.weights,
                one.source.tokenizer,
                one.source.adapter,
                request.sampling,
                one.stop,
                longest,
                load_in_8bit=one.held.load_in_8bit,
                dtype=one.held.dtype,
                trust_remote_code=one.held.trust_remote_code,
            )
            _respond(one, generate, BATCH_VLLM, request, store, begin)
            del generate  # and vLLM's model with it
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
        if store is not None and request.backend != "vllm":
            at_once = BATCH_CPU if model.device.type == "cpu" else BATCH_GPU
            generate = with_transformers(model, request.sampling, one.stop)
            _respond(one, generate, at_once, request, store, begin)
        if one.role == "teacher" and "rouge_l" in request.metrics:
            for student in models[:-1]:
                _read_samples(one, model, student, begin)
        del model


def _respond(
    one: Model, generate: Generator, at_once: int, request: Request, store: Any, begin: Begin
) -> None:
    one.responses = respond(
        store,
        generate,
        one.tokenizer,
        _prompts(one),
        _limits(one, request),
        request.seeds,
        one.stop,
        request.batch_size or at_once,
        begin(f"{one.name} answers"),
    )


def _prompts(one: Model) -> dict[int, list[int]]:
    return {number: row.prompt for number, row in zip(one.numbers, one.rows, strict=True)}


def _limits(one: Model, request: Request) -> dict[int, int]:
    """The largest number of new tokens of each row: the model's positions end it too."""
    positions, most = most_positions(one.config), request.sampling.max_new_tokens
    return {
        number: most if positions is None else min(most, positions - len(prompt))
        for number, prompt in _prompts(one).items()
    }


def _read_samples(teacher: Model, model: Any, student: Model, begin: Begin) -> None:
    """What the teacher makes of the student's responses under the first seed."""
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
