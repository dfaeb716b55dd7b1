"""Work in stages: a bar for each, a curve of what falls meanwhile, and the time left for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Result = TypeVar("Result")
Hear = Callable[[float, Sequence[float]], None]
"""Takes the share of a stage that is done, and the figures so far, which are drawn as a curve."""

_BLOCKS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float], width: int = 12) -> str:
    """Figures as blocks from the lowest to the highest, at most `width`: each the mean of a part.

    >>> curve([4.0, 3.0, 2.0, 1.0])
    '█▆▃▁'
    >>> curve([4.0, 4.0, 2.0, 2.0], width=2)
    '█▁'
    """
    count = min(width, len(values))
    edges = [round(part * len(values) / count) for part in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((m - low) / ((high - low) or 1.0) * top)] for m in means)


class Stages:
    """Shows stages as they run. `expected` is how long each takes, in any unit, in their order.

    The time left is what the stages to come were expected to take, at the pace of those that ran.
    Without a terminal there is a line where a stage begins and one where it ends.
    """

    def __init__(self, console: Console, expected: Mapping[str, float]) -> None:
        from rich import progress

        self.seconds: dict[str, float] = {}
        self._console = console
        self._expected = dict(expected)
        self._done = 0.0  # of what was expected, in stages that ran
        self._started = time.monotonic()
        self._bars = progress.Progress(
            progress.TextColumn("{task.description:<30}"),
            progress.BarColumn(bar_width=16),
            progress.TextColumn("{task.percentage:>3.0f}%"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("All of it", total=sum(expected.values()), note="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def run(self, name: str, title: str, work: Callable[[Hear], Result]) -> Result:
        """Does a stage's work, which is told how to say how far it is."""
        if not self._console.is_terminal:
            self._console.print(f"{title} …")
        bar = self._bars.add_task(title, total=1.0, note="")
        begin = time.monotonic()
        expected = self._expected.pop(name)

        def hear(share: float, figures: Sequence[float] = ()) -> None:
            note = f"loss {curve(figures)}" if figures else ""
            self._bars.update(bar, completed=share, note=note)
            self._show_all(expected * share)

        result = work(hear)
        self._bars.update(bar, completed=1.0)
        self._done += expected
        self.seconds[name] = round(time.monotonic() - begin, 1)
        self._show_all(0.0)
        if not self._console.is_terminal:
            self._console.print(f"{title}: {self.seconds[name]:.0f} s")
        return result

    def skip(self, name: str) -> None:
        """A stage that was done before: nothing is expected of it."""
        self._expected.pop(name)
        self._bars.update(self._all, total=self._done + sum(self._expected.values()))

    def _show_all(self, of_this: float) -> None:
        done, task = self._done + of_this, self._bars.tasks[0]
        left = (task.total or 0.0) - done
        seconds = left * (time.monotonic() - self._started) / done if done else None
        note = "" if seconds is None or left <= 0 else f"{time_left(seconds)} left"
        self._bars.update(self._all, completed=done, note=note)


def time_left(seconds: float) -> str:
    """
    >>> time_left(4), time_left(12), time_left(95), time_left(271)
    ('4 s', '10 s', '1.5 min', '4.5 min')
    """
    if seconds < 10:
        return f"{seconds:.0f} s"
    return f"{round(seconds, -1):.0f} s" if seconds < 60 else f"{round(seconds / 30) / 2:g} min"
