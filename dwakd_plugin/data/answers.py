"""Whether both sides of a row have the same answers: their labelled texts, turn by turn.

Each side renders a row by its own chat template, and templates leave out what they don't know: the
reasoning of earlier turns, tool calls, a late system message. The student would then learn from
what the teacher says about another text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import ne
from typing import Any

from dwakd_plugin.tokenizers.same_text import spelling, substance

SAME = "the same"
SPELLING = "the same but for white space or spelling"
REASONING = "different in their reasoning"
TURNS = "different in how many turns are answered"
TEXT = "different in their text"
MESSAGES = "to other messages: a side's chat template leaves one out, or moves it"
TOOLS = "to other tools: a side's chat template leaves the row's tools out"
TORN = "torn: a side's chat template takes a quoted </think> for the end of a reasoning"
# More than spelling: the two sides learn from different answers.
DIFFERENT = (REASONING, TURNS, TEXT, MESSAGES, TOOLS, TORN)

# The end of a reasoning, as models write it. Its opening may be missing: some templates write that
# themselves, and it isn't part of what is learnt.
_REASONING = re.compile(r".*(?:</(?:think|thinking|reasoning)>|<\|end_of_thought\|>)", re.DOTALL)
# A reasoning where it belongs, from the beginning of a message to the first end.
_OWN_REASONING = re.compile(
    r"\A\s*<(think|thinking|reasoning)>.*?</\1>|\A\s*<\|begin_of_thought\|>.*?<\|end_of_thought\|>",
    re.DOTALL,
)
_OPENED = re.compile(r"\A\s*(?:<(?:think|thinking|reasoning)>|<\|begin_of_thought\|>)")
_ANSWERING = ("assistant", "gpt", "model")
_LONGEST = 160  # characters of an answer in an example
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Answers:
    """One side's answers to a row: the text of each run of labels, without what ends a turn."""

    turns: tuple[str, ...]
    has_end: bool  # whether the last turn has a labelled end


