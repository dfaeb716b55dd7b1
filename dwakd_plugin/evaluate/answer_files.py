"""The files that `dwakd answers` writes: rows, samples, held-out rows, and the record of all.

For `--out NAME.jsonl`: NAME.jsonl has the rows (of data sets of another shape NAME-2.jsonl, ...);
NAME.samples.jsonl all that was sampled, as it is made; NAME.held-out.jsonl the recipe's held-out
rows as they were; NAME.answers.json, written last, says what all was made of.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes, json_checksum, replace_file, whole_file

_ELSEWHERE = "Give another --out, or replace it with --force."


@dataclass(frozen=True)
class AnswerFiles:
    """Their places, by that of the rows."""

    out: Path

    @property
    def samples(self) -> Path:
        return self._beside(".samples.jsonl")

    @property
    def record(self) -> Path:
        return self._beside(".answers.json")

    def rows(self, shape: int) -> Path:
        """The rows of the data sets of one shape, counted from 0."""
        return self._beside(f"{_number(shape)}{self.out.suffix}")

    def held_out(self, shape: int) -> Path:
        return self._beside(f"{_number(shape)}.held-out.jsonl")

    def _beside(self, ending: str) -> Path:
        return self.out.with_name(self.out.stem + ending)

    def check(self, data: Iterable[Path]) -> None:
        """Raises UserError where these files cannot be written, or are the recipe's own data."""
        if self.out.suffix not in (".jsonl", ".json"):
            raise UserError(
                f"--out {self.out}: give a file that ends in .jsonl, by which axolotl reads it."
            )
        if self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; give a file in it, as rows.jsonl.")
        if self.out.resolve() in {file.resolve() for file in data}:
            raise UserError(f"--out {self.out} is the recipe's own data. Give another file.")
        with explaining_writes(f"--out {self.out}"):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out.parent):
                pass

    # The record ----------------------------------------------------------------------------------

    def made(self, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The report of whole files that were made of these inputs, whatever the settings."""
        record = self._read()
        if record is None or record["inputs"] != inputs or self._changed(record):
            return None
        return dict(record["report"])

    def finished(
        self, inputs: dict[str, Any], settings: dict[str, Any], *, force: bool
    ) -> dict[str, Any] | None:
        """The report of just these rows, where they are there; None where there is nothing.

        Raises UserError where other rows are in the way, unless they may be replaced by `force`.
        """
        record = self._read()
        if record is None:
            if self.out.exists() and not force:
                raise UserError(
                    f"--out {self.out} exists, and no {self.record.name} beside it says that its "
                    f"rows are a teacher's answers. {_ELSEWHERE}"
                )
            return None
        there, here = (
            {**one["inputs"], **one["settings"]}
            for one in (record, {"inputs": inputs, "settings": settings})
        )
        differing = [key for key in here if there.get(key) != here[key]]
        if differing and not force:
            raise UserError(
                f"--out {self.out} holds answers that were made otherwise:\n"
                + "\n".join(
                    f"  {key}: {there.get(key)!r} there, {here[key]!r} here" for key in differing
                )
                + f"\n{_ELSEWHERE} Samples of the same teacher, rows and sampling are used again."
            )
        if differing:
            return None
        changed = self._changed(record)
        if any(file.exists() for file in changed) and not force:
            raise UserError(f"{changed[0]} has changed since it was written. {_ELSEWHERE}")
        return None if changed else dict(record["report"])

    def keep(
        self, inputs: dict[str, Any], settings: dict[str, Any], report: dict[str, Any]
    ) -> None:
        """Writes the record of the files that the report names. Raises UserError."""
        files = {name: _digest(Path(name)) for name in (*report["out"], *report["held_out"])}
        record = {"inputs": inputs, "settings": settings, "report": report, "files": files}
        record = json.loads(json.dumps(record))
        with explaining_writes(self.record):
            replace_file(
                self.record, json.dumps(record | {"crc32": json_checksum(record)}, indent=1)
            )

    def _read(self) -> dict[str, Any] | None:
        try:
            record = dict(json.loads(self.record.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return record if record.pop("crc32", None) == json_checksum(record) else None

    def _changed(self, record: dict[str, Any]) -> list[Path]:
        """Files that aren't there, or not as they were written."""
        return [
            Path(name)
            for name, digest in record["files"].items()
            if not Path(name).is_file() or _digest(Path(name)) != digest
        ]


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSON lines, whole or not at all; how many. Raises UserError."""
    count = 0
    with (
        explaining_writes(file, "Free some space, and the same command goes on."),
        whole_file(file) as partial,
        partial.open("w", encoding="utf-8") as stream,
    ):
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
            count += 1
    return count


def _plain(value: Any) -> str:
    """What Arrow has read out of a text, a date or a time, as a text again."""
    return value.isoformat() if isinstance(value, date | time) else str(value)


def _number(shape: int) -> str:
    return f"-{shape + 1}" if shape else ""


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
