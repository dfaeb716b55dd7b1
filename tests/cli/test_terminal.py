"""The command line as a process in a terminal: widths, colours, encodings, pipes, Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import typer.rich_utils
import yaml
from rich.cells import cell_len
from safetensors.torch import load_file
from typer.testing import CliRunner

from dwakd_cli.main import app
from dwakd_cli.sample_texts import SAMPLE
from tests.conftest import ROOT

Recipe = Callable[..., dict[str, Any]]
Write = Callable[[dict[str, Any]], Path]

COMMAND = [sys.executable, "-m", "dwakd_cli"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
COLOUR = re.compile(r"\x1b\[([0-9]+;)*(3|4|9|10)[0-9](;[0-9]+)*m")
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Terminal:
    """A dwakd process that has a terminal of its own, and what it writes there."""

    def __init__(
        self, *arguments: str, columns: int = 80, stdout: Any = None, **environment: str
    ) -> None:
        self.written = b""
        self._screen, ours = pty.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=ours,
            stdout=ours if stdout is None else stdout,
            stderr=ours,
            env=plain_environment() | {"TERM": "xterm"} | environment,
            start_new_session=True,
            preexec_fn=_as_a_terminal_starts_it,
        )
        os.close(ours)

    @property
    def text(self) -> str:
        return self.written.decode()

    @property
    def plain(self) -> str:
        """Without escape sequences; lines end with a newline alone."""
        return ESCAPE.sub("", self.text).replace("\r\n", "\n")

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        """Reads until something is there, be it on the screen or elsewhere."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.text
            assert self.process.poll() is None, self.text
            self._read(0.02)

    def press_ctrl_c(self) -> None:
        os.write(self._screen, b"\x03")

    def finish(self, seconds: float = 120) -> int:
        """Reads to the end; the exit code, as a shell sees it."""
        end = time.monotonic() + seconds
        while self._read(0.1):
            assert time.monotonic() < end, self.text
        os.close(self._screen)
        code = self.process.wait(seconds)
        return 128 - code if code < 0 else code

    def _read(self, seconds: float) -> bool:
        """Whether somebody has the terminal open still."""
        if select.select([self._screen], [], [], seconds)[0]:
            try:
                self.written += os.read(self._screen, 1 << 16)
            except OSError:  # Linux says so of a terminal that nobody has open
                return False
        return True


def _as_a_terminal_starts_it() -> None:
    # The keyboard's Ctrl-C reaches those whose controlling terminal this is, and who don't ignore
    # it, as they would where these tests run in a shell's background.
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def plain_environment() -> dict[str, str]:
    """This process's, without what would say how to write."""
    ours = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "LC_ALL", "PYTHONIOENCODING")
    return {key: value for key, value in os.environ.items() if key not in ours}


def shell(line: str, **environment: str) -> tuple[list[int], str, str]:
    """Exit codes of a pipe's parts, its output, and what went to standard error."""
    dwakd = f'dwakd() {{ "{sys.executable}" -m dwakd_cli "$@"; }}'
    script = f'{dwakd}; {line}; codes="${{PIPESTATUS[@]}}"; echo; echo "$codes"'
    result = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=plain_environment() | environment,
    )
    output, _, codes = result.stdout.rstrip("\n").rpartition("\n")
    output = output.rstrip("\n")
    return [int(code) for code in codes.split()], output, result.stderr


def assert_fits(terminal: Terminal, columns: int) -> None:
    for line in re.split(r"[\r\n]", terminal.plain):
        assert cell_len(line) <= columns, line


def assert_usable_after_ctrl_c(terminal: Terminal) -> None:
    assert terminal.text.rfind(SHOW_CURSOR) >= terminal.text.rfind(HIDE_CURSOR)
    for word in ("Traceback", "Exception ignored", "Error"):
        assert word not in terminal.text


# The report of `dwakd check` ----------------------------------------------------------------


