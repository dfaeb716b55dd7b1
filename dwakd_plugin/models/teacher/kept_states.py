"""One row of a teacher cache: its name, and what is kept of it, in which form."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import TopTokens
from dwakd_plugin.models.teacher.top_tokens import BYTES_A_TOKEN, pack, unpack
from dwakd_plugin.recipe.schema import TeacherConfig

# The forms that `encode` takes: states in a dtype, or `top_64` for so many of the likeliest tokens.
KEPT_DTYPES = ("auto", "float16", "bfloat16", "float8_e4m3")
_TOP = "top_"
FLOAT8_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def row_key(teacher_ids: Tensor, teacher_labels: Tensor) -> str:
    """Names a row by its teacher token ids and by which of its labels count, both (L,).

    Nothing predicts a row's first token: its label doesn't count.
    """
    digest = sha256(teacher_ids.to(torch.int64).numpy().tobytes())
    counts = teacher_labels.ne(-100)
    counts[:1] = False
    digest.update(counts.numpy().tobytes())
    return digest.hexdigest()[:32]


def kept_form(config: TeacherConfig) -> str:
    """The form that the recipe asks for."""
    return config.cache_dtype if config.top_k is None else f"{_TOP}{config.top_k}"


def top_of_form(form: str) -> int | None:
    """How many tokens are kept of a position; None where it is the states. Raises ValueError."""
    if form in KEPT_DTYPES:
        return None
    count = form.removeprefix(_TOP)
    if count == form or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"{form!r} isn't a form of states or probabilities")
    return int(count)


def nothing_kept(form: str, hidden_size: int) -> Tensor | TopTokens:
    """What there is of a row without a response."""
    top = top_of_form(form)
    if top is None:
        return torch.zeros(0, hidden_size)
    return TopTokens(torch.zeros(0, top, dtype=torch.int32), torch.zeros(0, top))


def encode(said: Tensor | TopTokens, form: str) -> Tensor:
    """States (T, D) as they are kept: as computed (auto), in another dtype, or packed; or the
    likeliest tokens (T, k), packed.

    float8_e4m3 has a scale per token, so that large and small tokens keep their relative precision:
    uint8 (T, D + 4), the token's numbers divided by its scale and then the scale, a float32.
    """
    if isinstance(said, TopTokens):
        return pack(said)
    states, dtype = said, form
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


def decode(kept: Tensor, form: str, count: int, hidden_size: int) -> Tensor | TopTokens:
    """What `encode` was given of `count` positions; float32 where it was packed.

    Raises ValueError where that cannot have been.
    """
    top = top_of_form(form)
    if top is not None:
        k = kept.shape[1] if kept.ndim > 1 else 0
        if not 1 <= k <= top or kept.shape != (count, k, BYTES_A_TOKEN):
            raise ValueError(f"{tuple(kept.shape)} isn't the shape of {count} times {top} tokens")
        return unpack(kept)
    packed = 4 if form == "float8_e4m3" else 0
    if kept.shape != (count, hidden_size + packed):
        raise ValueError(f"{tuple(kept.shape)} isn't the shape of {count} states")
    if kept.dtype != torch.uint8:
        return kept
    numbers = kept[:, :-4].view(torch.float8_e4m3fn).float()
    return numbers * kept[:, -4:].contiguous().view(torch.float32)


def bytes_per_token(hidden_size: int, form: str, computed: torch.dtype) -> int:
    """Bytes that one token takes on disk; `computed` is the dtype of states that `auto` keeps."""
    top = top_of_form(form)
    if top is not None:
        return BYTES_A_TOKEN * top
    if form == "float8_e4m3":
        return hidden_size + 4
    return hidden_size * (computed if form == "auto" else getattr(torch, form)).itemsize
