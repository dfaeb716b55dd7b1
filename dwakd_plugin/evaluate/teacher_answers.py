"""The teacher answers the prompts of a recipe's rows, and the answers become rows of its shape."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from axolotl.utils.dict import DictDefault
from transformers import GenerationConfig

from dwakd_plugin.data.fingerprint import local_files
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.answer_choice import Keep, write_answers
from dwakd_plugin.evaluate.answer_files import AnswerFiles
from dwakd_plugin.evaluate.generation import respond
from dwakd_plugin.evaluate.model import Source, most_positions, stop_ids
from dwakd_plugin.evaluate.responses import Response, ResponseStore, date_of_file, discard
from dwakd_plugin.evaluate.work import BATCH_CPU, BATCH_GPU
from dwakd_plugin.models.batches import check_ids
from dwakd_plugin.models.causal_lm import causal_lm
from dwakd_plugin.models.sampling import Generator, Sample, Sampling, with_transformers
from dwakd_plugin.models.teacher.cached import teacher_identity
from dwakd_plugin.models.teacher.loaded import check_teacher, load_teacher, teacher_config
from dwakd_plugin.models.vllm import AT_ONCE, is_installed, with_vllm
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.schema import TeacherConfig
from dwakd_plugin.tokenizers.template_date import template_date, today
from dwakd_plugin.train.open_run import open_prompts, open_rows

if TYPE_CHECKING:
    from dwakd_plugin.data.raw_rows import Prompts

Begin = Callable[[str], Callable[..., None]]  # begins a stage, which hears (done, total, words)

_SAMPLE_BITS = 16  # of a number that is drawn with, below those of the seed
# What the prompts depend on in a recipe, beside the teacher's own block.
_KEYS = (
    "datasets",
    "sequence_len",
    "default_system_message",
    "chat_template",
    "chat_template_jinja",
)
# And which rows are held out, where the recipe leaves that to axolotl.
_SPLIT = (
    "val_set_size",
    "seed",
    "base_model",
    "tokenizer_config",
    "excess_length_strategy",
    "min_sample_len",
)
SAMPLING = Sampling(temperature=0.7, top_p=0.95, max_new_tokens=512)


@dataclass(frozen=True)
class Order:
    """What is asked for. `batch_size` None: by the device."""

    recipe: Recipe
    out: Path
    samples: int = 1
    sampling: Sampling = SAMPLING
    seed: int = 42
    keep: Keep = "all"
    keep_unended: bool = False
    with_labels: bool = False
    batch_size: int | None = None
    backend: Literal["auto", "transformers", "vllm"] = "auto"
    force: bool = False

    @property
    def teacher(self) -> TeacherConfig:
        return self.recipe.config.teacher

    @property
    def files(self) -> AnswerFiles:
        return AnswerFiles(self.out)

    @property
    def engine(self) -> str:
        """vLLM where it is installed, has a GPU, and can hold the teacher as the recipe does."""
        if self.backend != "auto":
            return self.backend
        able = not self.teacher.load_in_8bit and self.teacher.device is None
        usable = able and torch.cuda.is_available() and is_installed()
        return "vllm" if usable else "transformers"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the rows beside the inputs."""
        own = ("samples", "keep", "keep_unended", "with_labels")
        return {name: getattr(self, name) for name in own} | self.drawing

    @property
    def drawing(self) -> dict[str, Any]:
        """What decides a sample."""
        return asdict(self.sampling) | {"seed": self.seed, "backend": self.engine}


def check_order(order: Order) -> None:
    """Raises UserError where the options don't fit each other, the teacher or the machine."""
    order.teacher.must_be_loaded("`dwakd answers`")
    sampling, n = order.sampling, order.samples
    for option, value in (("samples", n), ("max-new-tokens", sampling.max_new_tokens)):
        if value < 1:
            raise UserError(f"--{option} {value}: give a number from 1.")
    if n >= 1 << _SAMPLE_BITS:
        raise UserError(f"--samples {n}: give fewer than {1 << _SAMPLE_BITS}.")
    if order.seed < 0:
        raise UserError(f"--seed {order.seed}: give a number from 0.")
    if not 0 <= sampling.temperature < float("inf") or not 0.01 <= sampling.top_p <= 1:
        raise UserError(
            f"--temperature {sampling.temperature:g} and --top-p {sampling.top_p:g}: give a "
            "temperature from 0, and a top-p from 0.01 to 1."
        )
    if sampling.temperature == 0 and n > 1:
        raise UserError(
            f"--samples {n} at --temperature 0: the most likely tokens are the same each time, so "
            f"there is nothing to keep the {order.keep} of. Raise the temperature, or leave out "
            "--samples."
        )
    order.files.check(local_files(DictDefault(dict(order.recipe.keys))))
    config = teacher_config(order.teacher)
    check_teacher(order.teacher, device())
    positions = most_positions(config)
    if positions is not None and sampling.max_new_tokens >= positions:
        raise UserError(
            f"--max-new-tokens {sampling.max_new_tokens}: the teacher has {positions} positions, "
            "and the prompt takes some of them. Give a smaller number."
        )


