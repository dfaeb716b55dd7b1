"""What `dwakd train` and the processes of a run on one machine tell each other, through a folder.

A launcher passes signals and failures on in its own way: workers are killed in the midst of
saving, and each end has a traceback. So where there are several processes, the command asks here
for the end of training, and a process that meets an error leaves its message here and waits to be
ended:

    message     why the run must end, from the first process to fail
    stop        the command asks for training to end
    stop-after  the optimizer step after which it ends, by the first rank

A process that is alone needs no folder: SIGTERM asks it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from dwakd_plugin.train.progress import tell

FOLDER = "DWAKD_RUN_SIGNALS"  # set by `dwakd train`
MESSAGE, STOP, STOP_AFTER = "message", "stop", "stop-after"
PATIENCE = 60.0  # seconds


def end_run(message: str) -> NoReturn:
    """Says why the run ends, and ends this process with code 1."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        from axolotl.utils.logging import get_logger

        get_logger("axolotl.dwakd").error("dwakd: %s", message, main_process_only=False)
        tell(error=message)
        raise SystemExit(1)
    _write_first(Path(folder) / MESSAGE, message)
    time.sleep(PATIENCE)
    raise SystemExit(1)


_terminated = threading.Event()


@contextmanager
def stopping_on_sigterm(processes: int) -> Iterator[None]:
    """While open, SIGTERM asks a run of one process to end after its step, with a checkpoint."""
    alone = processes == 1 and threading.current_thread() is threading.main_thread()
    if not alone:
        yield
        return
    _terminated.clear()
    before = signal.signal(signal.SIGTERM, lambda *_: _terminated.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_last_step(step: int, *, first_rank: bool) -> bool:
    """Whether training ends after this optimizer step, because the command asked for it.

    Every rank gets the same answer: none finishes the step after next before the first, which
    chooses it, has come to the next.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        return _terminated.is_set()
    chosen = Path(folder) / STOP_AFTER
    if first_rank and (Path(folder) / STOP).exists():
        _write_first(chosen, str(step + 2))
    return chosen.exists() and step >= int(chosen.read_text(encoding="ascii"))


def stop_asked() -> bool:
    """Whether this process has heard that the run is to end."""
    folder = os.environ.get(FOLDER)
    return _terminated.is_set() if folder is None else (Path(folder) / STOP).exists()


def _write_first(file: Path, text: str) -> None:
    """Writes a file, whole at once, where it is not there yet."""
    partial = file.with_name(f"{file.name}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    try:
        os.link(partial, file)
    except FileExistsError:
        pass  # another was first
    finally:
        partial.unlink()
