"""A teacher whose states come from a cache, and the filling of that cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import DiskFull
from dwakd_plugin.loss import Head
from dwakd_plugin.models.batches import teacher_batch
from dwakd_plugin.models.causal_lm import EmbeddingTable
from dwakd_plugin.models.folder import fingerprint_of_folder
from dwakd_plugin.models.teacher.cache import SHARD_BYTES, TeacherCache
from dwakd_plugin.models.teacher.kept_states import bytes_per_token, row_key
from dwakd_plugin.models.teacher.loaded import (
    Teacher,
    load_teacher,
    precision_name,
    teacher_config,
    teacher_device,
    teacher_dtype,
)
from dwakd_plugin.recipe.schema import TeacherConfig

Row = tuple[Tensor, Tensor]  # teacher token ids and labels, both (L,)
Progress = Callable[[int, int], None]  # hears how many response tokens of how many are done

BATCH_TOKENS = 2048
DISK_MARGIN = 1.02  # names, checksums and shapes


def open_cache(config: TeacherConfig, device: str, tokenizer: Any) -> TeacherCache:
    """The cache folder that the recipe names, for this teacher in this precision.

    Raises UserError where the folder cannot be that.
    """
    assert config.cache is not None
    return TeacherCache(
        Path(config.cache), teacher_identity(config, device, tokenizer), config.cache_dtype
    )


def teacher_identity(config: TeacherConfig, device: str, tokenizer: Any) -> dict[str, Any]:
    """What a teacher's states and answers depend on beside the rows: folders by their contents."""
    model_config = teacher_config(config)
    return {
        "teacher": _content(config.base_model),
        "revision": getattr(model_config, "_commit_hash", None) or config.revision,
        "adapter": None if config.adapter is None else _content(config.adapter),
        "precision": precision_name(config, model_config, teacher_device(config, device)),
        "hidden_size": model_config.get_text_config().hidden_size,
        "tokenizer": _digest(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "chat_template": _digest(config.chat_template or tokenizer.chat_template),
    }


def cached_teacher(
    config: TeacherConfig,
    device: str,
    rows: Sequence[Row],
    tokenizer: Any,
    progress: Progress = lambda done, total: None,
    on_wait: Callable[[str], None] = print,
) -> tuple[Teacher, TeacherCache]:
    """A teacher without a body, and a cache that holds the states of every row.

    rows: those that training or evaluation will ask for. Missing ones are computed first. Of
    several processes the first to come computes, and the others wait for it.
    """
    cache = open_cache(config, device, tokenizer)
    if missing_rows(cache, rows) or not cache.has_weights:
        with cache.writing(wait=True, on_wait=on_wait):
            fill(config, device, cache, missing_rows(cache, rows), progress)
    weights = cache.load_weights(device)
    assert weights is not None  # they are written before the first state
    return _from_weights(weights, cache.identity["precision"]), cache


def teacher_rows(*datasets: Any) -> list[Row]:
    """Teacher ids and labels of every row of the data sets; None is one without rows."""
    rows = []
    for dataset in datasets:
        if dataset is None:
            continue
        columns = dataset.select_columns(["teacher_input_ids", "teacher_labels"]).with_format(None)
        rows += [
            (torch.tensor(row["teacher_input_ids"]), torch.tensor(row["teacher_labels"]))
            for row in columns
        ]
    return rows


def missing_rows(cache: TeacherCache, rows: Sequence[Row]) -> dict[str, Row]:
    """The rows with a response whose states the cache lacks, by key."""
    keyed = {
        row_key(ids, labels): (ids, labels) for ids, labels in rows if labels[1:].ne(-100).any()
    }
    return {key: row for key, row in keyed.items() if key not in cache}


def response_tokens(rows: dict[str, Row]) -> int:
    return sum(int(labels[1:].ne(-100).sum()) for _, labels in rows.values())


def disk_need(
    config: TeacherConfig, device: str, cache: TeacherCache, missing: dict[str, Row]
) -> int:
    """Bytes that the missing rows, and head and embeddings, will take on disk."""
    model_config = teacher_config(config)
    text = model_config.get_text_config()
    dtype = teacher_dtype(config, model_config, teacher_device(config, device))
    states = response_tokens(missing) * bytes_per_token(text.hidden_size, cache.dtype, dtype)
    tables = 0
    if not cache.has_weights:
        tied = getattr(model_config, "tie_word_embeddings", False)
        tables = text.vocab_size * text.hidden_size * dtype.itemsize * (1 if tied else 2)
    return int(DISK_MARGIN * (states + tables))


def check_disk(cache: TeacherCache, need: int) -> int:
    """Free bytes where the cache lies. Raises UserError where they are fewer than `need`."""
    folder = next(
        path
        for path in (cache.folder.absolute(), *cache.folder.absolute().parents)
        if path.exists()
    )
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"The teacher cache {cache.folder} will take {readable_size(need)} more, and "
            f"{readable_size(free)} are free there: {readable_size(need - free)} are missing. Free "
            "them, give a folder on another disk, or keep the states in fewer bytes "
            "(dwakd.teacher.cache_dtype: float8_e4m3)."
        )
    return free


