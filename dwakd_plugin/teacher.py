"""A frozen teacher as a source of hidden states at response positions.

The states come from a loaded model or from a cache on disk; nothing behind `Teacher.states` knows
which. The teacher never trains, is never wrapped by accelerate and never saved.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from dwakd_plugin.causal_lm import (
    EmbeddingTable,
    embedding_table,
    gather_positions,
    hidden_states,
    output_head,
    parameter_count,
)
from dwakd_plugin.collator import teacher_batch
from dwakd_plugin.config import TeacherConfig
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import Head, ResponseStates
from dwakd_plugin.teacher_cache import TeacherCache, fingerprint_of_folder, row_key

# Rows per shard are bounded by bytes: a kill loses at most this much of the teacher's work.
SHARD_BYTES = 64 * 2**20


@dataclass
class Teacher:
    """A frozen teacher: embeddings and head always, its body only where states are computed."""

    embeddings: EmbeddingTable
    head: Head
    model: PreTrainedModel | None
    parameters: int
    attention: str
    precision: str

    @property
    def hidden_size(self) -> int:
        return self.embeddings.weight.shape[1]

    @torch.no_grad()
    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Final hidden states at response positions (B, T, D), for a collated batch."""
        if "teacher_hidden" in batch:
            return batch["teacher_hidden"]
        if self.model is None:
            raise RuntimeError("the teacher's body was released and the batch holds no states")
        device = self.model.device  # may be another than the student's
        states = hidden_states(
            self.model,
            batch["teacher_input_ids"].to(device),
            batch["teacher_attention_mask"].to(device),
        )
        states = gather_positions(states, batch["teacher_positions"].to(device))
        return states.to(batch["teacher_positions"].device)

    @torch.no_grad()
    def states(self, batch: dict[str, Tensor]) -> ResponseStates:
        """What the loss needs of the teacher, for a collated batch on the teacher's device."""
        read = gather_positions(batch["teacher_input_ids"], batch["teacher_positions"])
        predicted = gather_positions(batch["teacher_input_ids"], batch["teacher_positions"] + 1)
        return ResponseStates(
            input_embeds=self.embeddings(read),
            target_embeds=self.embeddings(predicted),
            hidden=self.hidden(batch),
            lengths=batch["teacher_lengths"],
            head=self.head,
            index=batch.get("teacher_index"),
        )


def load_teacher(config: TeacherConfig, device: str) -> Teacher:
    """Loads the teacher frozen, in eval mode, on `device`.

    Raises UserError where the checkpoint, its quantisation or its attention cannot be had.
    """
    student_device, device = device, config.device or device
    attention = choose_attention(config, device)
    quantisation = _quantisation(config)
    try:
        with _without_rank_zero_loading():
            model = AutoModelForCausalLM.from_pretrained(
                config.base_model,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=_dtype(config, device),
                attn_implementation=attention,
                quantization_config=quantisation,
                device_map={"": device},
            )
            if config.adapter:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, config.adapter)
                if quantisation is None:
                    model = model.merge_and_unload()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            f"The teacher {config.base_model} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    model.eval().requires_grad_(False)
    table, head = embedding_table(model), output_head(model)
    if torch.device(device) != torch.device(student_device):
        tied = head.weight is table.weight
        table = replace(table, weight=table.weight.to(student_device))
        head = replace(head, weight=table.weight if tied else head.weight.to(student_device))
    return Teacher(
        embeddings=table,
        head=head,
        model=model,
        parameters=parameter_count(model),
        attention=attention,
        precision=_precision(config, device),
    )


def open_cache(config: TeacherConfig, device: str) -> TeacherCache:
    """The cache folder that the recipe names, for this teacher in this precision."""
    assert config.cache is not None
    hidden_size = teacher_config(config).get_text_config().hidden_size
    folder = Path(config.base_model)
    return TeacherCache(
        Path(config.cache),
        {
            "teacher": fingerprint_of_folder(folder) if folder.is_dir() else config.base_model,
            "revision": config.revision,
            "adapter": config.adapter,
            "precision": _precision(config, config.device or device),
            "hidden_size": hidden_size,
        },
    )


