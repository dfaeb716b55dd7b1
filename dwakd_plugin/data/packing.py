"""Sample packing: several rows in one sequence, on each side its own, with rows kept in pairs.

axolotl's sampler decides which rows share a sequence. It is shown, as each row's length, what the
row takes of the side on which it is the longer, so that what fits the student's sequences fits the
teacher's as well. Rows are told apart by position ids that start at 0 with each of them, which
transformers turns into block-diagonal attention, or into flash attention's variable lengths.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from datasets import Dataset
from numpy import maximum
from pyarrow.compute import list_value_length
from torch import nn
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.batches import teacher_columns
from dwakd_plugin.models.causal_lm import causal_lm, hidden_states
from dwakd_plugin.models.teacher.loaded import (
    check_teacher,
    teacher_config,
    teacher_device,
    teacher_dtype,
)
from dwakd_plugin.recipe.schema import TeacherConfig

LENGTH_COLUMN = "length"  # what axolotl's sampler packs by
PROBE_LENGTHS = (13, 9, 11)  # tokens of the rows that the probe packs
TEACHER_REMEDY = (
    "Set `sample_packing: false`, another dwakd.teacher.attn_implementation, or "
    "dwakd.teacher.cache, which packs nothing on the teacher's side."
)


def pair_lengths(rows: Dataset, student_len: int, *teacher_lens: int) -> Dataset:
    """The rows with `length`: the share of a sequence that a pair takes, in the student's tokens.

    A sequence has `student_len` tokens on the student's side and `teacher_lens` on each teacher's;
    a pair takes the largest of its shares. Rows whose lengths together are no more than
    `student_len` fit all sides.
    """
    lengths: list[int] = []
    names = ["input_ids", *(teacher_columns(number)[0] for number in range(len(teacher_lens)))]
    columns = rows.select_columns(names).with_format("arrow")
    for table in columns.iter(10_000):
        student, *teachers = (
            list_value_length(table[name]).to_numpy().astype("int64") for name in names
        )
        shares = [
            -(-teacher * student_len // own)
            for teacher, own in zip(teachers, teacher_lens, strict=True)
        ]
        lengths += reduce(maximum, shares, student).tolist()
    if LENGTH_COLUMN in rows.column_names:
        rows = rows.remove_columns(LENGTH_COLUMN)
    return rows.add_column(LENGTH_COLUMN, lengths)


def pack_by_pairs(cfg: Any, teacher_lens: Sequence[int], datasets: Any) -> None:
    """Has axolotl's sampler pack pairs, and counts the run's steps again; changes `datasets`."""
    from axolotl.utils.trainer import calculate_total_num_steps

    rows = pair_lengths(datasets.train_dataset, cfg.sequence_len, *teacher_lens)
    datasets.train_dataset = rows
    if datasets.eval_dataset is not None:
        datasets.eval_dataset = pair_lengths(datasets.eval_dataset, cfg.sequence_len, *teacher_lens)
    steps = calculate_total_num_steps(cfg, rows)
    datasets.total_num_steps = min(steps, cfg.max_steps) if cfg.max_steps else steps


class SeededOrder(Sampler[int]):
    """A shuffled order of `count` rows that depends on the seed and the epoch alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).tolist())

    def __len__(self) -> int:
        return self.count


def check_packing_of_teacher(config: TeacherConfig, device: str) -> None:
    """Raises UserError where a teacher's architecture mixes packed rows, before it is loaded.

    Asks a model of its config with random weights: of each kind of layer one, with a narrow MLP and
    few tokens. Says nothing where none can be made so: `check_packing` asks the teacher itself.
    """
    attention, _ = check_teacher(config, device)
    whole = teacher_config(config)
    own = torch.device(teacher_device(config, device))
    dtype = teacher_dtype(config, whole, str(own))
    try:
        small = _small_config(whole.get_text_config())
        with torch.random.fork_rng(devices=[]), own:
            model = AutoModelForCausalLM.from_config(
                small, dtype=dtype, attn_implementation=attention
            )
    except Exception:  # code of its own, sizes that depend on one another: each its own error
        return
    check_packing(model, "The teacher", TEACHER_REMEDY, 1 if "flash" in attention else 2)


def _small_config(config: Any) -> Any:
    small = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["all"]))
    sizes = {
        "vocab_size": 64,
        "num_hidden_layers": len(kinds),
        "intermediate_size": 64,
        "ffn_dim": 64,
        "moe_intermediate_size": 64,
        "n_inner": 64,
    }
    for name, size in sizes.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "quantization_config"):
        if getattr(small, name, None) is not None:
            setattr(small, name, None)
    if getattr(config, "layer_types", None):
        small.layer_types = kinds
    return small


@torch.no_grad()
def check_packing(model: Any, name: str, remedy: str, sequences: int = 1) -> None:
    """Raises UserError where rows packed into one sequence see each other, or lose their positions.

    Final hidden states of packed rows are compared with those of each row alone, for `sequences`
    equal ones at once, as the run will have them. The model's mode is left as it was.
    """
    device = causal_lm(model).get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(causal_lm(model).config.get_text_config().vocab_size)
    rows = [torch.randint(vocabulary, (count,), generator=generator) for count in PROBE_LENGTHS]
    positions = torch.cat([torch.arange(count) for count in PROBE_LENGTHS])
    was_training = model.training
    model.eval()
    try:
        packed = hidden_states(
            model,
            torch.cat(rows).expand(sequences, -1).to(device),
            None,
            position_ids=positions.expand(sequences, -1).to(device),
        )
        alone = torch.cat(
            [hidden_states(model, row[None].to(device), None)[0].to(packed.device) for row in rows]
        )
    except TypeError as error:
        raise UserError(
            f"{name} ({type(causal_lm(model)).__name__}) takes no position ids, by which packed "
            f"rows are told apart ({error}). {remedy}"
        ) from error
    finally:
        model.train(was_training)
    error = (packed - alone).float().norm(dim=-1) / alone.float().norm(dim=-1).clamp(min=1e-6)
    # Half precision and quantised layers, whose rounding depends on what is computed together.
    exact = packed.dtype == torch.float32 and not _is_quantised(model)
    if error.max().item() > (1e-3 if exact else 0.1):
        raise UserError(
            f"{name} ({type(causal_lm(model)).__name__}, attention "
            f"{causal_lm(model).config._attn_implementation}) mixes rows that are packed into one "
            f"sequence: their hidden states differ from those of each row alone by "
            f"{error.max().item():.0%}. {remedy}"
        )


def _is_quantised(model: nn.Module) -> bool:
    return getattr(causal_lm(model), "quantization_method", None) is not None
