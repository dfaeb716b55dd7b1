"""Sampled responses, one for each row and seed, that are the same however they are computed.

Token t of row r under seed s is the inverse of the cumulative distribution at a uniform number that
depends on (s, r, t) alone. So neither the batch nor its order nor an interruption decides what is
drawn; only rounding in the model's own logits can, where a number falls on a token's edge.

Responses are written to a file of JSON lines as they are made: first what they depend on, then one
line a response with a checksum. A line that a kill cut off counts as not written.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import append_lines, json_checksum, whole_lines

FORMAT = 1


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256


class Response(NamedTuple):
    """A response: its text, how many tokens it has, and whether the model ended it."""

    text: str
    tokens: int
    ended: bool


# Drawing ------------------------------------------------------------------------------------


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) that a row's tokens are drawn with: a prefix of one sequence."""
    key = np.array([seed, row], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def draw(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """Token ids (B,) for logits (B, V) and uniform numbers (B,) in float64.

    The first token at which the cumulative probability exceeds the number. With top_p below 1, the
    smallest set of most likely tokens that reaches it is what is drawn from.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, places = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(outside.gather(-1, places.argsort(-1)), 0.0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))
    targets = torch.minimum(numbers * total, below)
    return torch.searchsorted(cumulative, targets.unsqueeze(-1), right=True).squeeze(-1)


class _Drawn(LogitsProcessor):
    """Leaves one token possible a row: the one that its next number draws."""

    def __init__(self, numbers: Tensor, sampling: Sampling) -> None:
        self.numbers = numbers
        self.sampling = sampling
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampling = self.sampling
        drawn = draw(scores, self.numbers[:, self.step], sampling.temperature, sampling.top_p)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn.unsqueeze(-1), 0.0)


# (prompts, (seed, row) of each, largest number of new tokens) to new token ids
Generator = Callable[[list[list[int]], list[tuple[int, int]], int], list[list[int]]]


def with_transformers(model: Any, sampling: Sampling, stop: Sequence[int]) -> Generator:
    """Generates a batch at once, prompts padded on the left; new tokens up to the first stop."""

    @torch.no_grad()
    def generate(
        prompts: list[list[int]], keys: list[tuple[int, int]], limit: int
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, prompt in enumerate(prompts):
            ids[place, width - len(prompt) :] = torch.tensor(prompt)
            mask[place, width - len(prompt) :] = 1
        numbers = torch.tensor(np.stack([uniforms(*key, limit) for key in keys]))
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([_Drawn(numbers.to(model.device), sampling)]),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=list(stop),
            pad_token_id=stop[0],
        )
        return [_up_to_stop(new, stop) for new in output[:, width:].tolist()]

    return generate


def _up_to_stop(new: list[int], stop: Sequence[int]) -> list[int]:
    for place, index in enumerate(new):
        if index in stop:
            return new[: place + 1]
    return new


@contextmanager
def with_vllm(
    source: Any, held: Any, sampling: Sampling, stop: Sequence[int], longest: int
) -> Iterator[Generator]:
    """Generates with vLLM, which draws its own numbers: other responses, as likely.

    Written against vLLM's documented interface and not tested. `longest` is the largest number of
    tokens of a prompt with its response. Raises UserError where vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(
            f"--backend vllm needs vLLM, which cannot be imported ({error}). Install it, or leave "
            "the option out."
        ) from error
    llm = LLM(
        model=source.weights,
        tokenizer=source.tokenizer,
        dtype=held.dtype,
        quantization="bitsandbytes" if held.load_in_8bit else None,
        trust_remote_code=held.trust_remote_code,
        max_model_len=longest,
        enable_lora=source.adapter is not None,
        max_lora_rank=512,
    )
    lora = LoRARequest("adapter", 1, str(source.adapter)) if source.adapter is not None else None

    def generate(
        prompts: list[list[int]], keys: list[tuple[int, int]], limit: int
    ) -> list[list[int]]:
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=limit,
                seed=zlib.crc32(f"{seed}:{row}".encode()),
                stop_token_ids=list(stop),
            )
            for seed, row in keys
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            parameters,
            lora_request=lora,
            use_tqdm=False,
        )
        return [_up_to_stop(list(each.outputs[0].token_ids), stop) for each in outputs]

    yield generate


# The file -----------------------------------------------------------------------------------