def teacher_config(config: TeacherConfig) -> Any:
    """The teacher's transformers config. Raises UserError where there is none."""
    try:
        return AutoConfig.from_pretrained(
            config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"The teacher `{config.base_model}` cannot be found: {str(error).splitlines()[0]}\n"
            "dwakd.teacher.base_model takes a folder with a config.json, or a hub id."
        ) from error


def cached_teacher(
    config: TeacherConfig,
    device: str,
    rows: Sequence[tuple[Tensor, Tensor]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Teacher, TeacherCache]:
    """A teacher without a body, and a cache that holds the states of every row.

    rows: teacher ids and labels (L,) of each row that training or evaluation will ask for. Missing
    rows are computed first, shortest to longest; `progress` hears how many of how many are done.
    """
    cache = open_cache(config, device)
    missing = {
        row_key(ids, labels): (ids, labels) for ids, labels in rows if labels[1:].ne(-100).any()
    }
    missing = {key: row for key, row in missing.items() if key not in cache}
    weights = cache.load_weights(device)
    if missing or weights is None:
        teacher = load_teacher(config, device)
        cache.save_weights(_weights(teacher))
        _fill(cache, teacher, missing, progress)
        teacher.model = None
        return teacher, cache
    return _from_weights(config, weights), cache


def _fill(
    cache: TeacherCache,
    teacher: Teacher,
    rows: dict[str, tuple[Tensor, Tensor]],
    progress: Callable[[int, int], None],
    tokens_per_batch: int = 2048,
) -> None:
    """Computes the states of `rows` in batches of about `tokens_per_batch` padded tokens."""
    keys = sorted(rows, key=lambda key: (len(rows[key][0]), key))
    pending: dict[str, Tensor] = {}
    done = 0
    while done < len(keys):
        length = len(rows[keys[done]][0])
        batch_keys = keys[done : done + max(1, tokens_per_batch // length)]
        batch = teacher_batch(*map(list, zip(*(rows[key] for key in batch_keys), strict=True)))
        lengths = batch["teacher_lengths"].tolist()
        hidden = teacher.hidden(batch)
        for key, states, count in zip(batch_keys, hidden, lengths, strict=True):
            pending[key] = states[:count].clone()
        done += len(batch_keys)
        size = sum(tensor.numel() * tensor.element_size() for tensor in pending.values())
        if size >= SHARD_BYTES or done >= len(keys):
            cache.append(pending)
            pending = {}
        progress(done, len(keys))


def _weights(teacher: Teacher) -> dict[str, Tensor]:
    """Embeddings and head as named tensors; a tied head is kept once."""
    head = teacher.head
    weights = {
        "embeddings": teacher.embeddings.weight,
        "embed_scale": torch.tensor(teacher.embeddings.scale, dtype=torch.float64),
        "scale": torch.tensor(head.scale, dtype=torch.float64),
        "softcap": torch.tensor(head.softcap or 0.0, dtype=torch.float64),
        "parameters": torch.tensor(teacher.parameters),
    }
    if head.weight.data_ptr() != teacher.embeddings.weight.data_ptr():
        weights["head"] = head.weight
    if head.bias is not None:
        weights["bias"] = head.bias
    return weights


def _from_weights(config: TeacherConfig, weights: dict[str, Tensor]) -> Teacher:
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
        parameters=int(weights["parameters"]),
        attention="not needed",
        precision="states from the cache",
    )


def choose_attention(config: TeacherConfig, device: str) -> str:
    """The attention backend: the recipe's, or flash_attention_2 where it can be had, or sdpa."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    half = _dtype(config, device) in ("auto", torch.bfloat16, torch.float16)
    if device.startswith("cuda") and half and is_flash_attn_2_available():
        return "flash_attention_2"
    return "sdpa"


def _precision(config: TeacherConfig, device: str) -> str:
    if config.load_in_8bit or config.load_in_4bit:
        return "8 bit" if config.load_in_8bit else "4 bit (nf4)"
    return str(_dtype(config, device)).removeprefix("torch.")


def _dtype(config: TeacherConfig, device: str) -> torch.dtype | str:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if device == "cpu" else "auto"  # half precision is slow on CPUs


def _quantisation(config: TeacherConfig) -> BitsAndBytesConfig | None:
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return None


@contextlib.contextmanager
def _without_rank_zero_loading() -> Iterator[None]:
    """FSDP's variable makes `from_pretrained` zero-fill weights on other ranks."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
