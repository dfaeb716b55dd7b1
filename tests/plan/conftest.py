"""The pair of models that plans are made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig


def config_only(folder: Path, config: Any) -> str:
    """A model's folder without weights: all that a plan may read."""
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of a Llama-like teacher and a GPT-2-like student that exist as configs alone."""
    folder = tmp_path_factory.mktemp("pair")
    teacher = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    student = GPT2Config(n_embd=256, n_layer=4, n_head=4)
    return {
        "base_model": config_only(folder / "student", student),
        "distillation": "dwakd",
        "dwakd": {
            "variant": "paper",
            "teacher": {"base_model": config_only(folder / "teacher", teacher)},
        },
        "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
        "sequence_len": 64,
        "micro_batch_size": 4,
        "optimizer": "adamw_torch",
        "bf16": False,
    }
