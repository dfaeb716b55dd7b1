"""What a run shows: rows of a table, lines without a terminal, and what it says to a person."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwakd_cli.console import PlainConsole
from dwakd_cli.logged_run import end_of
from dwakd_cli.run_display import ROWS, RunDisplay
from dwakd_plugin.train.progress import Follower
from tests.conftest import ROWS as DATA
from tests.conftest import write_rows

Recipe = Callable[..., dict[str, Any]]
COMMAND = [sys.executable, "-m", "dwakd_cli"]


class Run:
    """A run that tells its steps, and the display of it."""

    def __init__(self, folder: Path, *, columns: int = 80, terminal: bool = True) -> None:
        self.file = folder / "progress.jsonl"
        self.console = PlainConsole()
        self.console.file = io.StringIO()
        self.console._force_terminal, self.console.width = terminal, columns
        self.console.is_interactive, self.console._environ = terminal, {"TERM": "xterm"}
        self.display = RunDisplay(self.console, self.file, plain=not terminal, evaluates=True)

    def tell(self, **facts: Any) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(facts) + "\n")
        self.display()

    def step(self, step: int, steps: int, **figures: float) -> None:
        self.tell(labels=500)
        self.tell(step=step, steps=steps, time=1000.0 + 2 * step, **figures)

    @property
    def text(self) -> str:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue()

    @property
    def rows(self) -> list[list[str]]:
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text)
        return [line.split() for line in plain.splitlines() if re.match(r" +\d+ ", line)]


def test_a_table_fills(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.display:
        run.tell(doing="Loading the teacher")
        assert "Loading the teacher" in run.text
        run.tell(said="Distillation is on [bold]")
        run.tell(step=0, steps=400, time=1000.0)
        for step in range(1, 401):
            run.step(step, 400, loss=9.0, ce=4 - step / 200, paired_share=0.9, gate=0.1)
            if step == 100:
                run.tell(step=100, steps=400, time=1200.0, eval_loss=2.5, eval_ce=2.25)
        run.tell(warning="Step 9: nothing is learnt")
    assert "Distillation is on [bold]" in run.text and "nothing is learnt" in run.text
    assert re.search(r"step +ce +eval +paired +tokens/s +left", run.text)
    assert ROWS <= len(run.rows) <= ROWS + 2  # the evaluation's, too
    assert run.rows[0][:4] == ["1", "3.995", "90%", "250"]
    assert ["101", "3.495", "90%", "250"] in [row[:4] for row in run.rows]
    assert ["100", "2.250"] in [row[:2] for row in run.rows]
    assert run.rows[-1][0] in ("391", "400")
    assert "█" in run.text and "▁" in run.text  # the curve falls


def test_a_narrow_terminal_keeps_what_matters(tmp_path: Path) -> None:
    run = Run(tmp_path, columns=40)
    with run.display:
        run.tell(step=0, steps=4, time=1000.0)
        run.step(1, 4, loss=9.0, ce=2.0, t2s_accuracy=0.5, teacher_ce=1.0, paired_share=0.9)
    assert re.search(r"step +ce +eval +left", run.text)
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", run.text))
    assert max(map(len, lines)) <= 40


def test_without_a_terminal_each_log_line_is_a_line(tmp_path: Path) -> None:
    run = Run(tmp_path, terminal=False)
    with run.display:
        for each in ("Loading the student", "Loading the student", "Loading the teacher"):
            run.tell(doing=each)
        run.tell(step=0, steps=100, time=time.time() - 10)
        run.tell(labels=500)
        run.tell(step=10, steps=100, time=time.time(), loss=3.0, ce=2.0, t2s_accuracy=0.5)
        run.tell(step=11, steps=100, time=time.time())  # a step that isn't logged
        run.tell(step=12, steps=100, time=time.time(), eval_loss=1.5)
    lines = run.text.splitlines()
    assert lines[:2] == ["Loading the student …", "Loading the teacher …"]
    assert lines[2] == "step 10/100  ce 2.000  t2s accuracy 50%  50 tokens/s  1.5 min left"
    assert lines[3].startswith("step 12/100  eval 1.500  ") and len(lines) == 4
    assert "\x1b" not in run.text


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            raise OSError

    run = Run(tmp_path, terminal=False)
    run.console.on_broken_pipe = lambda: sys.exit(1)  # type: ignore[method-assign]
    run.console.file = Gone()
    with run.display:
        run.tell(said="Words")
        run.tell(error="What was wrong")
    assert run.display.error == "What was wrong"


def test_lines_are_followed_as_they_come(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    follower = Follower(file)
    assert follower.news() == []
    file.write_text('{"step": 1}\n{"st')
    assert follower.news() == [{"step": 1}]
    with file.open("a") as stream:
        stream.write('ep": 2}\n')
    assert follower.news() == [{"step": 2}] and follower.news() == []
    file.write_text('{"a": 1}\n')  # another run, told anew
    assert follower.news() == [{"a": 1}]


def test_the_end_of_a_log_has_bars_as_they_were_last(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("".join(f"line {number}\n" for number in range(50)) + "0%\r50%\r100%\nEnd\n")
    assert end_of(log).splitlines()[-3:] == ["  line 49", "  100%", "  End"]
    assert len(end_of(log).splitlines()) == 13


@pytest.mark.slow
def test_a_run_is_shown_line_by_line_and_logged_whole(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    def train(*further: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, "train", "recipe.yml", *further],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    held_out = str(write_rows(tmp_path / "held_out.jsonl", DATA[:6]))
    write(
        recipe(
            {},
            test_datasets=[{"path": held_out, "type": "alpaca", "split": "train"}],
            eval_steps=2,
            output_dir="out",
        )
    )
    run = train()
    assert run.returncode == 0, run.stdout
    log = (tmp_path / "out" / "dwakd" / "train.log").read_text()
    assert "Log: out/dwakd/train.log" in run.stdout
    steps = re.findall(r"^step (\d)/4  ce \d.*tokens/s", run.stdout, re.M)
    assert steps == ["1", "2", "3", "4"]
    assert len(re.findall(r"^step [24]/4  eval \d", run.stdout, re.M)) == 2
    for words in ("Distillation is on (variant paper)", "The student is in out"):
        assert words in run.stdout and words in log
    assert "memory/max_active" in log and "memory/max_active" not in run.stdout
    assert len(run.stdout.splitlines()) < 60

    # What axolotl doesn't take: the end of its log, and no more.
    write(recipe({}, output_dir="other", optimizer="adam_of_nobody"))
    run = train()
    assert run.returncode == 1
    assert "axolotl ended with exit code 1. The end of other/dwakd/train.log:" in run.stdout
    assert "adam_of_nobody" in (tmp_path / "other" / "dwakd" / "train.log").read_text()
    assert len(run.stdout.splitlines()) < 20

    # What the plugin doesn't take is its message alone.
    write(recipe({}, output_dir="third", sequence_len=8))
    run = train()
    assert run.returncode == 1
    assert run.stderr.startswith("Error: The recipe's data cannot be trained on:\ndatasets[0]")
    assert "Traceback" not in run.stdout + run.stderr
