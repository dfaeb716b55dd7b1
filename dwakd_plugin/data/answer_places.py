"""Where a row has its answer, and the same row with another one there.

Instruction types have it in one text field, whatever that is called: it is found by trying. Chats
have it in their last assistant's message, or behind a message that nobody has answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PROBE = "Qx7Answer"  # an answer that no data has
_DEFAULT_FIELD = "output"  # of rows that bring no answer
# What belongs to an answer and not to its message: another answer has none of it.
_OF_THE_OLD_ANSWER = frozenset({"reasoning_content", "reasoning", "thinking", "tool_calls"})


class ToolCall(Exception):
    """The row's last answer is a call of a tool, which a text cannot take the place of."""


@dataclass(frozen=True)
class FieldPlace:
    """One field of the row, a text."""

    name: str

    def put(self, row: Mapping[str, Any], answer: str) -> dict[str, Any]:
        return {**row, self.name: answer}

    def without_prompt(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """A row that asks nothing, answered: a prompt like its own is none."""
        empty = {key: "" if isinstance(value, str) else value for key, value in row.items()}
        return self.put(empty, PROBE)

    def has_answer(self, row: Mapping[str, Any]) -> bool:
        return bool(row.get(self.name))


@dataclass(frozen=True)
class MessagesPlace:
    """The last assistant's message. `roles` maps the data's names of roles to the template's."""

    name: str = "messages"
    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=dict)
    thinking: str | None = None  # what a message's reasoning is called, beside the usual names

    def put(self, row: Mapping[str, Any], answer: str) -> dict[str, Any]:
        """The row up to its last answer, that one replaced. Raises ToolCall, and ValueError where
        the messages are no list of mappings or nobody asks anything."""
        messages = self._messages(row)
        asked, old = self._asked(messages)
        if not any(self._says(each) for each in asked if self._is(each, "user", "tool")):
            raise ValueError("nobody asks anything before the answer")
        if old is None:
            old = {self.role: self._assistant(messages)}
        elif old.get("tool_calls") and not self._says(old):
            raise ToolCall
        dropped = _OF_THE_OLD_ANSWER | {self.thinking}
        new = {key: value for key, value in old.items() if key not in dropped}
        # One shape of contents a file: a reader of JSON takes texts or lists of parts.
        parts = any(isinstance(each.get(self.content), list) for each in messages)
        new[self.content] = [{"type": "text", "text": answer}] if parts else answer
        answered = [*asked, new]
        as_text = isinstance(row.get(self.name), str)
        return {**row, self.name: json.dumps(answered) if as_text else answered}

    def has_answer(self, row: Mapping[str, Any]) -> bool:
        return self._asked(self._messages(row))[1] is not None

    def without_prompt(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """None: `put` has looked whether somebody asks."""
        return None

    def _messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = row.get(self.name)
        messages = json.loads(found) if isinstance(found, str) else found
        if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
            raise ValueError(f"`{self.name}` isn't a list of messages")
        return [_without_none(message) for message in messages]

    def _asked(self, messages: list[dict[str, Any]]) -> tuple[list[Any], dict[str, Any] | None]:
        """What stands before the last answer, and that answer; None where it has yet to come."""
        if messages and self._is(messages[-1], "user", "tool"):
            return messages, None
        for place in reversed(range(len(messages))):
            if self._is(messages[place], "assistant"):
                return messages[:place], messages[place]
        return messages, None

    def _is(self, message: dict[str, Any], *roles: str) -> bool:
        own = message.get(self.role)
        return self.roles.get(str(own), own) in roles

    def _says(self, message: dict[str, Any]) -> bool:
        content = message.get(self.content)
        return bool(content.strip() if isinstance(content, str) else content)

    def _assistant(self, messages: list[dict[str, Any]]) -> str:
        """What this conversation calls the assistant, or would."""
        for message in messages:
            if self._is(message, "assistant"):
                return str(message[self.role])
        human = any(message.get(self.role) == "human" for message in messages)
        return "gpt" if human else "assistant"


Place = FieldPlace | MessagesPlace


def find_field(row: Mapping[str, Any], answer_of: Callable[[dict[str, Any]], str | None]) -> Any:
    """The field of an instruction row whose text is the answer; None where no one is.

    `answer_of` says what a row answers, None where it cannot be rendered.
    """
    names = [key for key, value in row.items() if value is None or isinstance(value, str)]
    for name in dict.fromkeys([_DEFAULT_FIELD, *names]):
        found = answer_of({**row, name: PROBE})
        if found is not None and found.strip() == PROBE:
            return FieldPlace(name)
    return None


def _without_none(value: Any) -> Any:
    """What Arrow adds to a message is left out: keys that other messages of the file have."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
