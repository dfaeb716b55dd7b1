"""A teacher whose states, or likeliest tokens, come from a cache, and the filling of that cache."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import DiskFull
from dwakd_plugin.loss import Head, TopTokens
from dwakd_plugin.models.batches import check_ids, teacher_batch, teacher_columns
from dwakd_plugin.models.causal_lm import EmbeddingTable
from dwakd_plugin.models.folder import fingerprint_of_folder
from dwakd_plugin.models.teacher.cache import SHARD_BYTES, TeacherCache
from dwakd_plugin.models.teacher.kept_states import bytes_per_token, kept_form, row_key
from dwakd_plugin.models.teacher.loaded import (
    Teacher,
    load_teacher,
    precision_name,
    teacher_config,
    teacher_device,
    teacher_dtype,
)
from dwakd_plugin.models.teacher.served import ServedTeacher
from dwakd_plugin.models.teacher.server import ServerGone
from dwakd_plugin.models.teacher.top_tokens import top_of_states
from dwakd_plugin.recipe.schema import TeacherConfig

Row = tuple[Tensor, Tensor]  # teacher token ids and labels, both (L,)
Progress = Callable[[int, int], None]  # hears how many response tokens of how many are done

BATCH_TOKENS = 2048
DISK_MARGIN = 1.02
ROW_BYTES = 200  # of a row's name, checksum and shape


def open_cache(config: TeacherConfig, device: str, tokenizer: Any) -> TeacherCache:
    """The cache folder that the recipe names, for this teacher in this precision.

    Raises UserError where the folder cannot be that.
    """
    assert config.cache is not None
    return TeacherCache(
        Path(config.cache), teacher_identity(config, device, tokenizer), kept_form(config)
    )


def teacher_identity(config: TeacherConfig, device: str, tokenizer: Any) -> dict[str, Any]:
    """What a teacher's states and answers depend on beside the rows: folders by their contents."""
    if config.server is not None:
        return {
            "teacher": config.called,
            "precision": "a server's",
            "tokenizer": _digest(json.dumps(sorted(tokenizer.get_vocab().items()))),
            "chat_template": _digest(config.chat_template or tokenizer.chat_template),
        }
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
    *,
    live: bool = False,
) -> tuple[Teacher, TeacherCache]:
    """A teacher without a body, and a cache that holds what it says of every row.

    rows: those that training or evaluation will ask for. Missing ones are computed first, by the
    first process to come, for which others wait. live: the teacher has its body, to read others.
    """
    cache = open_cache(config, device, tokenizer)
    if missing_rows(cache, rows) or not cache.has_weights:
        with cache.writing(wait=True, on_wait=on_wait):
            missing = missing_rows(cache, rows)
            if len(cache) and not cache.keys & {row_key(*row) for row in rows}:
                on_wait(
                    f"None of the {len(missing):,} rows is among the {len(cache):,} of the teacher "
                    f"cache {cache.folder}, so all are computed: other data, another chat "
                    "template, or one that prints the day (strftime_now)."
                )
            fill(config, device, cache, missing, progress, tokenizer=tokenizer, say=on_wait)
            gc.collect()  # the body goes now, before another is loaded
    if live:
        return load_teacher(config, device), cache
    weights = cache.load_weights(device)
    assert weights is not None  # they are written before the first state
    precision = cache.identity["precision"]
    if cache.top_k is None:
        return _from_weights(weights, precision), cache
    return (
        teacher_of_probabilities(
            int(weights["head_rows"]),
            device,
            f"the {cache.top_k} likeliest tokens ({precision}) from the cache, nothing loaded",
            int(weights["parameters"]) or None,
        ),
        cache,
    )


def teacher_of_probabilities(
    head_rows: int,
    device: str,
    precision: str,
    parameters: int | None,
    served: ServedTeacher | None = None,
) -> Teacher:
    """A teacher of which nothing is loaded, whose rows come as `TopTokens` (DualCollator).

    head_rows: how many tokens it has, at least one more than the largest id. Embeddings and head
    have so many rows, of no numbers.
    """
    nothing = torch.zeros(head_rows, 0, device=device)
    return Teacher(
        embeddings=EmbeddingTable(nothing),
        head=Head(nothing),
        model=None,
        parameters=parameters,
        attention="not needed",
        precision=precision,
        served=served,
    )


