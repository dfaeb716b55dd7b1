"""What a LoRA's folder says of itself, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHANGES_BASE = "it changes the base model's weights, and only the adapter is kept"


def adapter_settings(folder: Any) -> dict[str, Any]:
    """What a folder's adapter_config.json says; {} where there is none to read."""
    file = Path(str(folder)) / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # said where it is loaded
        return {}
    return settings if isinstance(settings, dict) else {}


def base_of_adapter(folder: Any) -> str | None:
    """The base model of a folder that holds a LoRA and no whole model; None for any other."""
    base = adapter_settings(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return None
    weights = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("pytorch_model*.bin")]
    whole = any(not file.name.startswith("adapter_model") for file in weights)
    return None if whole else base


def changes_base(init: Any) -> bool:
    """Whether a LoRA that begins so (`init_lora_weights`) changes the weights below it.

    Loaded again, it would sit on another base than it was trained on: what was changed depends on
    chance or on the machine, or isn't done again.
    """
    names = ("pissa", "corda", "olora", "loftq", "lora_ga")
    return isinstance(init, str) and init.lower().startswith(names)
