"""The console that every command writes to: what it is given is text, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from dwakd_plugin.errors import printable


class PlainConsole(Console):
    """Reads no markup and no emoji names in texts, and lets no control character through.

    Names, prompts and answers are others' words: `[/red]` in them is three syllables and not a
    style, and an escape sequence is shown, not obeyed.
    """

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(
            stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False
        )

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **kwargs):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)
