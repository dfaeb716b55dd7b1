"""One row of a teacher cache: its name, and its states in the dtype that they are kept in."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

from dwakd_plugin.errors import UserError

KEPT_DTYPES = ("auto", "float16", "bfloat16", "float8_e4m3")  # as `encode` takes them
FLOAT8_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def row_key(teacher_ids: Tensor, teacher_labels: Tensor) -> str:
    """Names a row by its teacher token ids and by which of its labels count, both (L,)."""
    digest = sha256(teacher_ids.to(torch.int64).numpy().tobytes())
    digest.update(teacher_labels.ne(-100).numpy().tobytes())
    return digest.hexdigest()[:32]


def encode(states: Tensor, dtype: str) -> Tensor:
    """States (T, D) as they are kept: as computed (auto), in another dtype, or packed.

    float8_e4m3 has a scale per token, so that large and small tokens keep their relative precision:
    uint8 (T, D + 4), the token's numbers divided by its scale and then the scale, a float32.
    """
    if dtype == "auto":
        return states
    if dtype != "float8_e4m3":
        kept = states.to(getattr(torch, dtype))
        if kept.isinf().any() and not states.isinf().any():
            raise UserError(
                f"The teacher's states reach {states.abs().max().item():.3g}, beyond float16's "
                "range. Keep them in bfloat16 or float8_e4m3 (dwakd.teacher.cache_dtype), in a new "
                "folder."
            )
        return kept
    scale = states.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / FLOAT8_LARGEST
    numbers = (states.float() / scale).to(torch.float8_e4m3fn)
    return torch.cat([numbers.view(torch.uint8), scale.view(torch.uint8)], dim=1)


def decode(kept: Tensor) -> Tensor:
    """States (T, D) from what `encode` made of them; float32 where they were packed."""
    if kept.dtype != torch.uint8:
        return kept
    numbers = kept[:, :-4].view(torch.float8_e4m3fn).float()
    return numbers * kept[:, -4:].contiguous().view(torch.float32)


def bytes_per_token(hidden_size: int, dtype: str, computed: torch.dtype) -> int:
    """Bytes that one token's states take on disk; `computed` is the dtype that `auto` keeps."""
    if dtype == "float8_e4m3":
        return hidden_size + 4
    return hidden_size * (computed if dtype == "auto" else getattr(torch, dtype)).itemsize