def device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def inputs_of(order: Order) -> dict[str, Any]:
    """What the answers are of: the teacher, and the recipe's rows. Local data by its contents."""
    keys = order.recipe.keys
    names = _KEYS + (_SPLIT if _holds_out(order.recipe) else ())
    settings = {name: keys.get(name) for name in names} | {
        "sequence_len": [keys.get("sequence_len"), order.teacher.sequence_len],
        "thinking_key": order.teacher.thinking_key,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in local_files(DictDefault({"datasets": keys.get("datasets")})):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    tokenizer = load_teacher_tokenizer(order.teacher)
    identity = teacher_identity(order.teacher, device(), tokenizer)
    return {**identity, "rows": digest.hexdigest()[:32]}


def answer(order: Order, begin: Begin) -> dict[str, Any]:
    """The report, after the answering where it isn't done. Raises UserError.

    Is killed at no cost but the batch: the same order goes on, to the same files byte for byte.
    """
    started = time.monotonic()
    inputs, files = inputs_of(order), order.files
    report = files.finished(inputs, order.settings, force=order.force)
    if report is not None:
        return report | {"skipped": True}
    with template_date(date_of_file(files.samples) or today()):
        store = _store(order, inputs)
        hear = begin("Preparing the prompts")
        held_out = _held_out(order.recipe)
        with open_prompts(order.recipe) as prompts:
            from dwakd_plugin.data.raw_rows import fill  # which imports all of axolotl's data

            positions = most_positions(teacher_config(order.teacher))
            prompts.longest = min(prompts.longest, positions or prompts.longest)
            for done, total in fill(prompts, held_out):
                hear(done, total)
        stop = _stop(order.teacher, prompts)
        responses, speed = _respond(order, prompts, stop, store, begin)
    gc.collect()  # the teacher: a training may follow, in a process of its own
    torch.cuda.empty_cache()
    report = _report(order) | write_answers(
        files, prompts, held_out, responses, order.keep, order.keep_unended, order.with_labels
    )
    report |= {"tokens_per_second": speed, "seconds": round(time.monotonic() - started, 1)}
    files.keep(inputs, order.settings, report)
    return report | {"skipped": False}


def made_before(order: Order) -> Order:
    """The order that whole answers of the same teacher and rows were made by; else `order`.

    Only which of them are kept, and whether beside their labels, may change then.
    """
    report = order.files.made(inputs_of(order))
    if report is None:
        return order
    names = ("samples", "seed", "keep", "keep_unended", "backend")
    sampling = Sampling(**{each.name: report[each.name] for each in fields(Sampling)})
    return replace(order, sampling=sampling, force=True, **{name: report[name] for name in names})


def _report(order: Order) -> dict[str, Any]:
    return {
        "teacher": order.teacher.base_model,
        "adapter": order.teacher.adapter,
        **order.settings,
    }


# Sampling -----------------------------------------------------------------------------------


def _store(order: Order, inputs: dict[str, Any]) -> ResponseStore:
    file, identity = order.files.samples, inputs | order.drawing
    try:
        return ResponseStore(file, identity, "--out names another file")
    except UserError:
        if not order.force:
            raise
    discard(file)
    return ResponseStore(file, identity)


def _holds_out(recipe: Recipe) -> bool:
    return bool(recipe.keys.get("val_set_size")) and not recipe.keys.get("test_datasets")


def _held_out(recipe: Recipe) -> frozenset[int]:
    """The rows that a run of this recipe holds out to evaluate on, as axolotl draws them."""
    if not _holds_out(recipe):
        return frozenset()
    if recipe.keys.get("dataset_exact_deduplication"):
        raise UserError(
            "dataset_exact_deduplication with val_set_size: which rows are held out cannot be told "
            "any more, and they must not be answered. Give held-out rows as test_datasets."
        )
    with open_rows(recipe) as (_, (_, evaluation), _):
        return frozenset() if evaluation is None else frozenset(evaluation["source_row"])


def _stop(teacher: TeacherConfig, prompts: Prompts) -> list[int]:
    if not prompts.found:
        raise UserError(
            "No row can be answered: "
            + ", ".join(f"{count:,} {reason}" for reason, count in prompts.left_out.items())
            + ". `sequence_len` (dwakd.teacher.sequence_len) must leave room behind a prompt, and "
            "the teacher's chat template must render the last answer."
        )
    if not prompts.ends:
        raise UserError(
            f"The teacher {teacher.base_model} has no end of turn: behind an answer its chat "
            "template writes no token of its own, so nothing says where one ends. Give a template "
            "that does as dwakd.teacher.chat_template, such as chatml for a teacher of that form."
        )
    name = teacher.base_model
    named = stop_ids(Source(name, name, None, teacher.tokenizer or name), prompts.tokenizer)
    return sorted(prompts.ends | set(named))


def _respond(
    order: Order, prompts: Prompts, stop: list[int], store: ResponseStore, begin: Begin
) -> tuple[list[list[Response]], float | None]:
    """Responses by sample and prompt, and the tokens a second, where some were made now."""
    ids = {prompt.source: prompt.ids for prompt in prompts.found}
    # An answer that is longer than the shortest prompt leaves room for fits no row.
    most = min(order.sampling.max_new_tokens, prompts.longest - min(map(len, ids.values())))
    positions = most_positions(teacher_config(order.teacher)) or prompts.longest + most
    limits = {row: min(most, positions - len(prompt)) for row, prompt in ids.items()}
    seeds = [(order.seed << _SAMPLE_BITS) + number for number in range(order.samples)]
    counted, at_once = None, 1
    if any(store.get(seed, row, ids[row]) is None for seed in seeds for row in ids):
        begin("Loading the teacher")
        longest = max(len(prompt) + limits[row] for row, prompt in ids.items())
        generate, at_once = _engine(order, prompts, stop, longest)
        counted = _Counted(generate)
    hear = begin("The teacher answers")
    responses = respond(
        store,
        counted or _nothing_to_make,
        prompts.tokenizer,
        ids,
        limits,
        seeds,
        stop,
        order.batch_size or at_once,
        lambda done, total: hear(done, total, counted.words if counted else ""),
        exact=True,
    )
    return responses, counted.speed if counted else None


def _engine(order: Order, prompts: Prompts, stop: list[int], longest: int) -> tuple[Generator, int]:
    """What generates, and how many answers at once. `longest`: tokens of a prompt with its answer.

    Quantised and with its adapter as in training. Raises UserError.
    """
    config, sampling = order.teacher, order.sampling
    if order.engine == "vllm":
        generate = with_vllm(
            config.base_model,
            config.tokenizer or config.base_model,
            None if config.adapter is None else Path(config.adapter),
            sampling,
            stop,
            longest,
            load_in_8bit=config.load_in_8bit,
            load_in_4bit=config.load_in_4bit,
            scored=True,
            dtype=config.dtype,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
        return generate, AT_ONCE
    teacher = load_teacher(config, device())
    assert teacher.model is not None
    read = (torch.tensor(prompt.ids) for prompt in prompts.found)
    check_ids(read, teacher.embeddings.weight.shape[0], config.called, prompts.tokenizer)
    lm = causal_lm(teacher.model)
    # Its own settings (a repetition penalty, a temperature) would slip into ours.
    lm.generation_config = GenerationConfig(pad_token_id=0, use_cache=True)
    generate = with_transformers(lm, sampling, stop, device=teacher.device, scored=True)

    def with_offloaded(*arguments: Any) -> list[Sample]:
        """Keeps the teacher, whose folder of offloaded layers goes when it does."""
        assert teacher.model is not None
        return generate(*arguments)

    return with_offloaded, BATCH_CPU if str(teacher.device) == "cpu" else BATCH_GPU


def _nothing_to_make(*_: Any) -> list[Sample]:
    raise AssertionError("all samples are there")


class _Counted:
    """A generator that knows how many tokens it made, and how long that took."""

    def __init__(self, generate: Generator) -> None:
        self._generate = generate
        self._tokens, self._seconds = 0, 0.0

    def __call__(self, *arguments: Any) -> list[Sample]:
        begun = time.perf_counter()
        samples = self._generate(*arguments)
        self._seconds += time.perf_counter() - begun
        self._tokens += sum(len(sample.tokens) for sample in samples)
        return samples

    @property
    def speed(self) -> float | None:
        return round(self._tokens / self._seconds, 1) if self._seconds else None

    @property
    def words(self) -> str:
        return "" if self.speed is None else f"{self.speed:,.0f} tokens/s"
