"""Texts of a user's file, to cut with tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError


def read_texts(file: Path) -> list[str]:
    """Texts of a file: one a line, or JSONL with `text`, `instruction`/`input`/`output` or
    `messages`. Lines without a text in plain files are passed over.

    Raises UserError for a file that cannot be read, is not UTF-8, has no text, or has a JSONL line
    without one.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line}. Convert it first, "
            "for example with iconv."
        ) from error
    lines = [
        (number, line.removesuffix("\r"))
        for number, line in enumerate(content.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise UserError(f"{file} has no text: it is empty.")
    if file.suffix.lower() not in (".jsonl", ".ndjson") and not _is_row(lines[0][1]):
        return [line for _, line in lines]
    texts = [_text_of_row(file, number, line) for number, line in lines]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{file} has no text: all of its rows are empty.")
    return texts


def _is_row(line: str) -> bool:
    """Whether a line of a file of any name is a JSONL row (and not, say, code that is the text)."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint(("text", "output", "messages"))


def _text_of_row(file: Path, number: int, line: str) -> str:
    wanted = (
        'A row is one JSON object a line with a `text`, for example {"text": "One text."}; '
        "instruction/input/output and messages are read too."
    )
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"Line {number} of {file} is not JSON: {error}. {wanted}") from error
    parts: list[Any] = []
    if isinstance(row, dict):
        if "text" in row:
            parts = [row["text"]]
        elif "output" in row:
            parts = [row.get(key) or "" for key in ("instruction", "input")] + [row["output"]]
        elif isinstance(row.get("messages"), list):
            parts = [each.get("content") for each in row["messages"] if isinstance(each, dict)]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise UserError(f"Line {number} of {file} has no text. {wanted}")
    text = "\n".join(part for part in parts if part)
    refuse_surrogates(text, f"Line {number} of {file}")
    return text


def refuse_surrogates(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has a lone surrogate ({text[error.start]!r}), which isn't a character and "
            "has no bytes. Leave it out, or write the character out."
        ) from error
