"""Folders that are either whole or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dwakd_plugin.errors import UserError


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A temporary folder beside `dest`, which it becomes if the block ends without an error.

    Of a block that fails nothing is left. Raises UserError, before anything is made, where `dest`
    is there already and holds something.
    """
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"`{dest}` exists and is not empty. Remove it, or choose another folder.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        folder.chmod(0o755)
        yield folder
        folder.replace(dest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
