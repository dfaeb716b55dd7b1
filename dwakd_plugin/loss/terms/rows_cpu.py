"""What the kernels for a CPU share, compiled by numba: rows of logits, and their exponentials.

What torch would do in ten passes over matrices of (tokens × vocabulary), one row stays in the cache
for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

from dwakd_plugin.loss.soft_dtw.llvm import normal_power, power_of_fraction
from dwakd_plugin.loss.threads import in_threads

BLOCK = 256  # exponentials at once: they stay in the cache until each has found its place
LOGITS_PER_THREAD = 200_000  # about what is worth starting a thread for, 0.1 ms

_NOTHING = -2200.0  # 2 to the power of it is 0 in float64, too

Array = Any  # numba reads no annotations; numpy's would not say the shape either
F = TypeVar("F", bound=Callable[..., Any])

jit: Callable[[F], F] = numba.njit(
    cache=True, nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy"
)


def array(tensor: Tensor) -> Array:
    return tensor.detach().contiguous().numpy()


def by_rows(kernel: Callable[[int, int], None], matrix: Tensor) -> None:
    """kernel(first, last) over all rows, in as many parts as there are threads."""
    count, parts = len(matrix), max(1, min(len(matrix), torch.get_num_threads()))
    ends = [count * part // parts for part in range(parts + 1)]
    worth = matrix.numel() / LOGITS_PER_THREAD
    in_threads(lambda part: kernel(ends[part], ends[part + 1]), parts, max(1.0, worth))


@jit
def exponentials(row: Array, largest: Any, scale: Any, to: Array) -> None:
    """2^(scale · (row − largest)) of a row, or of a slice of it: one by index is no SIMD.

    0 for −∞, which a head gives a token that it leaves out; NaN stays NaN.
    """
    nothing = to.dtype.type(_NOTHING)
    for k in range(len(row)):
        x = (row[k] - largest) * scale
        x = nothing if x < nothing else x
        whole = np.rint(x)
        to[k] = power_of_fraction(x - whole) * normal_power(whole)
