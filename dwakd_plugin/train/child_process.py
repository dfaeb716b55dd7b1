"""A command that runs as a child: signals reach it in a way that it can save on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwakd_plugin.train.signals import MESSAGE, STOP


def execute(
    command: list[str],
    environment: dict[str, str],
    stdout: Any = None,
    can_save: Callable[[], bool] = lambda: True,
    signals: Path | None = None,
    meanwhile: Callable[[], None] | None = None,
    **further: Any,
) -> tuple[int, int | None]:
    """Runs a command to its end; returns its exit code and the signal that stopped it, if one did.

    SIGINT, SIGTERM and SIGHUP reach the command as SIGTERM, on which it saves a checkpoint first,
    as soon as there is anything to save; a second one kills it. Where the command starts
    several processes, `signals` is the folder for `dwakd_plugin.train.signals`: they are asked
    there to stop, and killed when one of them has left its message or as long as none can save.
    `meanwhile` is called now and then as long as the command runs; `further` is for Popen.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(group: int) -> None:
        saves = can_save()
        what = "axolotl saves first" if saves else "there is nothing to save yet"
        print(f"\nStopping: {what}. Once more to kill it.", file=sys.stderr)
        if signals is not None:
            (signals / STOP).touch() if saves else _kill(group)
            return
        with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
            # What loads its rows must live until it has saved.
            (os.kill if saves else os.killpg)(group, signal.SIGTERM)

    def pass_on(number: int, frame: Any = None) -> None:
        received.append(number)
        if process is None:
            return
        if len(received) == 1:
            stop(process.pid)
        else:
            _kill(process.pid)

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in caught}
    try:
        # In a session of its own, Ctrl-C reaches it through `pass_on` alone, and once.
        process = subprocess.Popen(
            command, env=environment, stdout=stdout, start_new_session=True, **further
        )
        if received:
            stop(process.pid)
        waits_for_all = signals is None and meanwhile is None
        while (code := _wait(process, None if waits_for_all else 0.2)) is None:
            if meanwhile is not None:
                meanwhile()
            if signals is not None and (signals / MESSAGE).exists():
                _kill(process.pid)
    except BaseException:
        if process is not None:
            _kill(process.pid)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (128 - code if code < 0 else code), (received[0] if received else None)


def _wait(process: subprocess.Popen[bytes], seconds: float | None) -> int | None:
    """A process's exit code, or None where it has not ended after so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _kill(pid: int) -> None:
    """Kills a process and all it started: torchrun's workers have sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        # The launcher first: it would have a word to say on each of its workers.
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
