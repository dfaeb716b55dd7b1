"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
