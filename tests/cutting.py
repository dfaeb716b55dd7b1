"""Models of four layers to cut, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import families
from tests.conftest import ROWS

TEXTS = [f"{row['instruction']} {row['input']} {row['output']}" for row in ROWS] + ["naïve 東京 🙂"]
CAN = [name for name in families.FAMILIES if not name.startswith("opt")]
DEEP = {"num_hidden_layers": 4, "n_layer": 4}


def deep(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **further: Any) -> Path:
    """A family's model with four layers."""
    make, config, settings, rows = families.FAMILIES[name]
    settings = {key: DEEP.get(key, value) for key, value in settings.items()} | further
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"] * 2
    if "max_window_layers" in settings:
        settings["max_window_layers"] = 2
    monkeypatch.setitem(families.FAMILIES, name, (make, config, settings, rows))
    return families.create(name, folder)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids_of(model: Any, count: int = 3, length: int = 40) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(300, (count, length))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits
