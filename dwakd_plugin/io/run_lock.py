"""One run at a time in an output folder: its first rank holds a lock there while it lives."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dwakd_plugin.io.files import explaining_writes
from dwakd_plugin.io.locks import release as release_lock
from dwakd_plugin.io.locks import take

if TYPE_CHECKING:
    from filelock import FileLock

LOCK = Path("dwakd") / "lock"  # within the output folder

_held: dict[Path, FileLock] = {}


def hold(folder: Path) -> None:
    """Keeps an output folder for this process, until `release` or its end.

    Raises UserError where another process has it, or nothing can be written there.
    """
    file = (folder / LOCK).resolve()
    if file in _held:
        return
    with explaining_writes(f"output_dir {folder}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        _held[file] = take(file, lambda holder: _in_use(folder, holder))


def release() -> None:
    """Gives back what this process holds."""
    while _held:
        release_lock(_held.popitem()[1])


def check_free(folder: Path) -> None:
    """Raises UserError where another process holds an output folder."""
    file = (folder / LOCK).resolve()
    if file not in _held and file.is_file():
        with suppress(OSError):  # what cannot be written is said by who writes
            release_lock(take(file, lambda holder: _in_use(folder, holder)))


def _in_use(folder: Path, holder: str) -> str:
    return (
        f"output_dir {folder} is in use: {holder} trains there. Let it finish, stop it, or give "
        "another output_dir."
    )
