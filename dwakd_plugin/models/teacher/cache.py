"""What the teacher says of each row on disk: computed once, read in every epoch after.

The loss needs of the teacher its final hidden states at response positions, its embeddings and its
head, and none of them changes. A cache folder holds all three, so that training from a full cache
needs no teacher at all. `mapped` can do with the teacher's likeliest tokens, which are kept instead
where the form (`kept_states`) says so:

    index.jsonl             one JSON object a line: first the format, the identity of the teacher
                            and the form of what is kept; then, per file, its size and the CRC-32 of
                            each tensor in it
    teacher.safetensors     embeddings and head, or of likeliest tokens how many there are to choose
                            from
    states-*.safetensors    one tensor (T, D), or (T, k, 6) of likeliest tokens, per row, named by
                            the row's key
    lock                    locked while somebody writes

A row's key is a hash of its teacher token ids and response positions, so that shuffling, splitting
and adding rows keep the cache valid. A file is written beside its place and moved into it, and then
named by a line at the end of the index: after a kill, what the index names is whole, and a line cut
off at its end counts as not written.

Sizes are compared when a cache is opened, and a checksum when its tensor is read: opening takes no
time, and no value is used unchecked. Tensors are read, and not mapped as `safe_open` does: pages
of a map that stays open count as the process's own, more with every row, until an epoch holds the
whole cache, and one that is opened for each row reads the header for each (figures:
docs/teacher.md).
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import append_lines, explaining_writes, save_tensors, whole_lines
from dwakd_plugin.io.locks import release, take
from dwakd_plugin.loss import TopTokens
from dwakd_plugin.models.teacher.kept_states import (
    decode,
    encode,
    nothing_kept,
    row_key,
    top_of_form,
)

FORMAT = 2
INDEX = "index.jsonl"
WEIGHTS = "teacher.safetensors"
LOCK = "lock"
# Rows per shard are bounded by bytes: a kill loses at most this much of the model's work.
SHARD_BYTES = 64 * 2**20

# The dtypes that a cache's files have, by their names in a safetensors header.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


class TeacherCache:
    """A folder of teacher states, or likeliest tokens, opened for one teacher.

    Pickles small: data-loader workers read the shards' headers again.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], dtype: str = "auto") -> None:
        """Opens the folder, or starts an empty cache there.

        `identity` says which teacher, in which precision, the states come from, and has their
        `hidden_size`. `dtype` is the form in which a new cache keeps them; of one of states that is
        there, `auto` takes its own. Raises UserError where the folder holds something else, what
        another teacher says, another form, or damaged files.
        """
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.dtype = dtype
        self._asked_dtype = dtype
        self._files: dict[str, dict[str, Any]] = {}  # name: bytes, crc32
        self._shard_of: dict[str, str] = {}
        self._headers: dict[str, dict[str, Any]] = {}
        self._width = int(self.identity.get("hidden_size", 0))
        self._read_index()

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_headers": {}}

    @property
    def keys(self) -> Set[str]:
        """The rows that it holds, by `row_key`."""
        return self._shard_of.keys()

    @property
    def bytes(self) -> int:
        """What the files take on disk."""
        return sum(entry["bytes"] for entry in self._files.values())

    @property
    def top_k(self) -> int | None:
        """How many likeliest tokens it keeps of each position; None where it keeps states."""
        return top_of_form(self.dtype)

    @property
    def has_weights(self) -> bool:
        """Whether embeddings and head were kept."""
        return WEIGHTS in self._files

    def read(self, teacher_ids: Tensor, teacher_labels: Tensor) -> Tensor | TopTokens:
        """The hidden states (T, D) of one row, or its likeliest tokens (T, k), from its teacher ids
        and labels (L,)."""
        count = int(teacher_labels[1:].ne(-100).sum())
        if count == 0:
            return nothing_kept(self.dtype, self._width)
        key = row_key(teacher_ids, teacher_labels)
        if key not in self._shard_of:
            raise UserError(
                f"The teacher cache {self.folder} lacks a row that training asks for. Run "
                "`dwakd cache RECIPE`, which adds missing rows."
            )
        file = self._shard_of[key]
        kept = self._tensor(file, key)
        try:
            return decode(kept, self.dtype, count, self._width)
        except ValueError as error:
            raise UserError(_damaged(self.folder / file, f"row {key}: {error}")) from error

    def append(self, states: Mapping[str, Tensor | TopTokens]) -> None:
        """Adds rows, key to (T, D) or (T, k), as one shard. Raises DiskFull."""
        number = len(self._files)
        name = f"states-{number:05d}-{os.getpid()}.safetensors"
        self._add(name, {key: encode(tensor, self.dtype) for key, tensor in states.items()})
        self._shard_of.update(dict.fromkeys(states, name))

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        """Keeps the teacher's embeddings and head: names to tensors. Raises DiskFull."""
        self._add(WEIGHTS, weights)

    def load_weights(self, device: str) -> dict[str, Tensor] | None:
        """The teacher's embeddings and head, or None where they were not kept yet."""
        if not self.has_weights:
            return None
        names = self._files[WEIGHTS]["crc32"]
        return {name: self._tensor(WEIGHTS, name).to(device) for name in names}

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compares the checksum of every tensor. Raises UserError that names what differs."""
        for done, (file, entry) in enumerate(self._files.items()):
            progress(done, len(self._files))
            for name in entry["crc32"]:
                self._tensor(file, name)
        progress(len(self._files), len(self._files))

    @contextmanager
    def writing(self, *, wait: bool, on_wait: Callable[[str], None] = print) -> Iterator[None]:
        """Holds the folder's lock: one process writes. What others wrote meanwhile is read first.

        Where another holds it, waits and tells `on_wait` who, or, with `wait` false, raises
        UserError. The system releases the lock of a process that has died.
        """

        def in_use(holder: str) -> str:
            return (
                f"The teacher cache {self.folder} is being written by {holder}. Let it finish, or "
                "stop it and run this again: what it has written is kept."
            )

        def say(holder: str) -> None:
            on_wait(f"Waiting for {holder}, which writes the teacher cache {self.folder}")

        with self._explaining_writes():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = take(self.folder / LOCK, in_use, say if wait else None)
        try:
            self._read_index()
            self._remove_leftovers()
            yield
        finally:
            release(lock)

    def _remove_leftovers(self) -> None:
        """Removes files that a killed writer left without naming them in the index."""
        for file in self.folder.glob("*.safetensors*"):
            if _is_ours(file.name) and file.name not in self._files:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _tensor(self, file: str, name: str) -> Tensor:
        """A tensor, read from its file, whose checksum is right."""
        path = self.folder / file
        try:
            if file not in self._headers:
                self._headers[file] = _header(path)
            dtype, shape, place, size = self._headers[file][name]
            content = np.fromfile(path, np.uint8, size, offset=place)
            tensor = torch.from_numpy(content).view(dtype).reshape(shape)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(_damaged(path, f"{type(error).__name__}: {error}")) from error
        if _crc32(tensor) != self._files[file]["crc32"][name]:
            raise UserError(_damaged(path, f"the checksum of {name} does not match"))
        return tensor

    def _read_index(self) -> None:
        index = self.folder / INDEX
        if index.is_symlink():  # lines would be added to whatever it points to
            raise UserError(_damaged(index, "it is a link"))
        if not index.is_file():
            files = self.folder.iterdir() if self.folder.is_dir() else []
            foreign = any(not _is_ours(file.name) for file in files)
            if foreign or (self.folder.exists() and not self.folder.is_dir()):
                raise UserError(
                    f"dwakd.teacher.cache: {self.folder} exists and isn't a teacher cache (it has "
                    f"no {INDEX}). Give another folder."
                )
            return
        head, *lines = whole_lines(index.read_bytes()) or [None]
        try:
            if head is None:
                return
            content = json.loads(head)
            found, version, dtype = content["identity"], content["format"], content["dtype"]
            entries = {str(entry["file"]): entry for entry in map(json.loads, lines)}
            for entry in entries.values():
                entry["bytes"] + 0, dict(entry["crc32"])
            found.get, top_of_form(dtype)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(_damaged(index, f"{type(error).__name__}: {error}")) from error
        if version != FORMAT:
            raise UserError(
                f"The teacher cache {self.folder} has format {version}; this version reads "
                f"{FORMAT}. Remove the folder to compute the states again."
            )
        differing = [
            f"  {key}: {found.get(key)!r} in the cache, {value!r} in this run"
            for key, value in self.identity.items()
            if found.get(key) != value
        ]
        if differing:
            raise UserError(
                f"The teacher cache {self.folder} belongs to another teacher:\n"
                + "\n".join(differing)
                + "\nGive another folder as dwakd.teacher.cache, or remove this one."
            )
        self._check_form(dtype)
        for name, entry in entries.items():
            if Path(name).name != name or not _is_ours(name) or (self.folder / name).is_symlink():
                raise UserError(_damaged(index, f"it names {name}, which isn't part of the cache"))
            file = self.folder / name
            try:
                size = file.stat().st_size
            except (FileNotFoundError, ValueError):
                raise UserError(_damaged(file, "it is missing")) from None
            if size != entry["bytes"]:
                raise UserError(_damaged(file, f"it has {size} bytes, the index {entry['bytes']}"))
        self.dtype, self._files = dtype, entries
        self._shard_of = {
            key: name
            for name, entry in entries.items()
            if name != WEIGHTS
            for key in entry["crc32"]
        }

    def _check_form(self, form: str) -> None:
        """Raises UserError where what is kept isn't what is asked for."""
        asked_k, top_k = map(top_of_form, (self._asked_dtype, form))
        if asked_k != top_k:
            keeps = "hidden states" if top_k is None else f"the {top_k} likeliest tokens"
            wants = "states" if asked_k is None else f"{asked_k} tokens (dwakd.teacher.top_k)"
            line = "remove top_k" if top_k is None else f"set dwakd.teacher.top_k: {top_k}"
            raise UserError(
                f"The teacher cache {self.folder} keeps {keeps} of each position, and the recipe "
                f"asks for {wants}. Give another folder as dwakd.teacher.cache, or {line}."
            )
        if self._asked_dtype not in ("auto", form):
            raise UserError(
                f"The teacher cache {self.folder} keeps its states in "
                f"{'the dtype they were computed in' if form == 'auto' else form}, and "
                f"dwakd.teacher.cache_dtype asks for {self._asked_dtype}. Remove that line, or "
                "give another folder."
            )

    def _add(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Writes a file, and then the index's line that names it."""
        tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        with self._explaining_writes():
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, self.folder / name)
            entry = {
                "file": name,
                "bytes": (self.folder / name).stat().st_size,
                "crc32": {key: _crc32(tensor) for key, tensor in tensors.items()},
            }
            head = {"format": FORMAT, "identity": self.identity, "dtype": self.dtype}
            append_lines(self.folder / INDEX, head, [entry])
        self._files[name] = entry
        self._headers.pop(name, None)

    def _explaining_writes(self) -> AbstractContextManager[None]:
        return explaining_writes(f"The teacher cache {self.folder}")


def _is_ours(name: str) -> bool:
    return name in (LOCK, INDEX) or name.startswith((WEIGHTS, "states-"))


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _header(file: Path) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """Of a safetensors file: per tensor its dtype, shape, first byte and number of bytes.

    Raises SafetensorError, KeyError and OSError.
    """
    with safe_open(file, framework="pt"), file.open("rb") as stream:  # which checks the header
        # Its length as 8 bytes, little-endian; the header, JSON; the tensors' bytes.
        begin = 8 + int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(begin - 8))
    entries.pop("__metadata__", None)
    return {
        name: (_DTYPES[entry["dtype"]], entry["shape"], begin + first, end - first)
        for name, entry in entries.items()
        for first, end in [entry["data_offsets"]]
    }


def _damaged(file: Path, why: str) -> str:
    return (
        f"The teacher cache is damaged: {file}: {why}. Remove the folder {file.parent} to compute "
        "the states again."
    )
