"""Who writes: a file that is locked while somebody does, and that says who.

The lock is filelock's, a `flock` of the system: it goes with the process that has it, killed or
not, so that a file that stays behind keeps nobody out. A forked process (a data-loader worker) may
outlive it, and would hold on to a `flock`: filelock closes the worker's handle as it begins. A
file that is a link is refused. Where the file system knows no locks, nobody is kept out:
filelock's other kind, the bare existence of a file, would outlive a kill.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dwakd_plugin.errors import UserError


def take(
    file: Path, in_use: Callable[[str], str], on_wait: Callable[[str], None] | None = None
) -> FileLock:
    """Locks a file, which is made where it is not there, until `release`; keep what is returned.

    Where another process has it, raises UserError(in_use(who)), or, with `on_wait`, tells that who
    and waits. Raises OSError where the file cannot be opened.
    """
    lock = FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = _holder(file)
        if on_wait is None:
            raise UserError(in_use(holder)) from None
        on_wait(holder)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    with suppress(OSError):  # a full disk: the lock holds, and nobody can read whose it is
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock


def _holder(file: Path) -> str:
    with suppress(OSError):  # given back meanwhile
        if holder := file.read_text(errors="replace")[:200]:
            return holder
    return "another process"


def release(lock: FileLock, *, remove: bool = False) -> None:
    """Gives a lock back, and its file says so, or, with `remove`, is gone."""
    if lock.is_locked:  # not in a process forked meanwhile
        file = Path(lock.lock_file)
        with suppress(OSError):
            # Removed while it is locked: who waits for it sees that, and looks for another.
            file.unlink() if remove else file.write_text("")
        lock.release()