@pytest.fixture(scope="module")
def checks(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """`dwakd check` of the tiny pair in several surroundings, all at once."""
    pair = (str(lab / "teacher"), str(lab / "student"))
    report = tmp_path_factory.mktemp("check") / "report.json"
    with report.open("wb") as stdout, ThreadPoolExecutor() as pool:
        terminals = {
            "narrow": Terminal("check", *pair, columns=40),
            "plain": Terminal("check", *pair, NO_COLOR="1", PYTHONIOENCODING="ascii"),
            "json": Terminal("check", *pair, "--json", stdout=stdout),
        }
        piped = pool.submit(shell, f"dwakd check {' '.join(pair)} --json | head -c 10")
        codes = list(pool.map(Terminal.finish, terminals.values()))
        yield {**terminals, "codes": codes, "report": report, "piped": piped.result()}


def test_a_narrow_terminal_loses_nothing(checks: dict[str, Any]) -> None:
    narrow = checks["narrow"]
    assert checks["codes"] == [0, 0, 0]
    assert_fits(narrow, 40)
    assert "…" not in narrow.text
    assert COLOUR.search(narrow.text)
    assert narrow.text.rfind(SHOW_CURSOR) > narrow.text.rfind(HIDE_CURSOR)
    report = json.loads(checks["report"].read_text())
    # Each group's name is whole, but for a break between words, and its figures are beside it.
    for name in SAMPLE:
        figures = report["sample"][name]
        counts = rf"{figures['teacher_tokens']}\s+{figures['student_tokens']}\s"
        first, *rest = name.split()
        assert re.search(rf"^\W*{re.escape(first)}\s+{counts}", narrow.plain, re.M) or re.search(
            rf"^\W*{re.escape(name)}\s+{counts}", narrow.plain, re.M
        )
        assert all(word in narrow.plain for word in rest)
    words = " ".join(narrow.plain.split())
    for finding in report["findings"]:
        assert finding["message"] in words
    assert f"Verdict: {report['verdict']}" in words


def test_no_colour_and_no_unicode(checks: dict[str, Any]) -> None:
    plain = checks["plain"]
    assert_fits(plain, 80)
    assert plain.text.isascii()
    assert not COLOUR.search(plain.text)
    report = json.loads(checks["report"].read_text())
    drawn = [line for line in plain.plain.splitlines() if line.startswith("teacher  ")]
    assert sum(line.count("|") for line in drawn) > 10  # token ends
    assert "green" not in plain.text
    assert f"Verdict: {report['verdict']}" in plain.text


def test_json_alone_is_on_stdout_and_progress_on_the_terminal(checks: dict[str, Any]) -> None:
    assert "Loading both tokenizers" in checks["json"].text
    assert "Verdict" not in checks["json"].text


def test_a_reader_that_leaves_early_is_no_error(checks: dict[str, Any]) -> None:
    pipes = [
        (checks["piped"], '{\n "teache'),
        (shell("dwakd --help | head -1"), ""),
        (shell("dwakd recipes show quickstart-dwakd | head -1"), "# The same rows"),
        # Gone before a word is written.
        (shell("dwakd recipes show quickstart-dwakd | true"), ""),
        (shell("dwakd recipes list | true"), ""),
    ]
    for (codes, output, errors), beginning in pipes:
        assert output.strip().startswith(beginning)
        assert codes[0] in (0, 1)
        assert errors == ""


def test_a_log_gets_one_line_of_an_error() -> None:
    codes, output, errors = shell("dwakd check ./none ./none")
    assert codes == [1] and output == ""
    assert errors.count("\n") == 1 and "\x1b" not in errors
    assert "teacher's folder ./none does not exist" in errors


# Terminals, encodings, help -----------------------------------------------------------------


def test_terminals_of_several_kinds() -> None:
    dumb = Terminal("recipes", "list", TERM="dumb")
    assert dumb.finish() == 0
    assert "\x1b" not in dumb.text and "quickstart-dwakd" in dumb.text
    assert_fits(dumb, 80)
    # A message is red where colours are wanted.
    for environment, coloured in ({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False):
        wrong = Terminal("recipes", "show", "größe…", **environment)
        assert wrong.finish() == 1
        assert "No recipe is called `größe…`" in wrong.plain
        assert bool(COLOUR.search(wrong.text)) == coloured


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_other_encodings(encoding: str) -> None:
    codes, _, errors = shell("dwakd recipes show 'größe… │数'", PYTHONIOENCODING="ascii")
    assert codes == [1]
    assert "gr??e. |??" in errors or "größe… │数" in errors
    assert "Traceback" not in errors
    # A recipe is UTF-8 whatever the terminal is, so that it can be kept.
    shown = subprocess.run(
        [*COMMAND, "recipes", "show", "quickstart-dwakd"],
        capture_output=True,
        env=plain_environment() | {"PYTHONIOENCODING": encoding},
    )
    file = ROOT / "recipes" / "quickstart-dwakd.yml"
    assert shown.stdout == file.read_bytes()


def _commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from _commands(each, (*path, name))
    else:
        yield path, command


def test_help_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, command in _commands(typer.main.get_command(app)):
        assert (command.epilog or "").startswith(f"Example:  dwakd {' '.join(path)}")
        for columns in (60, 80):
            # Not by COLUMNS: after a training in this process, Rich no longer heeds it.
            monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", columns)
            result = CliRunner().invoke(app, [*path, "--help"])
            assert "…" not in result.stdout, (path, columns)
            assert all(cell_len(line) <= columns for line in result.stdout.splitlines())
        words = re.sub(r"[\s│]+", " ", result.stdout)
        for parameter in command.params:
            assert getattr(parameter, "help", None), (path, parameter.name)
            if isinstance(parameter, click.Argument):
                assert parameter.help.split(".")[0].replace("`", "") in words  # type: ignore[attr-defined]


def test_a_misspelt_command_is_told_the_nearest_once() -> None:
    completed = subprocess.run([*COMMAND, "trian"], capture_output=True, text=True, check=False)
    assert completed.returncode == 2
    assert completed.stderr.count("'train'") == 1


def test_shells_complete_the_commands() -> None:
    environment = plain_environment() | {"COMP_WORDS": "dwakd ", "COMP_CWORD": "1"}
    completed = subprocess.run(
        COMMAND,
        env=environment | {"_DWAKD_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
    )
    commands = {path[0] for path, _ in _commands(typer.main.get_command(app))}
    assert set(completed.stdout.split()) == commands


# Ctrl-C -------------------------------------------------------------------------------------


def test_an_early_ctrl_c(lab: Path) -> None:
    # At the start of Python itself nobody can say anything; then the command line is imported, and
    # then what it needs.
    for delay in (0.1, 0.2, 0.5, 1.0):
        terminal = Terminal("check", str(lab / "teacher"), str(lab / "student"))
        time.sleep(delay)
        terminal.press_ctrl_c()
        assert terminal.finish() == 130
        assert_usable_after_ctrl_c(terminal)


@pytest.mark.slow
def test_training_is_interrupted_and_resumed(
    recipe: Recipe, write: Write, lab: Path, tmp_path: Path
) -> None:
    # strict: axolotl then takes the plugin from the recipe's file alone.
    (tmp_path / "student").symlink_to(lab / "student")
    settings = recipe(
        None, strict=True, base_model="student", max_steps=100_000, output_dir="out", save_steps=5
    )
    file = write(settings)
    out = tmp_path / "out"
    arguments = ["train", file.name, "--teacher", str(lab / "teacher")]

    # While axolotl is being imported.
    early = Terminal(*arguments)
    early.wait_for((out / "dwakd" / "recipe.yml").exists)
    early.press_ctrl_c()
    assert early.finish(30) == 130
    assert_usable_after_ctrl_c(early)
    assert "there is nothing to save yet" in early.text
    assert "There is no checkpoint to go on from." in " ".join(early.plain.split())

    terminal = Terminal(*arguments)
    terminal.wait_for((out / "checkpoint-5" / "trainer_state.json").exists)
    terminal.press_ctrl_c()
    assert terminal.finish(30) == 130
    assert_usable_after_ctrl_c(terminal)
    words = " ".join(terminal.plain.split())  # the message wraps
    assert "Log: out/dwakd/train.log" in words and "Distillation is on" in words
    lines = terminal.plain.replace("\r", "\n")
    assert re.search(r"^ +step +ce +.*tokens/s +left$", lines, re.M)
    assert re.search(r"^ +1 +\d+\.\d{3} ", lines, re.M)  # the table's first row
    assert re.search(r"step \d+/100000 ce [▁▂▃▄▅▆▇█]+ ", words)
    assert "Traceback" not in (out / "dwakd" / "train.log").read_text()
    assert "Stopping: axolotl saves first." in words
    assert "Stopped by SIGINT. The student as it was then is in out." in words
    assert "`--resume` goes on from the last checkpoint." in words
    assert (out / "model.safetensors").is_file()
    assert file.read_text() == yaml.safe_dump(settings)

    checkpoints = [int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")]
    write(settings | {"max_steps": max(checkpoints) + 10})
    result = subprocess.run(
        [*COMMAND, *arguments, "--resume", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["exit_code"] == 0 and facts["warnings"] == []
    assert facts["recipe"] == "out/dwakd/recipe.yml"
    last = out / f"checkpoint-{max(checkpoints) + 10}"
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert {"ce", "student_kd", "teacher_ce"} <= set(log[-1])


@pytest.mark.slow
def test_a_warm_up_is_interrupted_and_goes_on(recipe: Recipe, write: Write, tmp_path: Path) -> None:
    file = write(recipe({"projectors": {"init": "random"}}))
    arguments = ["warmup", file.name, "--epochs", "60", "--patience", "60"]
    terminal = Terminal(*arguments)
    terminal.wait_for(lambda: "epoch 2:" in terminal.text)
    terminal.press_ctrl_c()
    assert terminal.finish(30) == 130
    assert_usable_after_ctrl_c(terminal)
    assert "The same command goes on: the epochs so far are kept" in " ".join(
        terminal.plain.split()
    )
    done = [int(epoch) for epoch in re.findall(r"epoch (\d+):", terminal.plain)]
    made = tmp_path / "out-projectors.safetensors"
    assert done[-1] < 60 and not made.exists()

    result = subprocess.run(
        [*COMMAND, *arguments, "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [line["epoch"] for line in report["history"]] == list(range(1, 61))
    gone_on = [int(epoch) for epoch in re.findall(r"epoch (\d+):", result.stderr)]
    assert gone_on[0] in (done[-1] + 1, done[-1] + 2)  # one may have ended after its last word
    assert "\x1b" not in result.stderr
    assert load_file(made).keys() >= {"t2s.weight", "query.weight"}
    assert not list(tmp_path.glob(".out-projectors*"))
