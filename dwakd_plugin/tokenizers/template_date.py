"""The day that chat templates print, which is today's in those that ask `strftime_now`.

A run renders its rows on one day and is evaluated on another: where the two differ, the model reads
prompts that it was not trained on, and an evaluation that goes on the next day has other prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import date, datetime, time, tzinfo

from dwakd_plugin.errors import UserError


@contextlib.contextmanager
def template_date(day: date) -> Iterator[None]:
    """While open, chat templates take `day`, at noon, for now."""
    from transformers.utils import chat_template_utils

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Frozen:
            return cls.combine(day, time(12), tz)

    real = chat_template_utils.datetime
    chat_template_utils.datetime = Frozen
    try:
        yield
    finally:
        chat_template_utils.datetime = real


def today() -> date:
    """What templates take for today."""
    from transformers.utils import chat_template_utils

    return chat_template_utils.datetime.now().date()


def read_date(text: object, file: object) -> date:
    """A day as a record has it, YYYY-MM-DD. Raises UserError that names the file."""
    try:
        return date.fromisoformat(str(text))
    except ValueError as error:
        raise UserError(f"{file} is damaged: its date is `{text}`.") from error
