"""Responses on disk: a file of JSON lines, written as they are made.

First what they depend on, then one line a response with a checksum. A line that a kill cut off
counts as not written.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import append_lines, explaining_writes, json_checksum, whole_lines
from dwakd_plugin.io.locks import release, take
from dwakd_plugin.tokenizers.template_date import read_date, today

FORMAT = 1


class Response(NamedTuple):
    """A response: its text, its tokens (the end counts), and whether the model ended it.

    `log_probability` is the mean of its tokens' under the model, in nats, where it was asked for.
    """

    text: str
    tokens: int
    ended: bool
    log_probability: float | None = None


class ResponseStore:
    """Responses on disk, of one model with one way of sampling.

    `identity` names all that they depend on beside their prompt, whose checksum is in each line;
    `elsewhere` says in messages what writes to another place.
    """

    def __init__(
        self, file: Path, identity: dict[str, Any], elsewhere: str = "--output names another folder"
    ) -> None:
        """Raises UserError where the file holds other responses, or is damaged."""
        self.file = file
        self._remedy = f"--force starts over; {elsewhere}."
        self.head = {"format": FORMAT, "identity": json.loads(json.dumps(identity))}
        self.head["template_date"] = today().isoformat()
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
                f"The data or the prompt template has changed. {self._remedy}"
            )
        return self._responses[key]

    def add(self, made: Sequence[tuple[int, int, Sequence[int], Response]]) -> None:
        """Appends (seed, row, prompt, response). Raises UserError where they cannot be written."""
        lines = []
        for seed, row, prompt, response in made:
            line = {"seed": seed, "row": row, "prompt": _prompt_checksum(prompt)}
            line |= {key: value for key, value in response._asdict().items() if value is not None}
            lines.append(line | {"crc32": json_checksum(line)})
        with explaining_writes(self.file, "Free some space, and the same command goes on."):
            append_lines(self.file, self.head, lines)
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
                f"{self.file} holds no responses of dwakd: its first line says nothing of a model. "
                "Move it away."
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
                + f"\n{self._remedy}"
            )

    def _read(self, number: int, line: bytes) -> None:
        try:
            content = json.loads(line)
            checksum = content.pop("crc32")
            key = int(content["seed"]), int(content["row"])
            response = Response(
                content["text"],
                content["tokens"],
                content["ended"],
                content.get("log_probability"),
            )
            prompt = content["prompt"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(self._damaged(number)) from error
        if checksum != json_checksum(content):
            raise UserError(self._damaged(number))
        self._responses[key], self._prompts[key] = response, prompt

    def _damaged(self, number: int) -> str:
        return (
            f"{self.file} is damaged in line {number}: its checksum does not match. Remove the "
            "line to have its response made again, or start over with --force."
        )


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Holds a file of responses, by a lock beside it. Raises UserError where another one has it."""
    with explaining_writes(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = take(
            file.with_name(f".{file.name}.lock"),
            lambda who: f"Another process is writing {file}: {who}. Let it finish, or stop it.",
        )
    try:
        yield
    finally:
        release(lock, remove=True)


def date_of_responses(folder: Path) -> date | None:
    """The day that chat templates printed for the answers in a folder; None where there are none.

    What is damaged is said where it is read.
    """
    days = map(date_of_file, sorted(folder.glob("responses-*.jsonl")))
    return next((day for day in days if day is not None), None)


def date_of_file(file: Path) -> date | None:
    """The same of one file, which may not be there."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        try:
            day = json.loads(stream.readline()).get("template_date")
        except (ValueError, AttributeError):
            return None
    return None if day is None else read_date(day, file)


def discard(file: Path) -> None:
    """Forgets the responses in a file. Raises UserError where another process writes it."""
    with _alone(file):
        file.unlink(missing_ok=True)


def _prompt_checksum(prompt: Sequence[int]) -> int:
    return zlib.crc32(np.array(prompt, dtype=np.int64).tobytes())
