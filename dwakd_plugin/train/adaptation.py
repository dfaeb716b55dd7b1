"""The teacher learns the recipe's rows before it teaches them: a LoRA, trained by axolotl.

A teacher that has not seen the task knows its language and not its form, the ends of responses
above all, and a student that follows it there moves away from the labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault
from torch import Tensor

from dwakd_plugin.data.fingerprint import local_files
from dwakd_plugin.data.teacher_side import (
    load_teacher_tokenizer,
    message_mapping,
    renders_chats,
    teacher_recipe,
)
from dwakd_plugin.errors import UserError, first_line
from dwakd_plugin.io.files import json_checksum, replace_file
from dwakd_plugin.models.batches import teacher_batch
from dwakd_plugin.models.folder import fingerprint_of_folder
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.recipe.reading import PLUGIN
from dwakd_plugin.tokenizers.loading import load_tokenizer

REPORT_FILE = "dwakd-adapt.json"  # in the adapter's folder: what it was made of, and its figures
WEIGHTS_FILE = "adapter_model.safetensors"
HELD_OUT = 0.05  # of the rows, where the recipe holds none out
# What a recipe says of rows, batches and precision means the same for the teacher; what it says of
# the student's weights, optimizer and tokenizer doesn't.
_SHARED_KEYS = (
    "datasets",
    "test_datasets",
    "val_set_size",
    "dataset_prepared_path",
    "dataset_num_proc",
    "dataset_processes",
    "dataloader_num_workers",
    "shuffle_merged_datasets",
    "excess_length_strategy",
    "min_sample_len",
    "train_on_inputs",
    "default_system_message",
    "sample_packing",
    "eval_sample_packing",
    "pad_to_sequence_len",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "attn_implementation",
    "flash_attention",
    "sdp_attention",
    "bf16",
    "fp16",
    "tf32",
    "logging_steps",
    "seed",
)
_MOST_EPOCHS = 3  # a LoRA knows a task's form by then, and soon its rows by heart


def adapter_folder(recipe: Recipe) -> Path:
    """Where the teacher's adapter goes unless told otherwise: beside the recipe's output folder."""
    return recipe.output_dir.with_name(f"{recipe.output_dir.name}-teacher")


def adaptation(
    recipe: Recipe,
    folder: Path,
    *,
    epochs: float | None = None,
    learning_rate: float = 2e-4,
    rank: int = 16,
) -> dict[str, Any]:
    """axolotl's recipe for the teacher of a recipe: the same rows in the teacher's own template.

    It is held as the recipe holds it: a LoRA on a teacher of 8 bit, or of 4. Raises UserError where
    there is an adapter already, or no tokenizer to read the rows with.
    """
    teacher = recipe.config.teacher
    teacher.must_be_loaded("A LoRA of the teacher (`dwakd adapt`)")
    if teacher.adapter is not None:
        raise UserError(
            f"dwakd.teacher.adapter is {teacher.adapter}: this teacher has learnt something "
            "already. Remove the key to have it learn these rows instead."
        )
    tokenizer = load_teacher_tokenizer(teacher)
    cfg = DictDefault(dict(recipe.keys))
    own = teacher_recipe(cfg, teacher, tokenizer)
    keys: dict[str, Any] = {
        "base_model": teacher.base_model,
        "tokenizer_config": teacher.tokenizer,
        "revision_of_model": teacher.revision,
        "trust_remote_code": teacher.trust_remote_code or None,
        "plugins": [PLUGIN],  # which says how far the run is, and without a teacher nothing else
        "load_in_8bit": teacher.load_in_8bit or None,
        "load_in_4bit": teacher.load_in_4bit or None,
        "adapter": "qlora" if teacher.load_in_4bit else "lora",
        "lora_r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
    }
    keys |= {key: recipe.keys[key] for key in _SHARED_KEYS if key in recipe.keys}
    if tokenizer.pad_token is None:
        keys["special_tokens"] = {"pad_token": tokenizer.unk_token or tokenizer.eos_token}
    if renders_chats(cfg):
        keys |= {
            "chat_template": "jinja",
            "chat_template_jinja": own.chat_template_jinja or _students_template(recipe, cfg),
            "eot_tokens": own.eot_tokens,
        }
        for name in ("datasets", "test_datasets"):
            if name in keys:
                keys[name] = [
                    _in_its_template(each, keys["chat_template_jinja"], teacher.thinking_key)
                    for each in keys[name]
                ]
    if not keys.get("test_datasets") and not keys.get("val_set_size"):
        keys["val_set_size"] = HELD_OUT
    keys |= {
        "sequence_len": own.sequence_len,
        "output_dir": str(folder),
        "num_epochs": epochs or min(float(recipe.keys.get("num_epochs") or 1), _MOST_EPOCHS),
        "optimizer": "adamw_torch",
        "learning_rate": learning_rate,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.05,
        "max_grad_norm": 1.0,
        "saves_per_epoch": 1,
        "save_total_limit": 1,
        "auto_resume_from_checkpoints": True,
    }
    keys.setdefault("gradient_checkpointing", True)  # the teacher is the big one
    if not torch.cuda.is_available():  # axolotl turns its CUDA kernels on wherever a LoRA fits them
        keys |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    return {key: value for key, value in keys.items() if value is not None}


def with_held_out(recipe: Recipe, keys: dict[str, Any]) -> Recipe:
    """The recipe with the rows held out that the teacher's own holds out."""
    if keys.get("val_set_size") and not keys.get("test_datasets"):
        return recipe.but(val_set_size=keys["val_set_size"])
    return recipe


