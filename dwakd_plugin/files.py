"""Files that are either whole or not there, and files of lines that grow whole line by line."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def user_path(name: str) -> Path:
    """A path as it was typed, with `~` for a home; of a user that there is not, as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def replace_file(file: Path, content: str | bytes) -> None:
    """Writes `content` beside `file` and renames it: a reader sees the old content or the new.

    Text is written as UTF-8. Raises OSError, and leaves nothing behind then.
    """
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.chmod(file.stat().st_mode & 0o777 if file.exists() else 0o644)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a file, without one that a kill has cut off at its end."""
    return content[: content.rfind(b"\n") + 1].splitlines()


def append_lines(file: Path, head: Any, lines: Sequence[Any]) -> None:
    """Adds JSON lines, and the head before the first; what a kill left of a line is cut off before.

    Raises OSError, and leaves the file as it was then.
    """
    with file.open("a+b", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 1))
        if stream.read(1) not in (b"", b"\n"):
            stream.seek(0)
            end = stream.read().rfind(b"\n") + 1
            stream.truncate(end)
        wanted = lines if end else [head, *lines]
        text = "".join(json.dumps(each) + "\n" for each in wanted).encode()
        try:
            if stream.write(text) < len(text):
                raise OSError(errno.ENOSPC, "No space left on device")
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(end)
            raise