def teacher_rows(*datasets: Any, number: int = 0) -> list[Row]:
    """A teacher's ids and labels of every row of the data sets; None is one without rows."""
    rows = []
    ids, labels = teacher_columns(number)
    for dataset in datasets:
        if dataset is None:
            continue
        columns = dataset.select_columns([ids, labels]).with_format(None)
        rows += [(torch.tensor(row[ids]), torch.tensor(row[labels])) for row in columns]
    return rows


def missing_rows(cache: TeacherCache, rows: Sequence[Row]) -> dict[str, Row]:
    """The rows with a response whose states the cache lacks, by key."""
    keyed = {
        row_key(ids, labels): (ids, labels) for ids, labels in rows if labels[1:].ne(-100).any()
    }
    return {key: row for key, row in keyed.items() if key not in cache}


def response_tokens(rows: dict[str, Row]) -> int:
    return sum(int(labels[1:].ne(-100).sum()) for _, labels in rows.values())


def token_bytes(config: TeacherConfig, device: str, cache: TeacherCache) -> int:
    """Bytes that a response token takes on disk."""
    if cache.top_k is not None:
        return bytes_per_token(0, cache.dtype, torch.float32)
    model_config = teacher_config(config)
    dtype = teacher_dtype(config, model_config, teacher_device(config, device))
    return bytes_per_token(model_config.get_text_config().hidden_size, cache.dtype, dtype)


def disk_need(
    config: TeacherConfig, device: str, cache: TeacherCache, missing: dict[str, Row]
) -> int:
    """Bytes that the missing rows, and head and embeddings, will take on disk."""
    states = response_tokens(missing) * token_bytes(config, device, cache)
    tables = ROW_BYTES * len(missing)
    if not cache.has_weights and cache.top_k is None:  # which has neither
        model_config = teacher_config(config)
        text = model_config.get_text_config()
        dtype = teacher_dtype(config, model_config, teacher_device(config, device))
        tied = getattr(model_config, "tie_word_embeddings", False)
        tables += text.vocab_size * text.hidden_size * dtype.itemsize * (1 if tied else 2)
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
            "them, give a folder on another disk, or keep "
            + (
                "the states in fewer bytes (dwakd.teacher.cache_dtype: float8_e4m3)."
                if cache.top_k is None
                else f"fewer tokens (dwakd.teacher.top_k, {cache.top_k} now)."
            )
        )
    return free


def fill(
    config: TeacherConfig,
    device: str,
    cache: TeacherCache,
    missing: dict[str, Row],
    progress: Progress = lambda done, total: None,
    batch_tokens: int = BATCH_TOKENS,
    *,
    tokenizer: Any = None,
    say: Callable[[str], None] = print,
) -> Teacher | None:
    """Loads the teacher and lets it say of `missing` rows what the cache keeps; see `fill_by`.

    One on a server is asked instead, with the teacher's tokenizer to read them by.
    Returns the teacher, or None where there was nothing to do.
    """
    if not missing and cache.has_weights:
        return None
    need = partial(disk_need, config, device, cache)
    check_disk(cache, need(missing))
    if config.server is not None:
        longest = max((len(ids) for ids, _ in missing.values()), default=0)
        served = ServedTeacher(config, tokenizer, longest, say)
        weights = weights_of_probabilities(served.vocabulary, None)
        at_once = max(batch_tokens, 4 * config.server_requests * longest)
        fill_by(served.said, cache, missing, weights, need, progress, at_once)
        if (lost := served.lost()) is not None:
            say(lost)
        return teacher_of_probabilities(served.vocabulary, device, str(served), None, served)
    teacher = load_teacher(config, device)
    size = teacher.embeddings.weight.shape[0]
    check_ids((ids for ids, _ in missing.values()), size, config.base_model, tokenizer)

    def said(rows: Sequence[Row]) -> list[Tensor | TopTokens]:
        batch = teacher_batch(*map(list, zip(*rows, strict=True)))
        hidden = teacher.hidden(batch)
        found: list[Tensor | TopTokens] = []
        for states, count in zip(hidden, batch["teacher_lengths"].tolist(), strict=True):
            if not states[:count].isfinite().all():
                raise UserError(
                    "The teacher's hidden states are not finite (NaN or infinity), so "
                    f"{config.base_model} cannot teach. Check its weights, or try another "
                    "dwakd.teacher.dtype."
                )
            own = states[:count].clone()
            found.append(
                own if cache.top_k is None else top_of_states(own, teacher.head, cache.top_k)
            )
        return found

    weights = (
        _weights(teacher)
        if cache.top_k is None
        else weights_of_probabilities(teacher.head.weight.shape[0], teacher.parameters)
    )
    fill_by(said, cache, missing, weights, need, progress, batch_tokens)
    return teacher