def fill(
    config: TeacherConfig,
    device: str,
    cache: TeacherCache,
    missing: dict[str, Row],
    progress: Progress = lambda done, total: None,
    batch_tokens: int = BATCH_TOKENS,
) -> Teacher | None:
    """Computes the states of `missing` rows, shortest to longest, and writes them to the cache.

    Batches have about `batch_tokens` padded tokens; they hold the same rows however often the
    filling was interrupted. Returns the teacher, or None where there was nothing to do. Raises
    UserError; what was written until then stays.
    """
    if not missing and cache.has_weights:
        return None
    check_disk(cache, disk_need(config, device, cache, missing))
    teacher = load_teacher(config, device)
    keys = sorted(missing, key=lambda key: (len(missing[key][0]), key))
    total = response_tokens(missing)
    pending: dict[str, Tensor] = {}
    written = begun = 0
    try:
        if not cache.has_weights:
            cache.save_weights(_weights(teacher))
        progress(0, total)
        while begun < len(keys):
            length = len(missing[keys[begun]][0])
            names = keys[begun : begun + max(1, batch_tokens // length)]
            batch = teacher_batch(*map(list, zip(*(missing[key] for key in names), strict=True)))
            hidden = teacher.hidden(batch)
            for key, states, count in zip(
                names, hidden, batch["teacher_lengths"].tolist(), strict=True
            ):
                if not states[:count].isfinite().all():
                    raise UserError(
                        "The teacher's hidden states are not finite (NaN or infinity), so "
                        f"{config.base_model} cannot teach. Check its weights, or try another "
                        "dwakd.teacher.dtype."
                    )
                pending[key] = states[:count].clone()
            begun += len(names)
            if sum(states.nbytes for states in pending.values()) >= SHARD_BYTES:
                written += _flush(cache, pending)
            progress(written + sum(map(len, pending.values())), total)
        _flush(cache, pending)
    except KeyboardInterrupt:
        _flush(cache, pending)
        raise
    except DiskFull as error:
        left = {key: row for key, row in missing.items() if key not in cache}
        need = disk_need(config, device, cache, left)
        lacking = need - shutil.disk_usage(cache.folder).free
        raise UserError(
            f"{error} {len(missing) - len(left):,} of {len(missing):,} rows were written and are "
            f"kept; the rest needs {readable_size(need)}, {readable_size(max(0, lacking))} more "
            "than is free. Free them, and the same command goes on from here."
        ) from error
    return teacher


def _flush(cache: TeacherCache, pending: dict[str, Tensor]) -> int:
    """Writes and forgets the pending states; returns how many tokens they were."""
    tokens = sum(map(len, pending.values()))
    if pending:
        cache.append(pending)
    pending.clear()
    return tokens


def _content(name: str) -> str:
    """A model's identity: its folder's content, or its name on the hub."""
    return fingerprint_of_folder(Path(name)) if Path(name).is_dir() else name


def _digest(text: Any) -> str | None:
    return None if text is None else sha256(str(text).encode()).hexdigest()[:16]


def readable_size(size: int) -> str:
    """Bytes in words, as `1.25 GiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _weights(teacher: Teacher) -> dict[str, Tensor]:
    """Embeddings and head as named tensors; a tied head is kept once."""
    head = teacher.head
    weights = {
        "embeddings": teacher.embeddings.weight,
        "embed_scale": torch.tensor(teacher.embeddings.scale, dtype=torch.float64),
        "scale": torch.tensor(head.scale, dtype=torch.float64),
        "softcap": torch.tensor(head.softcap or 0.0, dtype=torch.float64),
        "parameters": torch.tensor(teacher.parameters or 0),
    }
    if head.weight.data_ptr() != teacher.embeddings.weight.data_ptr():
        weights["head"] = head.weight
    if head.bias is not None:
        weights["bias"] = head.bias
    return weights


def _from_weights(weights: dict[str, Tensor], precision: str) -> Teacher:
    embeddings = weights["embeddings"]
    return Teacher(
        embeddings=EmbeddingTable(embeddings, float(weights["embed_scale"])),
        head=Head(
            weights.get("head", embeddings),
            weights.get("bias"),
            float(weights["scale"]),
            float(weights["softcap"]) or None,
        ),
        model=None,
        parameters=int(weights["parameters"]) or None,
        attention="not needed",
        precision=f"states ({precision}) from the cache, only head and embeddings loaded",
    )
