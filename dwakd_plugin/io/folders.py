"""Folders that are either whole or not there."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes, sync
from dwakd_plugin.io.locks import release, take


def refuse_content(dest: Path) -> None:
    """Raises UserError where `dest` is there already and holds something."""
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"`{dest}` exists and is not empty. Remove it, or choose another folder.")


@contextmanager
def new_folder(dest: Path, check: Callable[[Path], None] = refuse_content) -> Iterator[Path]:
    """A folder beside `dest`, which it becomes if the block ends without an error.

    Of a block that fails nothing is left, and what was killed goes with the next writing of `dest`.
    `check` raises UserError, before anything is made, where `dest` must stay; what it lets pass is
    replaced. Raises UserError where `dest` is being written, or cannot be.
    """
    target = dest.absolute()
    old, partial = (target.with_name(f".{target.name}.{what}") for what in ("old", "partial"))
    if old.exists() and not target.exists():
        old.rename(target)  # killed between the two renames below
    check(dest)
    explaining = functools.partial(explaining_writes, f"`{dest}`", "Nothing was left there.")
    with explaining():
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = take(
            target.with_name(f".{target.name}.lock"),
            lambda holder: f"`{dest}` is being written by {holder}. Let it finish, or stop it.",
        )
    try:
        with explaining():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        yield partial
        with explaining():
            for path in (*partial.rglob("*"), partial):
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0o600
                sync(path)
            _put_in_place(partial, target, old)
            sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        release(lock, remove=True)


def _put_in_place(partial: Path, target: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
