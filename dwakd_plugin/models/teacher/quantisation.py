"""In how few bits a teacher is held: by the recipe, or by its checkpoint; and what that takes.

Importing this module imports no torch, so that a recipe can be checked quickly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.schema import TeacherConfig

# What transformers needs to load a checkpoint that is quantised by this method: module, package.
_PACKAGES = {
    "bitsandbytes": [("bitsandbytes", "bitsandbytes")],
    "gptq": [("gptqmodel", "gptqmodel"), ("optimum", "optimum")],
    "awq": [("gptqmodel", "gptqmodel")],
    "compressed-tensors": [("compressed_tensors", "compressed-tensors")],
    "aqlm": [("aqlm", "aqlm[gpu]")],
    "auto-round": [("auto_round", "auto-round")],
    "hqq": [("hqq", "hqq")],
    "quanto": [("optimum.quanto", "optimum-quanto")],
    "torchao": [("torchao", "torchao")],
}


def check_packages(
    config: TeacherConfig,
    own: dict[str, Any] | None,
    installed: Callable[[str], bool] = lambda module: _is_installed(module),
) -> None:
    """Raises UserError where a package is missing that the teacher's quantisation needs.

    `own` is the checkpoint's own `quantization_config`, where it has one.
    """
    if own is not None:
        method = _method(own)
        missing = [
            package for module, package in _PACKAGES.get(method, []) if not installed(module)
        ]
        if missing:
            raise UserError(
                f"The teacher {config.base_model} is quantised ({describe(own)}), and loading it "
                f"needs a package that is not installed: `pip install {' '.join(missing)}`."
            )
    elif asked(config) is not None and not installed("bitsandbytes"):
        raise UserError(
            f"dwakd.teacher.{asked(config)} needs a package that is not installed: "
            "`pip install bitsandbytes`. Or remove the line, to hold the teacher unquantised."
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a part of a package that is not there
        return False


def check_device(
    config: TeacherConfig, device: str, capability: tuple[int, int] | None, supported: set[str]
) -> None:
    """Raises UserError where bitsandbytes cannot quantise on the teacher's device.

    device: its type, as `cuda`. capability: an NVIDIA GPU's, else None. supported: the device types
    that bitsandbytes names.
    """
    key = asked(config)
    if key is None:
        return
    if isinstance(config.device, dict) or config.device == "offload":
        raise UserError(
            f"dwakd.teacher.{key} and dwakd.teacher.device: {config.device} do not go together: "
            "bitsandbytes keeps all layers on one device. Choose one; in 4 bit, a teacher takes "
            "about a quarter of its size in half precision."
        )
    if device not in supported:
        raise UserError(
            f"dwakd.teacher.{key}: bitsandbytes cannot quantise on `{device}` (it can on "
            f"{', '.join(sorted(supported))}). Remove the line, or set dwakd.teacher.device."
        )
    needed = (7, 5) if key == "load_in_8bit" else (6, 0)
    if capability is not None and capability < needed:
        raise UserError(
            f"dwakd.teacher.{key} needs compute capability {'.'.join(map(str, needed))}, and the "
            f"GPU has {'.'.join(map(str, capability))}. "
            + ("Use load_in_4bit." if key == "load_in_8bit" else "Hold the teacher in float16.")
        )


def asked(config: TeacherConfig) -> str | None:
    """The key by which the recipe asks for a quantisation."""
    for key in ("load_in_8bit", "load_in_4bit"):
        if getattr(config, key):
            return key
    return None


def quantisation_config(config: TeacherConfig, compute_dtype: Any) -> Any | None:
    """What transformers is told; None for an unquantised teacher. Head and embeddings are left out
    by transformers, which `check_head` makes sure of."""
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        threshold = config.int8_threshold
        return BitsAndBytesConfig(
            load_in_8bit=True,
            **({} if threshold is None else {"llm_int8_threshold": threshold}),
        )
    if config.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return None


def check_range(config: TeacherConfig, own: dict[str, Any] | None) -> None:
    """Raises UserError for an 8-bit teacher whose states are not finite: bitsandbytes computes its
    layers in float16, whatever the dtype of the rest is.

    `own` is the checkpoint's own `quantization_config`, where it has one.
    """
    if (own or {}).get("load_in_8bit") or (own is None and config.load_in_8bit):
        raise UserError(
            f"The 8-bit teacher {config.base_model} gives states that are not finite. Its layers "
            "compute in float16, whose range ends at 65,504; a teacher with larger values needs "
            "load_in_4bit, which computes in dwakd.teacher.dtype, or no quantisation."
        )


def check_head(name: str, head: Any, embeddings: Any) -> None:
    """Raises UserError where head or embeddings (tensors) are quantised; the loss needs both."""
    for part, weight in (("output head", head), ("input embeddings", embeddings)):
        if weight.dtype.itemsize < 2 or not weight.is_floating_point():
            raise UserError(
                f"The {part} of the teacher {name} is quantised ({weight.dtype}), and the loss "
                "computes with it. Take a checkpoint that leaves head and embeddings unquantised."
            )


def own_quantisation(model_config: Any) -> dict[str, Any] | None:
    """The checkpoint's own `quantization_config` as a dict, from a config or its JSON."""
    own = (
        model_config.get("quantization_config")
        if isinstance(model_config, dict)
        else getattr(model_config, "quantization_config", None)
    )
    if own is None or isinstance(own, dict):
        return own
    found: dict[str, Any] = own.to_dict()
    return found


def describe(own: dict[str, Any]) -> str:
    """A checkpoint's own quantisation in words, as `gptq, 4 bit`."""
    bits = own.get("bits") or own.get("w_bit")
    if own.get("load_in_8bit") or own.get("load_in_4bit"):
        bits = 8 if own.get("load_in_8bit") else 4
    return _method(own) + (f", {bits} bit" if bits else "")


def _method(own: dict[str, Any]) -> str:
    method = own.get("quant_method", "bitsandbytes" if "load_in_8bit" in own else "unknown")
    return str(getattr(method, "value", method)).lower()
