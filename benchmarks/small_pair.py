"""A real pair of which the student is small and quick: what some benchmarks measure on.

SmolLM2-135M-Instruct, and a Llama of 4M parameters with a tokenizer of its own that has read
Python's documentation; the rows are questions about the standard library, answered by it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from benchmarks.small_student import create_student
from dwakd_plugin.data.library_docs import documentation_rows
from dwakd_plugin.evaluate.held_out import alpaca_prompt
from dwakd_plugin.io.files import replace_file
from dwakd_plugin.models.smollm2 import prepare_teacher
from dwakd_plugin.tokenizers.training import train_tokenizer
from dwakd_plugin.train.launch import axolotl_environment, axolotl_train

TRAIN_ROWS, HELD_OUT_ROWS, VOCABULARY = 300, 120, 4096
STUDENT = {"hidden_size": 256, "layers": 4, "heads": 4, "intermediate_size": 704, "seed": 7}

COMMON: dict[str, Any] = {
    "dataset_prepared_path": "prepared",
    "pad_to_sequence_len": False,
    "gradient_accumulation_steps": 1,
    "micro_batch_size": 8,
    "optimizer": "adamw_torch",
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.05,
    "weight_decay": 0.01,
    "bf16": False,
    "fp16": False,
    "logging_steps": 20,
    "save_strategy": "no",
    "seed": 7,
}
PRETRAIN = COMMON | {
    "base_model": "untrained",
    "datasets": [{"path": "data/pretraining.jsonl", "type": "completion"}],
    "output_dir": "pretrain",
    "sequence_len": 128,
    "num_epochs": 2,
    "learning_rate": 1.5e-3,
}
DWAKD = COMMON | {
    "base_model": "pretrain",
    "plugins": ["dwakd_plugin.DWAKDPlugin"],
    "distillation": "dwakd",
    "dwakd": {
        "teacher": {"base_model": "teacher", "cache": "teacher_states"},
        "loss": {"ce_weight": 1.0, "dtw_weight": 0.05, "temperature": 1.0, "kd_warmup_steps": 1500},
        "projectors": {"warmup_steps": 250, "learning_rate": 3.0e-3},
    },
    "datasets": [{"path": "data/train.jsonl", "type": "alpaca"}],
    "test_datasets": [{"path": "data/held_out.jsonl", "type": "alpaca", "split": "train"}],
    "output_dir": "dwakd",
    "sequence_len": 256,
    "num_epochs": 4,
    "learning_rate": 3.0e-4,
    "max_grad_norm": 1.0,
    "eval_steps": 76,
}


def prepare(folder: Path) -> None:
    """Teacher, data, tokenizer, untrained student and `dwakd.yml`; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare_teacher(folder / "teacher")
    documentation = documentation_rows(HELD_OUT_ROWS)
    train, reading = documentation.train[:TRAIN_ROWS], documentation.pretraining_texts
    rows = {"train": train, "held_out": documentation.held_out}
    for name, lines in {**rows, "pretraining": [{"text": text} for text in reading]}.items():
        (folder / "data").mkdir(exist_ok=True)
        content = "".join(json.dumps(line) + "\n" for line in lines)
        replace_file(folder / "data" / f"{name}.jsonl", content)
    if not (folder / "untrained").is_dir():
        texts = [alpaca_prompt(row) + row["output"] for row in train]
        tokenizer = train_tokenizer([*texts, *reading], VOCABULARY)
        create_student(folder / "untrained", tokenizer, **STUDENT, teacher=folder / "teacher")
    for name, recipe in {"pretrain": PRETRAIN, "dwakd": DWAKD}.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def pretrain(folder: Path) -> None:
    """The student reads the documentation, unless it has."""
    if not any((folder / "pretrain").glob("*.safetensors")):
        environment = axolotl_environment() | {"HF_HUB_OFFLINE": "1"}
        command = axolotl_train("pretrain.yml", "python")
        subprocess.run(command, cwd=folder, env=environment, check=True)
