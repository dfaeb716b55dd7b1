"""Files that are either whole or not there, and files of lines that grow whole line by line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
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


def save_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors (contiguous, on the CPU) as safetensors, beside `file` and then renamed.

    Raises OSError and SafetensorError, and leaves nothing behind then.
    """
    from safetensors.torch import save_file

    # A folder of one name, as safetensors writes to a file of a name of its own first: what a kill
    # leaves goes with the next writing. One process writes at a time.
    folder = file.with_name(f"{file.name}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        partial = folder / file.name
        save_file(tensors, partial, metadata)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


@contextmanager
def explaining_writes(place: Path, remedy: str) -> Iterator[None]:
    """Turns an error of writing to `place`, a file or folder, into UserError with what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises a bare one of a full disk
        if is_full_disk(error):
            raise UserError(f"{place} cannot be written: the disk is full. {remedy}") from error
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise UserError(f"{place} cannot be written: {error}. {remedy}") from error


# Who writes ---------------------------------------------------------------------------------


def take_lock(file: Path) -> int | str:
    """Locks a file, made where it is not there: its handle, or else who has it.

    The lock is a record lock: the system releases it with the process, and processes forked from
    it, which may live on for a while, do not hold it. Within a process it keeps nobody out, and
    closing any handle of the file releases it. Where the file system knows no locks, nobody is
    kept out. Raises OSError where the file cannot be opened.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # of either, as the system likes
        holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        os.close(handle)
        return holder
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            os.close(handle)
            raise
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return handle


def release_lock(handle: int) -> None:
    """Gives a lock back, and its file says so."""
    os.ftruncate(handle, 0)
    os.close(handle)
