"""Compiled kernels on several threads of the CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def compiles_for(states: Tensor) -> bool:
    """Whether there are kernels for such states: plain ones on the CPU, and numba is installed."""
    # Of another kind are those that memory is planned with, some of which hold no numbers.
    plain = states.device.type == "cpu" and type(states) is Tensor
    return plain and importlib.util.find_spec("numba") is not None


def in_threads(work: Callable[[int], T], count: int, worth: float) -> list[T]:
    """work(0), …, work(count − 1), on at most as many threads as torch uses and as are `worth` it.

    For kernels that let go of the GIL. Not numba's own threads: its OpenMP layer spins, which costs
    milliseconds on a busy machine, and its other layer aborts when two threads of a process call
    it.
    """
    results: dict[int, T] = {}
    each = iter(range(count))

    def work_off() -> None:
        for i in each:  # each goes to one thread: the interpreter's lock guards the iterator
            results[i] = work(i)

    helpers = min(torch.get_num_threads(), count, int(worth)) - 1
    if helpers > 0:
        pool = _pool(os.getpid(), helpers)
        others = [pool.submit(work_off) for _ in range(helpers)]
        try:
            work_off()
        finally:
            wait(others)
        for other in others:
            other.result()  # raises what it raised
    else:
        work_off()
    return [results[i] for i in range(count)]


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work: to start one takes as long as 50,000 cells of soft-DTW.

    Of this process: a fork has the object, but not its threads.
    """
    return ThreadPoolExecutor(threads)
