"""Files that are either whole or not there, and files of lines that grow whole line by line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwakd_plugin.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def user_path(name: str) -> Path:
    """A path as it was typed, with `~` for a home; of a user that there is not, as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


@contextmanager
def whole_file(file: Path, *, alone: bool = False) -> Iterator[Path]:
    """A path to write to, which becomes `file` where the block ends well: a reader sees the old
    content or the new.

    It lies in a folder of its own, as libraries write to files of other names first. `alone` says
    that one process writes at a time: what a kill leaves then goes with the next writing.
    Raises OSError, and leaves nothing behind then.
    """
    if alone:
        folder = file.with_name(f"{file.name}.partial")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    else:
        folder = Path(tempfile.mkdtemp(prefix=f".{file.name}-", dir=file.parent))
    try:
        partial = folder / file.name
        yield partial
        if file.exists():
            partial.chmod(file.stat().st_mode & 0o777)
        sync(partial)
        partial.replace(file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(file: Path, content: str | bytes) -> None:
    """Writes `content`, text as UTF-8, as `whole_file` does."""
    with whole_file(file) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


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


def save_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors (contiguous, on the CPU) as safetensors, as `whole_file` does.

    One process writes at a time. Raises OSError and SafetensorError.
    """
    from safetensors.torch import save_file

    with whole_file(file, alone=True) as partial:
        save_file(tensors, partial, metadata)


def json_checksum(content: Any) -> int:
    """CRC-32 of what JSON holds, however it is written."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# What goes wrong ----------------------------------------------------------------------------


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of the system, safetensors or torch.save says that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    # torch says how far it came and not why.
    return "No space left" in text or "quota" in text or "inline_container.cc" in text


class DiskFull(UserError):
    """The disk took no more; what was written before is whole."""


@contextmanager
def explaining_writes(place: Path | str, remedy: str = "") -> Iterator[None]:
    """Turns an error of writing to `place`, a file or folder, into UserError with what to do.

    DiskFull, a UserError, where the disk is full.
    """
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises a bare one of a full disk
        if is_full_disk(error):
            text = f"{place} cannot be written: the disk is full. {remedy}"
            raise DiskFull(text.rstrip()) from error
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise UserError(
            f"{place} cannot be written: {error}. {remedy}".rstrip(" .") + "."
        ) from error
