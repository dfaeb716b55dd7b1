"""The machine that a run should fit on: GPUs and their rates by name, or what is here.

Memory in bytes, rates per second.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dwakd_plugin.errors import UserError

GIB = 2**30
# What the imports took before (`baseline` in benchmarks/results/plan.json): the plan leaves it out.
CPU_IMPORTS = 736 * 2**20
# What is left for fragments of torch's allocator on a GPU, and for the system on a CPU; assumed.
USABLE = {"cuda": 0.95, "cpu": 0.97}
MATMUL_SHARE, BANDWIDTH_SHARE = 0.4, 0.6  # of the peak rates, as training reaches them


@dataclass(frozen=True)
class Card:
    """What the run should fit on, and how fast that is taken to be."""

    name: str
    kind: str  # cuda or cpu
    capacity: int
    flops: float  # of matrix products, per second, as training reaches them
    bandwidth: float  # bytes per second, likewise
    note: str  # where the figures are from

    @property
    def usable(self) -> float:
        own = CPU_IMPORTS if self.kind == "cpu" else 0
        return self.capacity * USABLE[self.kind] - own


# GiB, TFLOPS of dense bf16 (fp16 where there is no bf16), GB/s: the makers' data sheets.
CARDS = {
    "T4": (16, 65, 320),
    "V100": (32, 125, 900),
    "L4": (24, 121, 300),
    "A10": (24, 125, 600),
    "A6000": (48, 155, 768),
    "RTX3090": (24, 71, 936),
    "RTX4090": (24, 165, 1008),
    "RTX5090": (32, 210, 1792),
    "L40S": (48, 362, 864),
    "A100-40GB": (40, 312, 1555),
    "A100-80GB": (80, 312, 2039),
    "H100": (80, 989, 3350),
    "H200": (141, 989, 4800),
    "B200": (180, 2250, 8000),
}


def card(wanted: str | None) -> Card:
    """The card that `wanted` names (`24GB`, `A100-80GB`); without one the GPU here, else the CPU.

    Raises UserError where `wanted` is neither a size nor a known card.
    """
    if wanted is None:
        return _gpu_here() if torch.cuda.is_available() else _cpu()
    if wanted.lower() == "cpu":
        return _cpu()
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)", wanted.strip(), re.IGNORECASE):
        capacity = float(size[1])
        if capacity <= 0:
            raise UserError(f"--gpu {wanted}: a card without memory. Give its size, as in 24GB.")
        alike = min(CARDS, key=lambda name: (abs(CARDS[name][0] - capacity), CARDS[name][1]))
        return replace(
            _from_sheet(alike, capacity),
            name=f"{capacity:g} GB card",
            note=f"time as on a {alike}: {_sheet_note(alike)}",
        )
    for name in CARDS:
        if _plain(name) == _plain(wanted):
            return _from_sheet(name)
    alike_names = [name for name in CARDS if _plain(name).startswith(_plain(wanted))]
    if len(alike_names) == 1:
        return _from_sheet(alike_names[0])
    raise UserError(
        f"--gpu {wanted} is neither a size nor a known card. Give a size, as in 24GB, `cpu`, or "
        f"one of {', '.join(CARDS)}."
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _sheet_note(name: str) -> str:
    _, tflops, bandwidth = CARDS[name]
    return (
        f"{tflops} TFLOPS at {MATMUL_SHARE:.0%}, {bandwidth} GB/s at {BANDWIDTH_SHARE:.0%} "
        "(data sheet; shares assumed)"
    )


def _from_sheet(name: str, capacity: float | None = None) -> Card:
    size, tflops, bandwidth = CARDS[name]
    return Card(
        name,
        "cuda",
        int((capacity or size) * GIB),
        tflops * 1e12 * MATMUL_SHARE,
        bandwidth * 1e9 * BANDWIDTH_SHARE,
        _sheet_note(name),
    )


def _gpu_here() -> Card:
    properties = torch.cuda.get_device_properties(0)
    capacity = properties.total_memory
    known = [name for name in CARDS if _plain(name.split("-")[0]) in _plain(properties.name)]
    alike = min(known or CARDS, key=lambda name: abs(CARDS[name][0] * GIB - capacity))
    return replace(_from_sheet(alike), name=f"{properties.name} (found here)", capacity=capacity)


def _cpu() -> Card:
    capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    matrix = torch.ones(768, 768)
    flops = 2 * 768**3 * _rate(lambda: matrix @ matrix)
    block, result = torch.ones(2**24), torch.empty(2**24)
    bandwidth = 2 * block.nbytes * _rate(lambda: torch.exp(block, out=result))
    return Card(
        "this machine's memory (no GPU)",
        "cpu",
        capacity,
        flops,
        bandwidth,
        f"{flops / 1e9:.0f} GFLOPS and {bandwidth / 1e9:.1f} GB/s, measured here just now",
    )


def _rate(work: Callable[[], Any]) -> float:
    """Calls per second, over a fifth of one."""
    work()
    calls, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < 0.2:
        work()
        calls += 1
    return calls / passed
