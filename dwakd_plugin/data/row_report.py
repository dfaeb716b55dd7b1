"""What became of the rows of the data: how many train, on what, and why the rest was left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from dwakd_plugin.data.answers import SAME
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import replace_file

LOG = get_logger("axolotl.dwakd")

KEPT = "kept"
CUT = "kept: cut to fit, both sides at the same byte of the answer"
LABELS_ONLY = "kept for its labels only: no response left on the teacher's side"
LABELS_CUT = (
    "kept for its labels only: no byte of the answer where a token of each side ends and fits"
)
LABELS_DIFFERENT = "kept for its labels only: the teacher's side has another answer"
NO_RESPONSE = "dropped: no response on the student's side"
STUDENT_TRUNCATED = "dropped: the student's sequence_len cuts the whole response away"
STUDENT_TOO_LONG = "dropped: longer than the student's sequence_len"
TEACHER_TOO_LONG = "dropped: longer than the teacher's sequence_len"
DROPPED_DIFFERENT = "dropped: the teacher's side has another answer"
TAUGHT = (KEPT, CUT)  # which learn from the teacher
TRAINING = (*TAUGHT, LABELS_ONLY, LABELS_CUT, LABELS_DIFFERENT)

# Fewer rows with a teacher than this share of all that train, and the run says so.
FEW = 0.5


@dataclass
class RowReport:
    """What became of the rows, and where a `source_row` comes from."""

    counts: dict[str, int] = field(default_factory=dict)
    sources: list[tuple[str, int]] = field(default_factory=list)  # (path, first source_row)
    # How the two sides' answers differ, of the rows that have both: by kind, and an example each.
    answers: dict[str, int] = field(default_factory=dict)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)  # student's, teacher's
    example_rows: dict[str, int] = field(default_factory=dict)  # their `source_row`
    unpaired_ends: dict[str, int] = field(default_factory=dict)  # by the side that has an end
    # What neither side reads of rows that have it: by what it is, and the first, with its row.
    unread: dict[str, int] = field(default_factory=dict)
    unread_examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    # Of several teachers by name: then what is above, but for counts and sources, is each one's.
    each: dict[str, RowReport] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        return sum(self.counts.get(status, 0) for status in TRAINING)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def locate(self, source_row: int) -> str:
        """`source_row` in words: which row of which data set."""
        for path, start in reversed(self.sources):
            if source_row >= start:
                return f"row {source_row - start} of {path}"
        return f"row {source_row}"

    def add(self, statuses: Sequence[str], answers: Sequence[str]) -> None:
        """Counts the rows of one data set; `answers` are JSON, as `dual_tokenization` makes it."""
        start = self.total
        for place, (status, text) in enumerate(zip(statuses, answers, strict=True), start):
            self._add_row(place, status, json.loads(text))

    def _add_row(self, place: int, status: str, found: dict[str, Any]) -> None:
        self.counts[status] = self.counts.get(status, 0) + 1
        for name, (own_status, own) in found.get("each", {}).items():
            self.each.setdefault(name, RowReport())._add_row(place, own_status, own)
        if "kind" in found:
            kind = found["kind"]
            self.answers[kind] = self.answers.get(kind, 0) + 1
            if "example" in found:
                student, teacher = found["example"]
                self.examples.setdefault(kind, (student, teacher))
                self.example_rows.setdefault(kind, place)
        for what, text in found.get("unread", {}).items():
            self.unread[what] = self.unread.get(what, 0) + 1
            self.unread_examples.setdefault(what, (place, text))
        if "end" in found:
            self.unpaired_ends[found["end"]] = self.unpaired_ends.get(found["end"], 0) + 1

    def check(self, needs_teacher: bool) -> None:
        """Raises UserError where no row is left to train on, or none with a teacher; warns of few.

        Rows may be kept for their labels alone, and a run of such rows only would be fine-tuning
        without a teacher that looks like one with.
        """
        if not self.total:
            return
        reasons = "\n".join(f"  {count} rows {status}" for status, count in self.counts.items())
        if not self.kept:
            raise UserError(f"No row of the data is left to train on:\n{reasons}{self.shown()}")
        for name, own in self.each.items():
            try:
                own.check(needs_teacher)
            except UserError as error:
                raise UserError(f"Of teacher `{name}`: {error}") from error
        for what, count in self.unread.items():
            place, text = self.unread_examples[what]
            LOG.warning(
                "%s of %s rows have %s that neither side's chat template writes, so it isn't "
                "learnt. Take templates that write it (chat_template, "
                "dwakd.teacher.chat_template), and name a reasoning as they do "
                "(template_thinking_key, dwakd.teacher.thinking_key). The first is %s: %r",
                count,
                self.total,
                what,
                self.locate(place),
                text,
            )
        taught = sum(self.counts.get(status, 0) for status in TAUGHT)
        if not needs_teacher:
            return
        if not taught:
            raise UserError(
                f"No row of the data has a teacher's side to learn from:\n{reasons}{self.shown()}\n"
                "Look at the teacher's chat template (dwakd.teacher.chat_template), or train "
                "without a teacher (dwakd.variant: sft)."
            )
        if taught < FEW * self.kept:
            LOG.warning(
                "Only %s of %s rows learn from the teacher, the others from labels alone:\n%s%s",
                taught,
                self.kept,
                reasons,
                self.shown(),
            )
        for side, count in self.unpaired_ends.items():
            if count > FEW * taught:
                other = "teacher" if side == "student" else "student"
                LOG.warning(
                    "In %s of %s rows the answer ends with a labelled token on the %s's side only, "
                    "so where to stop is learnt from the labels alone. See that the %s's chat "
                    "template ends a turn with a token that is learnt (%s).",
                    count,
                    taught,
                    side,
                    other,
                    "dwakd.teacher.chat_template" if other == "teacher" else "eot_tokens",
                )

    def shown(self) -> str:
        """How the sides' answers differ, an example for each kind; empty where none differ."""
        text = ""
        for kind, count in self.answers.items():
            if kind != SAME:
                text += f"\n  {count} rows: answers {kind}"
                for side, answer in zip(("student", "teacher"), self.examples[kind], strict=True):
                    text += f"\n    {side}: {answer!r}"
        return text

    def keep(self, folder: Path) -> None:
        """Saves the report beside the prepared rows, or reads it back when those were reused."""
        file = folder / "rows.json"
        if self.sources and folder.is_dir():
            replace_file(file, json.dumps(asdict(self), indent=1))
        elif not self.sources and file.is_file():
            try:
                self._read(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{file} is damaged ({error}). Remove the folder {folder}: its rows are "
                    "prepared again."
                ) from error

    def _read(self, saved: dict[str, Any]) -> None:
        for name in ("counts", "answers", "unpaired_ends", "example_rows", "unread"):
            found = saved.get(name, {}) if name in ("example_rows", "unread") else saved[name]
            getattr(self, name).update({str(k): int(n) for k, n in found.items()})
        self.sources.extend((str(path), int(start)) for path, start in saved["sources"])
        self.examples.update({k: (str(a), str(b)) for k, (a, b) in saved["examples"].items()})
        for what, (place, text) in saved.get("unread_examples", {}).items():
            self.unread_examples[what] = int(place), str(text)
        for name, own in saved.get("each", {}).items():
            self.each.setdefault(name, RowReport())._read(own)
