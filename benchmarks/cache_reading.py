"""Ways to read the rows of a teacher cache: time a row, and what a process then holds of the files.

python -m benchmarks.cache_reading read     # as `TeacherCache` does
python -m benchmarks.cache_reading map      # `safe_open`, each file opened once
python -m benchmarks.cache_reading map-row  # `safe_open`, a file opened for each row
"""

from __future__ import annotations

import tempfile
import time
import zlib
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from safetensors import safe_open
from torch import Tensor

from dwakd_plugin.models.teacher.cache import TeacherCache

FILES, ROWS, TOKENS, FEATURES = 6, 700, 50, 896


def mapped(file: Path, name: str, open_files: dict[Path, object] | None) -> Tensor:
    if open_files is None:
        with safe_open(file, framework="pt") as one:
            tensor = one.get_tensor(name).clone()
    else:
        if file not in open_files:
            open_files[file] = safe_open(file, framework="pt")
        tensor = open_files[file].get_tensor(name).clone()  # type: ignore[attr-defined]
    zlib.crc32(tensor.view(torch.uint8).numpy())
    return tensor


def held_of_files() -> float:
    """MB of files among the process's resident memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:")) / 1024


def main(
    way: Annotated[
        Literal["read", "map", "map-row"],
        typer.Argument(
            help="As `TeacherCache` does; `safe_open` of each file once; `safe_open` for each row."
        ),
    ],
) -> None:
    """Time a row of a teacher cache, and what the process then holds of its files."""
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder) / "states", {"hidden_size": FEATURES})
        for number in range(FILES):
            states = torch.randn(TOKENS, FEATURES).half()
            cache.append({f"{number}-{row:030x}": states.clone() for row in range(ROWS)})
        open_files: dict[Path, object] | None = {} if way == "map" else None
        before, start = held_of_files(), time.perf_counter()
        for name, file in cache._shard_of.items():
            if way == "read":
                cache._tensor(file, name)
            else:
                mapped(cache.folder / file, name, open_files)
        took = (time.perf_counter() - start) / len(cache) * 1e3
        held = held_of_files() - before
        print(f"{way}: {took:.2f} ms a row; {held:.0f} of {cache.bytes / 2**20:.0f} MB are held")


if __name__ == "__main__":
    typer.run(main)
