"""What the benchmarks share: timings in turn, peak memory in a process of its own, the report."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import resource
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SHORTEST = 0.03  # seconds: what is faster is called several times for one timing
MIB = 2**20

Report = dict[str, Any]


def set_up(threads: int, memory_limit_gib: float) -> None:
    """Threads of torch and numba; allocations beyond the limit fail instead of taking the machine.

    Processes that `peak_memory` starts inherit the limit.
    """
    import numba

    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    limit = int(memory_limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def alternate(
    runs: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each run, once a round, after calls that are not counted; and the disturbance.

    In turn, so that a machine that grows slower does so for all; each round begins with another.
    The disturbance is the share of the machine's CPU time that others took meanwhile. Beyond a few
    per cent, threads that wait for each other at every operation are slowed many times over.
    """
    names = list(runs)
    calls = {}
    for name in names:
        took = _seconds(runs[name], 1)
        if took < 10:  # it may have compiled
            took = _seconds(runs[name], 1)
        calls[name] = math.ceil(SHORTEST / max(took, SHORTEST / 1000))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    others, begun = _cpu_seconds_of_others(), time.perf_counter()
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(runs[name], calls[name]))
    available = (time.perf_counter() - begun) * (os.cpu_count() or 1)
    disturbance = max(0.0, _cpu_seconds_of_others() - others) / available
    if disturbance > 0.05:
        say(f"others took {disturbance:.0%} of the CPU meanwhile: do not trust these timings")
    return seconds, disturbance


def _cpu_seconds_of_others() -> float:
    """All CPU time since boot, that of a hypervisor's other guests included, less our own and that
    of processes of ours that have ended."""
    user, nice, system, _, _, irq, softirq, steal = (
        int(ticks) for ticks in Path("/proc/stat").read_text(encoding="ascii").split()[1:9]
    )
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system - own.children_user - own.children_system


def _seconds(run: Callable[[], Any], calls: int) -> float:
    gc.collect()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times longer `slow` took, round by round: what both suffered cancels."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def peak_memory(
    prepare: Callable[..., Callable[[], Any]], *arguments: Any, threads: int, preload: str
) -> int:
    """Bytes by which `prepare(*arguments)()` lifts resident memory, at most, in a fresh process.

    `prepare` builds the inputs, calls the same code on small ones, so that nothing is compiled or
    loaded later, and returns the run; memory counts from there. `preload` is a module to import
    once, in the server from which every process is forked.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_above_inputs, prepare, arguments, threads).result()


def _peak_above_inputs(
    prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], threads: int
) -> int:
    set_up(threads, resource.getrlimit(resource.RLIMIT_DATA)[0] / 2**30)
    run = prepare(*arguments)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        # Sets the high-water mark back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not in every container
        return _sampled_peak(run)
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def _sampled_peak(run: Callable[[], Any]) -> int:
    before = status_bytes("VmRSS")
    with sampled("VmRSS", 0.001) as samples:
        run()
    return max([before, *samples]) - before


@contextlib.contextmanager
def sampled(field: str, seconds: float = 0.01) -> Iterator[list[int]]:
    """Fills a list with a field of /proc/self/status (bytes), taken every so many seconds."""
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(seconds):
            samples.append(status_bytes(field))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


def write_between(document: Path, name: str, text: str) -> None:
    """Puts a text between the lines of a page that say where `name` begins and ends."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    content = document.read_text(encoding="utf-8")
    if [content.count(line) for line in (begin, end)] != [1, 1]:
        raise SystemExit(f"{document} must have one line {begin} and one line {end}")
    head, _, rest = content.partition(begin)
    _, _, tail = rest.partition(end)
    document.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def target(name: str, measured: float, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    """One promise and whether it was kept."""
    return {
        "name": name,
        "measured": measured,
        "limit": limit,
        "at_least": at_least,
        "met": measured >= limit if at_least else measured <= limit,
    }


def write_report(
    name: str, started: Report, results: Report, targets: list[dict[str, Any]], folder: Path
) -> Path:
    """Write `NAME.json` into the folder, whole or not at all, and say how the targets fared."""
    report = (
        {"benchmark": name, **started, "load_after": os.getloadavg()}
        | {"results": results, "targets": targets}
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    for one in targets:
        bound = "at least" if one["at_least"] else "at most"
        verdict = "met" if one["met"] else "NOT met"
        say(f"{verdict}: {one['name']}: {one['measured']:.3g} ({bound} {one['limit']:g})")
    return file


def start(threads: int, quick: bool, packages: list[str]) -> Report:
    """What a figure is worth nothing without: command, date, hardware, load, versions."""
    return {
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
            ),
            "platform": platform.platform(),
        },
        "threads": threads,
        "load_before": os.getloadavg(),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ["dwakd", "torch", "numba", *packages]},
    }


def _module() -> str:
    file = Path(sys.argv[0])
    return f"benchmarks.{file.parent.name if file.stem == '__main__' else file.stem}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
