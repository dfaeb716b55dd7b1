"""The tiny student, and rows encoded for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd_plugin.evaluate.rows import Encoded, Format, encode, read_rows
from tests.conftest import ROWS

ALPACA = Format("alpaca", "as asked")
TEXTS = [str(row["output"]) for row in ROWS[:6]]


@pytest.fixture(scope="session")
def student(lab: Path) -> tuple[Any, Any]:
    """The tiny student and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(lab / "student", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(lab / "student")


@pytest.fixture(scope="session")
def encoded(lab: Path, student: tuple[Any, Any]) -> list[Encoded]:
    tokenizer = student[1]
    return [
        encode(row, ALPACA, tokenizer, [tokenizer.eos_token_id])
        for row in read_rows(lab / "test.jsonl")
    ]
