"""One row tokenised for both sides by axolotl's own strategies, and judged: does it train, on what.

Of each pair the first is the student's, the second the teacher's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from operator import ne
from typing import Any

from axolotl.utils.dict import remove_none_values

from dwakd_plugin.data.answers import (
    DIFFERENT,
    MESSAGES,
    TOOLS,
    TORN,
    AnswerReader,
    Answers,
    compare,
    example,
    lacks,
    misplaced,
    order,
    quoting_answers,
    said,
    shortened,
    tool_names,
    unread_reasoning,
)
from dwakd_plugin.data.row_report import (
    CUT,
    DROPPED_DIFFERENT,
    KEPT,
    LABELS_CUT,
    LABELS_DIFFERENT,
    LABELS_ONLY,
    NO_RESPONSE,
    STUDENT_TOO_LONG,
    STUDENT_TRUNCATED,
    TAUGHT,
    TEACHER_TOO_LONG,
)
from dwakd_plugin.errors import UserError, first_line
from dwakd_plugin.tokenizers.alignment import TokenAligner

STATUS_COLUMN = "dwakd_status"
ANSWERS_COLUMN = "dwakd_answers"  # JSON: how the two sides' answers differ, and an example


class DualStrategy:
    """A tokenising strategy for axolotl's data set wrapper that runs two, and judges the row."""

    supports_batched = False

    def __init__(
        self,
        student: Any,
        teacher: Any,
        name: str,
        *,
        readers: tuple[AnswerReader, AnswerReader],
        lengths: tuple[int, int],
        excess_length: str,
        aligner: TokenAligner | None,  # where rows are truncated
        different_answers: str,
        messages: str,
        tools: str,
        thinking: str | None,
        teacher_name: str,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.name = name
        self.readers = readers
        self.student_len, self.teacher_len = lengths
        self.excess_length = excess_length
        self.aligner = aligner
        self.different_answers = different_answers
        self.messages = messages
        self.tools = tools
        self.thinking = thinking
        self.teacher_name = teacher_name
        self.filter_rows = getattr(student, "filter_rows", None)

    def tokenize_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        row = dict(row)  # which decodes it
        # Strategies may edit the row in place, and both must see what the user wrote.
        student = dict(self._tokenize(self.student, copy.deepcopy(row), "student"))
        teacher = dict(self._tokenize(self.teacher, copy.deepcopy(row), "teacher"))
        status = self._status(student, teacher, row)
        answers: dict[str, Any] = {}
        if status == KEPT:
            status, answers = self._compare(student, teacher, row)
        if self.aligner is not None:
            if status == KEPT and not self._fits(student, teacher):
                status = self._cut_alike(student, teacher, self.aligner)
            _cut(teacher, self.teacher_len)  # axolotl cuts the student's side
        learns = status in TAUGHT
        return {
            **student,
            "teacher_input_ids": teacher["input_ids"],
            "teacher_labels": teacher["labels"] if learns else [-100] * len(teacher["labels"]),
            STATUS_COLUMN: status,
            ANSWERS_COLUMN: json.dumps(answers),
        }

    def _tokenize(self, strategy: Any, row: dict[str, Any], side: str) -> dict[str, Any]:
        try:
            tokens = strategy.tokenize_prompt(row)
            ids, labels = tokens["input_ids"], tokens["labels"]
        except Exception as error:  # strategies and templates raise whatever they like
            lacking = self._lacking(row, side, error)
            why = lacking or f"{type(error).__name__}: {first_line(error)}"
            words = f"A row of {self.name} doesn't fit its type: {why}"
            if lacking is None and side == "teacher":
                words = (
                    f"The teacher ({self.teacher_name}) cannot render a row of {self.name} that "
                    f"the student can: {why}\nGive the teacher another template "
                    "(dwakd.teacher.chat_template), or leave out what its own refuses."
                )
            raise UserError(f"{words}\nThe row: {_preview(row)}") from error
        if len(ids) != len(labels) or not all(
            issubclass(kind, int) for kind in set(map(type, ids))
        ):
            raise UserError(
                f"A row of {self.name} does not become one sequence of tokens, so its two sides "
                "cannot be paired. Give each field as one text, and use `type: alpaca`, "
                f"`type: chat_template` or `type: input_output`.\nThe row: {_preview(row)}"
            )
        return tokens

    def _lacking(self, row: dict[str, Any], side: str, error: Exception) -> str | None:
        """What a conversation lacks that templates ask for; None where it is something else."""
        name, keys = self.messages, getattr(self.student, "prompter", None)
        keys = getattr(keys, "message_property_mappings", {})
        role, content = keys.get("role", "role"), keys.get("content", "content")
        if name not in row:
            if not hasattr(self.student, "get_conversation_thread"):
                return None
            return f"it has no `{name}`, but {', '.join(row)}; name its conversation field_messages"
        turns = row[name]
        if not turns:
            return f"`{name}` is empty, and there is nothing to learn from"
        if not isinstance(turns, list):
            return f"`{name}` is {type(turns).__name__}, and must be a list of messages"
        for number, turn in enumerate(turns, start=1):
            where = f"message {number} of `{name}`"
            if not isinstance(turn, dict):
                return f"{where} isn't a mapping with a role and a content"
            if not {role, content} & turn.keys():
                return (
                    f"{where} has neither `{role}` nor `{content}`, but {', '.join(turn)}; say "
                    "which is which, as in message_property_mappings: {role: from, content: value}"
                )
            if turn.get(role) is None:
                return f"{where} has no {role}"
            where, said = f"{where} ({turn[role]})", turn.get(content)
            if said is None and not turn.get("tool_calls"):
                return f"{where} has no {content}"
            if said is None and "content" in str(error):
                return (
                    f"{where} has calls of tools and no {content}, which the {side}'s template "
                    'asks for; write "" there, or take a template that knows tools'
                )
            if said is not None and not isinstance(said, (str, list)):
                return f"{where} has the {type(said).__name__} {said} as {content}; write a text"
        return None

    def _status(self, student: dict[str, Any], teacher: dict[str, Any], row: Any) -> str:
        if not _has_response(student["labels"]):
            return NO_RESPONSE
        truncate = self.aligner is not None
        sides = {"student": (student, self.student_len), "teacher": (teacher, self.teacher_len)}
        for side, (tokens, length) in sides.items():
            if len(tokens["input_ids"]) > length and self.excess_length == "raise":
                key = "sequence_len" if side == "student" else "dwakd.teacher.sequence_len"
                raise UserError(
                    f"A row of {self.name} has {len(tokens['input_ids'])} tokens on the {side}'s "
                    f"side, and {key} is {length} (excess_length_strategy: raise). Raise it, or "
                    f"have long rows dropped or truncated.\nThe row: {_preview(row)}"
                )
        if len(student["input_ids"]) > self.student_len:
            if not truncate:
                return STUDENT_TOO_LONG
            if not _has_response(student["labels"][: self.student_len]):
                return STUDENT_TRUNCATED
        teacher_labels = teacher["labels"]
        if len(teacher["input_ids"]) > self.teacher_len:
            if not truncate:
                return TEACHER_TOO_LONG
            teacher_labels = teacher_labels[: self.teacher_len]
        return KEPT if _has_response(teacher_labels) else LABELS_ONLY

    def _fits(self, student: dict[str, Any], teacher: dict[str, Any]) -> bool:
        fits_student = len(student["input_ids"]) <= self.student_len
        return fits_student and len(teacher["input_ids"]) <= self.teacher_len

    def _cut_alike(
        self, student: dict[str, Any], teacher: dict[str, Any], aligner: TokenAligner
    ) -> str:
        """Cuts both sides behind the last byte of the answers where a token of each ends and fits:
        soft-DTW and the pairs of tokens take it that both end with the same text."""
        ends = aligner.common_ends(
            student["input_ids"], student["labels"], teacher["input_ids"], teacher["labels"]
        )
        fitting = [(s, t) for s, t in ends if s <= self.student_len and t <= self.teacher_len]
        if not fitting:
            return LABELS_CUT
        for side, end in zip((student, teacher), fitting[-1], strict=True):
            _cut(side, end)
        return CUT

    def _compare(
        self, student: dict[str, Any], teacher: dict[str, Any], row: Any
    ) -> tuple[str, dict[str, Any]]:
        """The row's status by what its two sides answer, and how these answers differ."""
        own, others = (
            reader.read(side["input_ids"], side["labels"])
            for reader, side in zip(self.readers, (student, teacher), strict=True)
        )
        kind = compare(own, others)
        answers: dict[str, Any] = {"kind": kind}
        if own.has_end != others.has_end:
            answers["end"] = "student" if own.has_end else "teacher"
        if own.turns != others.turns:
            answers["example"] = example(own, others)
        texts: list[str] = []
        if not row.keys().isdisjoint((self.messages, self.tools)):
            sides = zip(self.readers, (student, teacher), strict=True)
            texts = [reader.text(side["input_ids"]) for reader, side in sides]
        messages, *orders = self._messages(texts, row)
        if kind not in DIFFERENT and orders[0] != orders[1]:
            kind = answers["kind"] = MESSAGES
            answers["example"] = [misplaced(messages, each) for each in orders]
        answers["unread"] = self._unread(student, texts, row)
        if orders[0] == orders[1] and len(orders[0]) < len(messages):
            answers["unread"]["a message"] = misplaced(messages, orders[0])
        for found, shown in self._other_differences(student, teacher, (own, others), texts, row):
            kind = answers["kind"] = found
            answers["example"] = shown
        if kind not in DIFFERENT:
            return KEPT, answers
        if self.different_answers == "stop":
            student_text, teacher_text = answers["example"]
            raise UserError(
                f"The two sides of a row of {self.name} answer differently ({kind}), and "
                f"dwakd.different_answers is stop.\n  student: {student_text!r}\n"
                f"  teacher: {teacher_text!r}\nThe row: {_preview(row)}"
            )
        dropped = self.different_answers == "drop"
        return DROPPED_DIFFERENT if dropped else LABELS_DIFFERENT, answers

    def _messages(
        self, texts: list[str], row: Any
    ) -> tuple[list[tuple[str, ...]], list[int], list[int]]:
        """What a row's messages say, and in which order the two sides read them."""
        if not hasattr(self.student, "get_conversation_thread"):  # both have the same prompt
            return [], [], []
        turns = self.student.get_conversation_thread(remove_none_values(copy.deepcopy(row)))
        messages = said(turns)
        own, theirs = (order(messages, text) for text in texts)
        return messages, own, theirs

    def _unread(self, student: dict[str, Any], texts: list[str], row: Any) -> dict[str, str]:
        """What of a row's messages neither side reads, by what it is: an example."""
        turns = row.get(self.messages)
        if not isinstance(turns, list):
            return {}
        found = {
            f"reasoning (`{name}`)": text
            for name, text in unread_reasoning(turns, self.thinking, texts).items()
        }
        calls = [each.get("tool_calls") for each in turns if isinstance(each, dict)]
        if names := set[str]().union(*map(tool_names, calls)):
            without = [{k: v for k, v in turn.items() if k != "tool_calls"} for turn in turns]
            if not any(name in text for name in names for text in texts) or self._is_unchanged(
                self.student, student["input_ids"], {**row, self.messages: without}
            ):
                found["calls of tools (`tool_calls`)"] = ", ".join(sorted(names))
        return found

    def _is_unchanged(self, strategy: Any, ids: list[int], row: dict[str, Any]) -> bool:
        """Whether a side's tokens are those of a row that lacks something."""
        with suppress(Exception):  # templates raise whatever they like: this one needs it
            return bool(strategy.tokenize_prompt(copy.deepcopy(row))["input_ids"] == ids)
        return False

    def _left_out(self, names: set[str], strategy: Any, ids: list[int], text: str, row: Any) -> Any:
        """Which of a row's tools a side (its strategy, ids and text) was not told of, sorted.

        Questions and calls name tools too: a side is told of some where it reads less without.
        """
        left_out = sorted(name for name in names if name not in text)
        if not left_out:
            without = {key: value for key, value in row.items() if key != self.tools}
            if self._is_unchanged(strategy, ids, without):
                return sorted(names)
        return left_out

    def _other_differences(
        self,
        student: dict[str, Any],
        teacher: dict[str, Any],
        answers: tuple[Answers, Answers],
        texts: list[str],
        row: Any,
    ) -> Iterator[tuple[str, tuple[str, str]]]:
        """What a side lost that no comparison of the answers alone shows, with an example."""
        for text in quoting_answers(row.get(self.messages)):
            if any(lacks(side, text) for side in answers):
                shown = [next(iter(side.turns[-1:]), "") for side in answers]
                yield TORN, (shortened(shown[0]), shortened(shown[1]))
        if names := tool_names(row.get(self.tools)):
            sides = (student["input_ids"], teacher["input_ids"])
            strategies = zip((self.student, self.teacher), sides, texts, strict=True)
            left_out = [self._left_out(names, *each, row) for each in strategies]
            if any(left_out):
                words = [f"leaves out {', '.join(some)}" if some else "" for some in left_out]
                yield TOOLS, (words[0], words[1])


def _cut(side: dict[str, Any], length: int) -> None:
    """Leaves a side's first tokens, with all that it has of each (labels, attention mask)."""
    whole = len(side["input_ids"])
    side.update({k: v[:length] for k, v in side.items() if isinstance(v, list) and len(v) == whole})


def _has_response(labels: list[int]) -> bool:
    """Whether any position predicts something: the first label has no position before it."""
    return any(map(partial(ne, -100), labels[1:]))


def _preview(row: dict[str, Any], limit: int = 200) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[:limit] + " …"
