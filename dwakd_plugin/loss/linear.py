"""The heads' products on a CPU, by the faster of the two libraries that torch has.

torch gives float32 products to MKL, which for a chunk of tokens and a head of many rows was slower
than oneDNN, its other library, on AMD's cores: `python -m benchmarks.objective` has our products
beside its. torch itself calls this operation in models that it has compiled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN = "mkldnn::_linear_pointwise"  # the operation's name
_BACKEND: Any = torch.backends.mkldnn  # whose types name little of it


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """states weightᵀ + bias: (N, d), (V, d), (V,) → (N, V), as `F.linear`."""
    if _by_onednn(states, weight):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return found
    return F.linear(states, weight, bias)


def _by_onednn(states: Tensor, weight: Tensor) -> bool:
    plain = all(type(each) in (Tensor, torch.nn.Parameter) for each in (states, weight))
    return (
        plain
        and states.dtype == weight.dtype == torch.float32
        and states.device.type == weight.device.type == "cpu"
        and states.numel() > 0
        and weight.numel() > 0
        and not (torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad))
        and _BACKEND.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not _rounded()
    )


def _rounded() -> bool:
    """Whether the process rounds float32 products on a CPU: then they are torch's to choose."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return _BACKEND.matmul.fp32_precision not in ("none", "ieee")
