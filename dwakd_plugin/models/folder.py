"""What lies in the folder of a model or of its adapter."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import safe_open

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def fingerprint_of_folder(folder: Path) -> str:
    """A model folder's identity: names and sizes of its files, and samples from all over them.

    Samples, as a large model would take minutes to read: 256 blocks, evenly spread, of each file,
    so that a fine-tuning that changed a twentieth of the bytes would go unseen once in 500,000.
    """
    digest = sha256()
    block = 4096
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".safetensors", ".bin", ".json", ".jinja", ".gguf"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            for offset in sorted({size * part // 256 for part in range(256)} | {size - block}):
                stream.seek(max(0, offset))
                digest.update(stream.read(block))
    return digest.hexdigest()[:32]


def base_revision(adapter: Path | None) -> str | None:
    """The revision of its base model that an adapter's folder names; None for the hub's newest."""
    if adapter is None:
        return None
    revision = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("revision")
    return None if revision is None else str(revision)


def fit_vocabulary(model: Any, adapter: Path) -> None:
    """Resizes the embeddings where the run added tokens, as the adapter's own copies show."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    with safe_open(adapter, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118
            if key.endswith(f"{name}.weight") or f"{name}.modules_to_save" in key:
                rows = stored.get_slice(key).get_shape()[0]
                if rows != embeddings.weight.shape[0]:
                    model.resize_token_embeddings(rows, mean_resizing=False)
                return