class ResponseStore:
    """Responses on disk, of one model with one way of sampling.

    `identity` names all that they depend on beside their prompt, whose checksum is in each line.
    """

    def __init__(self, file: Path, identity: dict[str, Any]) -> None:
        """Raises UserError where the file holds other responses, or is damaged."""
        self.file = file
        self.head = {"format": FORMAT, "identity": json.loads(json.dumps(identity))}
        self._responses: dict[tuple[int, int], Response] = {}
        self._prompts: dict[tuple[int, int], int] = {}
        self._read_file()

    def __len__(self) -> int:
        return len(self._responses)

    def get(self, seed: int, row: int, prompt: Sequence[int]) -> Response | None:
        """The response to a prompt, None where there is none yet.

        Raises UserError where it was made for another prompt.
        """
        key = seed, row
        if key not in self._responses:
            return None
        if self._prompts[key] != _prompt_checksum(prompt):
            raise UserError(
                f"{self.file} holds responses to other prompts: row {row + 1} is another one here. "
                "The data or the prompt template has changed. --force begins anew; --output names "
                "another folder."
            )
        return self._responses[key]

    def add(self, made: Sequence[tuple[int, int, Sequence[int], Response]]) -> None:
        """Appends (seed, row, prompt, response). Raises UserError where they cannot be written."""
        lines = []
        for seed, row, prompt, response in made:
            line = {"seed": seed, "row": row, "prompt": _prompt_checksum(prompt)}
            line |= response._asdict()
            lines.append(line | {"crc32": json_checksum(line)})
        try:
            append_lines(self.file, self.head, lines)
        except OSError as error:
            raise UserError(f"{self.file} cannot be written: {error}") from error
        for seed, row, prompt, response in made:
            self._responses[seed, row] = response
            self._prompts[seed, row] = _prompt_checksum(prompt)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the file for this process. Raises UserError where another one has it."""
        with _alone(self.file):
            self._read_file()  # what another process wrote meanwhile
            yield

    def _read_file(self) -> None:
        try:
            content = self.file.read_bytes() if self.file.exists() else b""
        except OSError as error:
            raise UserError(f"{self.file} cannot be read: {error}") from error
        lines = whole_lines(content)
        if lines:
            self._check_head(lines[0])
        for number, line in enumerate(lines[1:], 2):
            self._read(number, line)

    def _check_head(self, line: bytes) -> None:
        try:
            head = json.loads(line)
            found, version = dict(head["identity"]), head["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file} holds no responses of `dwakd evaluate`: its first line says nothing "
                "of a model. Move it away."
            ) from error
        if version != FORMAT:
            raise UserError(f"{self.file} has format {version}, and this version reads {FORMAT}.")
        wanted = self.head["identity"]
        differing = [
            f"  {key}: {found.get(key)!r} there, {wanted.get(key)!r} here"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)
        ]
        if differing:
            raise UserError(
                f"{self.file} holds responses that were made otherwise:\n"
                + "\n".join(differing)
                + "\n--force begins anew; --output names another folder."
            )

    def _read(self, number: int, line: bytes) -> None:
        try:
            content = json.loads(line)
            checksum = content.pop("crc32")
            key = int(content["seed"]), int(content["row"])
            response = Response(content["text"], content["tokens"], content["ended"])
            prompt = content["prompt"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(self._damaged(number)) from error
        if checksum != json_checksum(content):
            raise UserError(self._damaged(number))
        self._responses[key], self._prompts[key] = response, prompt

    def _damaged(self, number: int) -> str:
        return (
            f"{self.file} is damaged in line {number}: its checksum does not match. Remove the "
            "line to have its response made again, or begin anew with --force."
        )


@contextmanager
def _alone(file: Path) -> Iterator[int]:
    """Holds a file of responses; yields its handle. Raises UserError where another one has it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        raise UserError(
            f"Another evaluation is writing {file}. Let it finish, or stop it."
        ) from None
    finally:
        os.close(handle)


def discard(file: Path) -> None:
    """Forgets the responses in a file. Raises UserError where another evaluation writes it."""
    with _alone(file) as handle:
        os.ftruncate(handle, 0)


def _prompt_checksum(prompt: Sequence[int]) -> int:
    return zlib.crc32(np.array(prompt, dtype=np.int64).tobytes())


# All of it ----------------------------------------------------------------------------------


def batches(
    prompts: Mapping[int, Sequence[int]], limits: Mapping[int, int], size: int
) -> list[list[int]]:
    """Rows that are generated together: of one limit, longest prompts first.

    Of one limit, as a batch runs to its limit, and a row may have no position beyond its own.
    """
    order = sorted(prompts, key=lambda row: (-limits[row], -len(prompts[row]), row))
    plan: list[list[int]] = []
    for _, group in groupby(order, key=lambda row: limits[row]):
        rows = list(group)
        plan += [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    return plan


def respond(
    store: ResponseStore,
    generate: Generator,
    tokenizer: Any,
    prompts: Mapping[int, Sequence[int]],
    limits: Mapping[int, int],
    seeds: Sequence[int],
    stop: Sequence[int],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Response]]:
    """A response for each seed and row: [seed][row]. Those in the store are not made again.

    prompts: token ids by the row's number in the data; limits: the largest number of new tokens.
    Batches are the same after an interruption as without one, so that a batch of which some rows
    are missing is generated whole. Where a GPU's memory runs out, batches are halved.

    Raises UserError.
    """

    def missing(seed: int, rows: Iterable[int]) -> list[int]:
        return [row for row in rows if store.get(seed, row, prompts[row]) is None]

    total = len(seeds) * len(prompts)
    with store.writing():
        done = total - sum(len(missing(seed, prompts)) for seed in seeds)
        for seed in seeds:
            plan = batches(prompts, limits, batch_size)
            while plan:
                rows = plan[0]
                wanted = missing(seed, rows)
                progress(done, total)
                if wanted:
                    try:
                        new = generate(
                            [list(prompts[row]) for row in rows],
                            [(seed, row) for row in rows],
                            limits[rows[0]],
                        )
                    except torch.OutOfMemoryError as error:
                        if batch_size == 1:
                            raise UserError(
                                "Out of memory with one row at a time. Use --load-in-8bit, or a "
                                "smaller --max-new-tokens."
                            ) from error
                        torch.cuda.empty_cache()
                        batch_size = (batch_size + 1) // 2
                        plan = batches(prompts, limits, batch_size)
                        continue
                    made = dict(zip(rows, new, strict=True))
                    store.add(
                        [
                            (seed, row, prompts[row], _response(made[row], tokenizer, stop))
                            for row in wanted
                        ]
                    )
                    done += len(wanted)
                plan.pop(0)
    progress(total, total)
    return [
        [found for row in prompts if (found := store.get(seed, row, prompts[row])) is not None]
        for seed in seeds
    ]


def _response(new: list[int], tokenizer: Any, stop: Sequence[int]) -> Response:
    ended = bool(new) and new[-1] in stop
    text = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
    return Response(text, len(new), ended)