def _students_template(recipe: Recipe, cfg: DictDefault) -> str:
    """A teacher without a chat template of its own renders the student's."""
    name, revision = recipe.tokenizer, recipe.keys.get("revision_of_model")
    tokenizer = load_tokenizer(name, f"The student's tokenizer `{name}`", revision=revision)
    chats = next(each for each in cfg.datasets if str(each.type).startswith(("chat", "messages")))
    try:
        template: str = get_chat_template_from_config(cfg, chats, tokenizer)
    except ValueError as error:
        raise UserError(
            "Neither the teacher nor the student has a chat template to render the rows with: "
            f"{first_line(error)}\nName one of axolotl's for both sides, as "
            "`chat_template: chatml` and `dwakd.teacher.chat_template: chatml`."
        ) from error
    return template


def _in_its_template(
    dataset: dict[str, Any], template: str, thinking_key: str | None
) -> dict[str, Any]:
    kept = {key: value for key, value in dataset.items() if not key.startswith("chat_template")}
    if thinking_key is not None:
        kept["template_thinking_key"] = thinking_key
    return kept | message_mapping(kept, template)


def fingerprint(keys: dict[str, Any]) -> str:
    """What an adapter depends on: its recipe, the data files, and the teacher's own files."""
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True, default=str).encode())
    for file in local_files(DictDefault(dict(keys))):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if Path(keys["base_model"]).is_dir():
        digest.update(fingerprint_of_folder(Path(keys["base_model"])).encode())
    return digest.hexdigest()[:32]


def finished(folder: Path, expected: str) -> dict[str, Any] | None:
    """The report of a whole adapter of this fingerprint; None where there is none."""
    try:
        record = dict(json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    whole = record.pop("crc32", None) == json_checksum(record)
    if not whole or not (folder / WEIGHTS_FILE).is_file() or record["made_of"] != expected:
        return None
    return dict(record["report"])


def keep_report(folder: Path, made_of: str, report: dict[str, Any]) -> None:
    record = {"made_of": made_of, "report": report}
    text = json.dumps(record | {"crc32": json_checksum(record)}, indent=1)
    replace_file(folder / REPORT_FILE, text)


class ResponseLoss(NamedTuple):
    """Nats that responses cost a teacher: of each token but the ends of turns, and of these."""

    per_token: float
    per_end: float
    tokens: int
    ends: int


@torch.no_grad()
def response_loss(
    teacher: Teacher,
    rows: Sequence[tuple[Tensor, Tensor]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    batch_size: int = 8,
) -> ResponseLoss:
    """The loss of rows, each ids and labels (L,) long, on all response tokens.

    An end is the last token of a turn: a label behind which the next doesn't count.
    """
    rows = sorted((row for row in rows if row[1][1:].ne(-100).any()), key=lambda row: len(row[0]))
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.long)
    for start in range(0, len(rows), batch_size):
        ids, labels = zip(*rows[start : start + batch_size], strict=True)
        states = teacher.states(teacher_batch(list(ids), list(labels)))
        ends = torch.cat([_ends(row) for row in labels])
        valid = states.labels.ne(-100)  # type: ignore[union-attr]
        logits = teacher.head.logits(states.hidden[valid])
        nats = F.cross_entropy(logits, states.labels[valid], reduction="none").double().cpu()  # type: ignore[index]
        for kind, of_kind in enumerate((~ends, ends)):
            sums[kind] += nats[of_kind].sum()
            counts[kind] += of_kind.sum()
        on_progress(min(start + batch_size, len(rows)), len(rows))
    per_token, per_end = (sums / counts.clamp_min(1)).tolist()
    return ResponseLoss(per_token, per_end, int(counts[0]), int(counts[1]))


def _ends(labels: Tensor) -> Tensor:
    """Of a row's response positions, in order, which predict a turn's last token: (N,) bool."""
    counts = labels[1:].ne(-100)
    behind = torch.cat([counts[1:], counts.new_zeros(1)])
    return (~behind)[counts]