class AnswerReader:
    """Reads the answers of one side back from its token ids. `ends` are texts that end a turn."""

    def __init__(self, tokenizer: Any, ends: Sequence[str]) -> None:
        self._decode = tokenizer.decode
        self._special = {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._special |= {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.content in ends
        }

    def text(self, ids: Sequence[int]) -> str:
        """All of a row, prompt and markup included."""
        return str(self._decode(ids, clean_up_tokenization_spaces=False))

    def read(self, ids: Sequence[int], labels: Sequence[int]) -> Answers:
        """Of a row: ids and labels (L,), −100 where nothing is learnt."""
        turns: list[Sequence[int]] = []
        begin = 1
        for learnt, run in groupby(labels[1:], partial(ne, -100)):
            end = begin + sum(1 for _ in run)
            if learnt:
                turns.append(ids[begin:end])
            begin = end
        texts = [
            turn
            if self._special.isdisjoint(turn)
            else [token for token in turn if token not in self._special]
            for turn in turns
        ]
        return Answers(
            tuple(self._decode(text, clean_up_tokenization_spaces=False) for text in texts),
            bool(turns) and not self._special.isdisjoint(turns[-1]),
        )


def last_answer(labels: Sequence[int]) -> tuple[int, int]:
    """Where the last run of labels other than −100 begins and ends; (0, 0) where there is none."""
    end = len(labels)
    while end and labels[end - 1] == -100:
        end -= 1
    begin = end
    while begin and labels[begin - 1] != -100:
        begin -= 1
    return begin, end


def compare(student: Answers, teacher: Answers) -> str:
    """How the answers of a row's two sides differ: `SAME`, ..., `TEXT`."""
    if student.turns == teacher.turns:
        return SAME
    own, others = _with_text(student.turns), _with_text(teacher.turns)
    if [substance(turn) for turn in own] == [substance(turn) for turn in others]:
        return SPELLING
    if [_unreasoned(turn) for turn in own] == [_unreasoned(turn) for turn in others]:
        return REASONING
    return TURNS if len(own) != len(others) else TEXT


def tool_names(tools: Any) -> set[str]:
    """The names of a row's tools; none where it has none, or they are in no known form."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return set()
    names = set()
    for tool in tools if isinstance(tools, list) else []:
        tool = tool.get("function", tool) if isinstance(tool, dict) else {}
        name = tool.get("name") if isinstance(tool, dict) else None
        if isinstance(name, str) and name:
            names.add(name)
    return names


def said(turns: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What each message of a conversation says, in the forms in which a template may write it; an
    answer without its reasoning. Messages without text are left out."""
    found = []
    for turn in turns:
        text = turn.get("content")
        if turn.get("role") in _ANSWERING and isinstance(text, str):
            text = without_reasoning(text)
        if isinstance(text, str) and substance(text):
            escaped = [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
            forms = (text, *escaped) if turn.get("role") == "tool" else (text,)
            found.append(tuple(dict.fromkeys(map(substance, forms))))
    return found


def order(messages: Sequence[tuple[str, ...]], rendered: str) -> list[int]:
    """The numbers of messages, as `said` has them, in the order in which a rendered row has them;
    without those that it leaves out."""
    text, at = spelling(rendered), 0
    places: dict[int, int] = {}
    for number, forms in enumerate(messages):
        ahead = [(text.find(form, at), form) for form in forms]
        place, form = next((each for each in ahead if each[0] >= 0), (-1, ""))
        if place >= 0:
            at = place + len(form)
        else:  # moved, or not there
            place = max(text.find(form) for form in forms)
        if place >= 0:
            places[number] = place
    return sorted(places, key=lambda number: places[number])


def misplaced(messages: Sequence[tuple[str, ...]], found: Sequence[int]) -> str:
    """In words, what a side with its messages in an `order` leaves out or moves; "" if nothing."""
    left_out = [forms[0] for number, forms in enumerate(messages) if number not in found]
    if left_out:
        return f"leaves out {shortened(left_out[0])!r}"
    for due, number in enumerate(found):
        if due != number:
            rest = [each for each in found if each != due]
            return f"moves {shortened(messages[due if rest == sorted(rest) else number][0])!r}"
    return ""


def unread_reasoning(
    messages: Sequence[Any], thinking: str | None, rendered: Sequence[str]
) -> dict[str, str]:
    """The reasoning in a row's messages that no rendering of the row has: by its field, the first.

    `thinking` is what the data set calls it, beside the usual names.
    """
    texts = [spelling(text) for text in rendered]
    turns = [each for each in messages if isinstance(each, dict)]
    contents = [spelling(str(turn.get("content", turn.get("value")))) for turn in turns]
    found: dict[str, str] = {}
    for turn in turns:
        for name in {*_REASONING_FIELDS, thinking}:
            text = turn.get(name)
            if not isinstance(text, str) or not (wanted := substance(text)):
                continue
            beside = sum(content.count(wanted) for content in contents)  # asked or answered, too
            if all(each.count(wanted) <= beside for each in texts):
                found.setdefault(str(name), shortened(text))
    return found


def quoting_answers(messages: Any) -> list[str]:
    """What the assistant's messages of a row say behind their reasoning, of those that quote the
    end of one there."""
    found = []
    for message in messages if isinstance(messages, list) else []:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        text = message.get("content", message.get("value")) if role in _ANSWERING else None
        if isinstance(text, str):
            answer = _OWN_REASONING.sub("", text, count=1)
            if _REASONING.match(answer):
                found.append(answer)
    return found


def without_reasoning(text: str) -> str | None:
    """An answer behind its own reasoning; None where that has no end.

    >>> without_reasoning("<think>Hm.</think> Yes."), without_reasoning("<think>Hm.")
    (' Yes.', None)
    """
    rest = _OWN_REASONING.sub("", text, count=1)
    return None if _OPENED.match(rest) else rest


def lacks(answers: Answers, text: str) -> bool:
    """Whether no turn of a side has all of a text."""
    wanted = substance(text)
    return not any(wanted in substance(turn) for turn in answers.turns)


def example(student: Answers, teacher: Answers) -> tuple[str, str]:
    """The first turn in which the sides differ, shortened to be shown: the student's, and the
    teacher's; empty where a side has no such turn."""
    own, others = student.turns, teacher.turns
    for index in range(max(len(own), len(others))):
        sides = [turns[index] if index < len(turns) else "" for turns in (own, others)]
        if substance(sides[0]) != substance(sides[1]):
            return shortened(sides[0]), shortened(sides[1])
    return shortened("".join(own)), shortened("".join(others))


def _with_text(turns: Sequence[str]) -> list[str]:
    """A turn without text has no place to compare, and nothing to learn but its end."""
    return [turn for turn in turns if turn.strip()]


def _unreasoned(text: str) -> str:
    return substance(_REASONING.sub("", text))


def shortened(text: str) -> str:
    """A text as an example shows it."""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
