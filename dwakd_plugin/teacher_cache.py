"""The teacher's hidden states on disk: computed once, read in every epoch after.

The loss needs of the teacher its final hidden states at response positions, its embeddings and its
head, and none of them changes. A cache folder holds all three, so that training from a full cache
needs no teacher at all:

    index.json              format, identity of the teacher, and per shard its file, size, checksum
                            and keys
    teacher.safetensors     embeddings and head
    states-*.safetensors    one tensor (T, D) per row, named by the row's key

A row's key is a hash of its teacher token ids and response positions, so that shuffling, splitting
and adding rows keep the cache valid. Every file is written beside its place and moved into it, the
index last: after a kill, what the index names is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dwakd_plugin.errors import UserError

FORMAT = 1
INDEX = "index.json"
WEIGHTS = "teacher.safetensors"


def row_key(teacher_ids: Tensor, teacher_labels: Tensor) -> str:
    """Names a row by its teacher token ids and by which of its labels count, both (L,)."""
    digest = hashlib.sha256(teacher_ids.to(torch.int64).numpy().tobytes())
    digest.update(teacher_labels.ne(-100).numpy().tobytes())
    return digest.hexdigest()[:32]


class TeacherCache:
    """A folder of teacher states, opened for one teacher.

    Pickles small: data-loader workers open the shards anew.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Opens the folder, or starts an empty cache there.

        `identity` says which teacher, in which precision, the states come from. Raises UserError
        where the folder holds something else, another teacher's states, or damaged files.
        """
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.shards: list[dict[str, Any]] = []
        self._shard_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        index = folder / INDEX
        if index.is_file():
            self._read_index(index)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"dwakd.teacher.cache: {folder} exists and is no teacher cache (it has no {INDEX})."
                " Give another folder."
            )

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, teacher_ids: Tensor, teacher_labels: Tensor) -> Tensor:
        """The hidden states (T, D) of one row, from its teacher ids and labels (L,)."""
        if not teacher_labels[1:].ne(-100).any():
            return torch.zeros(0, self.identity["hidden_size"])
        key = row_key(teacher_ids, teacher_labels)
        if key not in self._shard_of:
            raise UserError(
                f"The teacher cache {self.folder} lacks a row that training asks for. Run again: "
                "missing rows are filled in at the start."
            )
        file = self._shard_of[key]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file].get_tensor(key)

    def append(self, states: dict[str, Tensor]) -> None:
        """Adds rows, key to (T, D), as one shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"states-{len(self.shards):05d}-{os.getpid()}.safetensors"
        _save_atomically(states, self.folder / name)
        shard = {
            "file": name,
            "bytes": (self.folder / name).stat().st_size,
            "sha256": _sha256(self.folder / name),
            "keys": list(states),
        }
        self.shards.append(shard)
        self._shard_of.update(dict.fromkeys(states, name))
        self._write_index()

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        """Keeps the teacher's embeddings and head: names to tensors."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _save_atomically(weights, self.folder / WEIGHTS)
        self._write_index()

    def load_weights(self, device: str) -> dict[str, Tensor] | None:
        """The teacher's embeddings and head, or None where they were not kept yet."""
        file = self.folder / WEIGHTS
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt", device=device) as weights:
                return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(_damaged(file, str(error))) from error

    def _read_index(self, index: Path) -> None:
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            found, self.shards = content["identity"], content["shards"]
            version = content["format"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(_damaged(index, str(error))) from error
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
        for shard in self.shards:
            file = self.folder / Path(shard["file"]).name  # an index cannot point elsewhere
            if not file.is_file():
                raise UserError(_damaged(file, "it is missing"))
            if file.stat().st_size != shard["bytes"] or _sha256(file) != shard["sha256"]:
                raise UserError(_damaged(file, "its checksum does not match the index"))
            self._shard_of.update(dict.fromkeys(shard["keys"], file.name))

    def _write_index(self) -> None:
        content = {"format": FORMAT, "identity": self.identity, "shards": self.shards}
        partial = self.folder / f"{INDEX}.partial-{os.getpid()}"
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self.folder / INDEX)


def fingerprint_of_folder(folder: Path) -> str:
    """A model folder's identity: names, sizes, and both ends of its weight files."""
    digest = hashlib.sha256()
    for file in sorted(_weight_files(folder)):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:32]


def _weight_files(folder: Path) -> Iterable[Path]:
    return (
        file
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".bin", ".json", ".gguf")
    )


def _save_atomically(tensors: dict[str, Tensor], file: Path) -> None:
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damaged(file: Path, why: str) -> str:
    return (
        f"The teacher cache is damaged: {file}: {why}. Remove the folder {file.parent} to compute "
        "the states again."
    )
