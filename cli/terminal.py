"""The terminal: other encodings than UTF-8, readers that leave early, and one kind of progress."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# What pictures and sentences use, where the output's encoding lacks it.
_ASCII = {
    "│": "|",
    "┆": ":",
    "·": ".",
    "⏎": "$",
    "⇥": ">",
    "␍": "<",
    "…": ".",
    "—": "-",
    "–": "-",
    "−": "-",
    "•": "*",
    "━": "-",
    "╸": "-",
    "╺": "-",
    "›": ">",
} | dict(zip("▁▂▃▄▅▆▇█", "_.-=+*%#", strict=True))
_ERRORS = "dwakd.nearest"


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """Lets standard output and error write whatever characters a message has.

    What the encoding lacks becomes ASCII of the same width. A reader that closes the pipe early,
    as `head` does, ends the process with 1 and without a word.
    """
    codecs.register_error(_ERRORS, _nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
    try:
        yield
    finally:
        # What is still buffered would fail at the interpreter's end, and say so.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                sys.exit(1)


def _nearest(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codecs error handler: ASCII for one character that cannot be encoded."""
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that isn't text: as it was
        return bytes([ord(character) - 0xDC00]), error.start + 1
    from rich.cells import cell_len

    if "\u2800" <= character <= "\u28ff":  # a spinner
        return "*", error.start + 1
    return _ASCII.get(character, "?" * cell_len(character)), error.start + 1


def progress_bar(
    console: Console,
    description: str = "{task.description}",
    count: str = "{task.completed}/{task.total}",
    width: int = 20,
) -> Progress:
    """A bar with elapsed and remaining time. `description` and `count` are Rich's formats."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn(description, markup=False),
        progress.BarColumn(bar_width=width),
        progress.TextColumn(count),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
    )


@contextlib.contextmanager
def work_stages(
    console: Console, description: str
) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yields a function that begins a stage of the work by its title, and ends the one before.

    What it returns hears (done, total) of the stage.
    """
    with progress_bar(console, description) as progress:
        current: list[TaskID] = []

        def begin(title: str) -> Callable[[int, int], None]:
            if current:
                progress.remove_task(current.pop())
            current.append(progress.add_task(title, total=None))
            task = current[0]
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield begin
        if current:
            progress.remove_task(current.pop())