def weights_of_probabilities(head_rows: int, parameters: int | None) -> dict[str, Tensor]:
    """What a cache of likeliest tokens keeps of the teacher, for `teacher_of_probabilities`."""
    return {"head_rows": torch.tensor(head_rows), "parameters": torch.tensor(parameters or 0)}


def fill_by(
    said: Callable[[Sequence[Row]], Sequence[Tensor | TopTokens]],
    cache: TeacherCache,
    missing: dict[str, Row],
    weights: dict[str, Tensor],
    need: Callable[[dict[str, Row]], int],
    progress: Progress = lambda done, total: None,
    batch_tokens: int = BATCH_TOKENS,
) -> None:
    """Writes to the cache what the teacher says of `missing` rows, shortest to longest.

    said: of some rows, of each what the cache keeps of it. weights: what it keeps beside the rows.
    need: the bytes that rows take on disk. Batches hold the same rows however often the filling was
    interrupted. Raises UserError; what was written until then stays.
    """
    total = response_tokens(missing)
    pending: dict[str, Tensor | TopTokens] = {}
    written = 0
    try:
        if not cache.has_weights:
            cache.save_weights(weights)
        progress(0, total)
        for names in batches_of(missing, batch_tokens):
            pending |= zip(names, said([missing[key] for key in names]), strict=True)
            if sum(map(_bytes, pending.values())) >= SHARD_BYTES:
                written += _flush(cache, pending)
            progress(written + sum(map(_positions, pending.values())), total)
        _flush(cache, pending)
    except (KeyboardInterrupt, ServerGone):
        _flush(cache, pending)
        raise
    except DiskFull as error:
        left = {key: row for key, row in missing.items() if key not in cache}
        rest = need(left)
        lacking = rest - shutil.disk_usage(cache.folder).free
        raise UserError(
            f"{error} {len(missing) - len(left):,} of {len(missing):,} rows were written and are "
            f"kept; the rest needs {readable_size(rest)}, {readable_size(max(0, lacking))} more "
            "than is free. Free them, and the same command goes on from here."
        ) from error


def batches_of(missing: Mapping[str, Row], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[str]]:
    """The keys of rows that the teacher reads at once, shortest to longest.

    At most `batch_tokens` with their padding, or one row.
    """
    names: list[str] = []
    for key in sorted(missing, key=lambda key: (len(missing[key][0]), key)):
        if names and (len(names) + 1) * len(missing[key][0]) > batch_tokens:
            yield names
            names = []
        names.append(key)
    if names:
        yield names


def _positions(said: Tensor | TopTokens) -> int:
    return len(said.log_probs if isinstance(said, TopTokens) else said)


def _bytes(said: Tensor | TopTokens) -> int:
    return sum(each.nbytes for each in said) if isinstance(said, TopTokens) else said.nbytes


def _flush(cache: TeacherCache, pending: dict[str, Tensor | TopTokens]) -> int:
    """Writes and forgets the pending rows; returns how many tokens they were."""
    tokens = sum(map(_positions, pending.values()))
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
