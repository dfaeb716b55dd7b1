"""Rows of a JSONL file or of a JSON list, or the place of what is wrong in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError


def json_rows(file: Path, wanted: str = "") -> Iterator[tuple[str, Any]]:
    """(where, row) of each row, in words as in "Row 3 of `rows.jsonl`"; lines without text do not
    count as rows, and do in the numbers.

    `wanted` says at the end of a message what a row is. Raises UserError for a file that cannot be
    read, that is not UTF-8 or JSON, that has no row, or a row with a lone surrogate.
    """
    wanted = wanted and f" {wanted}"
    rows = 0
    try:
        with file.open("rb") as stream:
            for number, line in _values(file, stream, wanted):
                where = f"Row {number} of `{file}`"
                rows += 1
                try:
                    row = json.loads(line) if isinstance(line, str) else line
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is not JSON: {error}.{wanted}") from error
                _refuse_surrogates(row, where)
                yield where, row
    except FileNotFoundError:
        raise UserError(f"The data `{file}` does not exist.{wanted}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"The data `{file}` cannot be read: {error}") from error
    if not rows:
        raise UserError(f"The data `{file}` is empty.{wanted}")


def _values(file: Path, stream: Any, wanted: str) -> Iterator[tuple[int, Any]]:
    """Numbered lines with text in them, or the numbered entries of a list."""
    first = True
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"The data `{file}` is not UTF-8: byte 0x{raw[error.start]:02x} in line {number}. "
                "Convert it first, for example with iconv."
            ) from error
        if line and first and line.startswith("["):
            try:
                stream.seek(0)
                entries = json.loads(stream.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"The data `{file}` isn't a JSON list: {error}.{wanted}") from error
            yield from enumerate(entries, 1)
            return
        if line:
            first = False
            yield number, line


def _refuse_surrogates(row: Any, where: str) -> None:
    """Raises UserError for half of a character, which no tokenizer can read."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has a lone surrogate ({error.object[error.start]!r}), which isn't a "
            "character and has no bytes. Leave it out, or write the character out."
        ) from error
