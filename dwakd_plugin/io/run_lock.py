"""One run at a time in an output folder: its first rank holds a lock there while it lives."""

from __future__ import annotations

from pathlib import Path

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import release_lock, take_lock

LOCK = Path("dwakd") / "lock"  # within the output folder

_held: dict[Path, int] = {}  # handles of this process: closing another of the file would release it


def hold(folder: Path) -> None:
    """Keeps an output folder for this process, until `release` or its end.

    Raises UserError where another process has it, or nothing can be written there.
    """
    file = (folder / LOCK).resolve()
    if file in _held:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        taken = take_lock(file)
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error}") from error
    if isinstance(taken, str):
        raise _in_use(folder, taken)
    _held[file] = taken


def release() -> None:
    """Gives back what this process holds."""
    while _held:
        release_lock(_held.popitem()[1])


def check_free(folder: Path) -> None:
    """Raises UserError where another process holds an output folder."""
    file = (folder / LOCK).resolve()
    if file in _held or not file.is_file():
        return
    try:
        taken = take_lock(file)
    except OSError:
        return  # what cannot be written is said by who writes
    if isinstance(taken, str):
        raise _in_use(folder, taken)
    release_lock(taken)


def _in_use(folder: Path, holder: str) -> UserError:
    return UserError(
        f"output_dir {folder} is in use: {holder} trains there. Let it finish, stop it, or give "
        "another output_dir."
    )
