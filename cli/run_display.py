"""What a person sees of a run: a table that fills, and what is going on; or a line a step."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from rich.text import Text

from dwakd_cli.stages import curve, time_left
from dwakd_plugin.train.progress import Follower

if TYPE_CHECKING:
    from rich.console import Console

ROWS = 40  # of a run, in the table: so many fit a screen
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Column(NamedTuple):
    """A figure of a log line: its title, and the names that it may have there, first come."""

    title: str
    names: tuple[str, ...]
    form: str


# In the order in which a narrow terminal keeps them.
FIGURES = (
    Column("ce", ("ce", "loss"), "{:.3f}"),
    Column("eval", ("eval_ce", "eval_loss"), "{:.3f}"),
    Column("t2s accuracy", ("t2s_accuracy",), "{:.0%}"),
    Column("teacher ce", ("teacher_ce",), "{:.3f}"),
    Column("paired", ("paired_share",), "{:.0%}"),
    Column("tokens/s", ("tokens/s",), "{:,.0f}"),
)
LEFT = "left"


class RunDisplay:
    """Shows what a run tells in `file`; is called now and then while it runs.

    On a terminal rows of a table stay, and the last line says what is going on; else, or with
    `plain`, each line that the trainer logs is a line. `error` is what the run ended with.
    """

    def __init__(self, console: Console, file: Path, *, plain: bool, evaluates: bool) -> None:
        self.error: str | None = None
        self._console, self._lines = console, Follower(file)
        self._evaluates = evaluates
        self._started = time.monotonic()
        self._doing = "axolotl starts"
        self._begun: tuple[int, float] | None = None  # the run's first step, and its time
        self._warm = False
        self._step = self._steps = 0
        self._labels, self._since = 0.0, 0.0
        self._figures: dict[str, float] = {}
        self._curve: list[float] = []
        self._seen: set[Column] = set()
        self._columns: list[Column] = []
        self._next_row = 0
        self._live: Any = None
        if not plain and console.is_terminal and not console.is_dumb_terminal:
            from rich.live import Live

            # Drawn anew by each call: a thread would draw in the midst of others' words.
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self()
        if self._live is not None:
            self._live.stop()

    def __call__(self) -> None:
        try:
            for line in self._lines.news():
                self._hear(line)
            if self._live is not None:
                self._live.update(self._now(), refresh=True)
        except (BrokenPipeError, SystemExit):  # rich's way to say that the reader has left
            self._console.quiet = True

    # What was told ------------------------------------------------------------------------------

    def _hear(self, line: dict[str, Any]) -> None:
        if "said" in line:
            self._console.print(line["said"], soft_wrap=True)
        if "doing" in line:
            if self._live is None and line["doing"] != self._doing:
                self._console.print(f"{line['doing']} …")
            self._doing = line["doing"]
        if "warning" in line:
            self._console.print(Text(line["warning"], style="yellow"))
        self.error = line.get("error", self.error)
        self._labels += line.get("labels", 0)
        if "step" in line:
            self._hear_step(line)

    def _hear_step(self, line: dict[str, Any]) -> None:
        self._step, self._steps, now = line["step"], line["steps"], line["time"]
        if self._begun is None:
            self._begun, self._since = (self._step, now), now
        elif self._step == self._begun[0] + 1 and not self._warm:
            self._begun, self._warm = (self._step, now), True  # the first step takes longer
        if "loss" not in line and "eval_loss" not in line:
            return
        figures = {key: each for key, each in line.items() if key not in ("step", "steps", "time")}
        if "loss" in line:
            if self._labels and now > self._since:
                figures["tokens/s"] = self._labels / (now - self._since)
            self._labels = 0.0
            self._curve.append(figures.get("ce", line["loss"]))
        self._since = now  # an evaluation's seconds are not training's
        self._figures = figures
        if self._live is None:
            self._console.print(self._line(), soft_wrap=True)
        elif "loss" not in line:
            self._add_row()
        elif self._step >= min(self._next_row, self._steps):
            self._next_row = self._step + max(1, -(-self._steps // ROWS))
            self._add_row()

    # What is shown ------------------------------------------------------------------------------

    def _written(self, column: Column) -> str:
        found = (self._figures[name] for name in column.names if name in self._figures)
        value = next(found, None)
        return "" if value is None else column.form.format(value)

    def _left(self) -> str:
        """The time left by the pace since the first step, evaluations and checkpoints included."""
        first, began = self._begun or (0, 0.0)
        done = self._step - first
        if not done:
            return ""
        pace = (time.time() - began) / done
        return time_left((self._steps - self._step) * pace)

    def _line(self) -> str:
        """The figures of a log line, in a line."""
        words = [f"step {self._step}/{self._steps}"]
        for column in FIGURES:
            if text := self._written(column):
                after = column.title == "tokens/s"
                words.append(f"{text} tokens/s" if after else f"{column.title} {text}")
        if left := self._left():
            words.append(f"{left} left")
        return "  ".join(words)

    def _add_row(self) -> None:
        new = {each for each in FIGURES if self._written(each)} - self._seen
        if new:
            self._seen |= new
            shown = [each for each in FIGURES if each in self._seen or self._awaited(each)]
            while len(shown) > 2 and _width(shown) > self._console.width:
                shown.pop()
            self._columns = shown
            titles = _row("step", [each.title for each in shown], shown, LEFT)
            self._print_row(Text(titles, style="bold"))
        cells = [self._written(each) for each in self._columns]
        self._print_row(Text(_row(str(self._step), cells, self._columns, self._left())))

    def _print_row(self, row: Text) -> None:
        self._console.print(row, no_wrap=True, overflow="crop")

    def _awaited(self, column: Column) -> bool:
        """Whether its figure comes, though it isn't there yet: an evaluation may be first."""
        return column.title in ("ce", "tokens/s") or (self._evaluates and column.title == "eval")

    def _now(self) -> Text:
        """The last line: what is going on."""
        seconds = time.monotonic() - self._started
        if not self._step:
            sign = _SPINNER[int(seconds * 5) % len(_SPINNER)]
            text = f"{sign} {self._doing}  {seconds:.0f} s"
        else:
            words = [f"step {self._step}/{self._steps}"]
            if self._curve:
                words.append(f"ce {curve(self._curve)} {self._curve[-1]:.3f}")
            if left := self._left():
                words.append(f"{left} left")
            text = "  ".join(words)
        return Text(text, no_wrap=True, overflow="crop", style="cyan")


def _row(step: str, cells: list[str], columns: list[Column], left: str) -> str:
    widths = [max(8, len(column.title)) for column in columns]
    row = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
    return "  ".join([f"{step:>6}", *row, f"{left:>8}"])


def _width(columns: list[Column]) -> int:
    return len(_row("", [""] * len(columns), columns, ""))
