"""Soft-DTW alone: time, peak memory and gradient error, forward and backward in float32.

python -m benchmarks.soft_dtw
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import measure, research
from benchmarks.measure import MIB, Report
from dwakd_plugin.loss.soft_dtw import soft_dtw
from dwakd_plugin.loss.soft_dtw.layout import WARP, serial_steps, steps_of_a_pass

PRELOAD = "benchmarks.research"
NAME = "soft_dtw"
GAMMAS = [0.01, 0.1, 1.0, 2.0]
TIMED = [(8, 64, 80), (8, 256, 300), (8, 512, 600), (2, 2048, 2048)]
MEASURED = [(8, 512, 600), (2, 2048, 2048), (1, 4096, 4096)]
ACCURACY = [(8, 256, 300), (8, 512, 600)]
OURS = "dwakd (numba)"
LOOP = "research-style loop"

SoftDTW = Callable[[Tensor, float], Tensor]
Size = tuple[int, int, int]


def implementations(packages: bool = True) -> dict[str, SoftDTW]:
    """Functions of (cost (B, S, T), γ) → (B,); packages that are not installed are left out."""

    def lengths(cost: Tensor) -> tuple[Tensor, Tensor]:
        samples, s, t = cost.shape
        return torch.full((samples,), s), torch.full((samples,), t)

    found: dict[str, SoftDTW] = {
        OURS: lambda cost, gamma: soft_dtw(cost, *lengths(cost), gamma, backend="numba"),
        "dwakd (torch)": lambda cost, gamma: soft_dtw(cost, *lengths(cost), gamma, backend="torch"),
        LOOP: lambda cost, gamma: research.soft_dtw(cost, *lengths(cost), gamma),
    }
    if not packages:
        return found
    # Both take two sequences and a distance of them; the distance here is the cost at hand.
    if importlib.util.find_spec("tslearn"):
        from tslearn.metrics import SoftDTWLossPyTorch

        found["tslearn"] = lambda cost, gamma: SoftDTWLossPyTorch(
            gamma=gamma, dist_func=lambda x, y: cost
        )(cost[:, :, :1], cost[:, 0, :, None])
    if importlib.util.find_spec("pysdtw"):
        from pysdtw import SoftDTW as PySDTW

        found["pysdtw"] = lambda cost, gamma: PySDTW(
            gamma=gamma, dist_func=lambda x, y: cost, use_cuda=False
        )(cost[:, :, :1], cost[:, 0, :, None])
    for package in ("tslearn", "pysdtw"):
        if package not in found:
            measure.say(f"skipped: {package} is not installed (benchmarks/requirements.txt)")
    return found


def random_cost(size: Size) -> Tensor:
    """Uniform in [0, 2), the range of 1 − cos."""
    return 2 * torch.rand(size, generator=torch.Generator().manual_seed(0))


def gradient(function: SoftDTW, cost: Tensor, gamma: float) -> Tensor:
    leaf = cost.detach().requires_grad_()
    function(leaf, gamma).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def prepare(name: str, size: Size) -> Callable[[], Tensor]:
    function = implementations(packages=name not in (OURS, LOOP))[name]
    gradient(function, random_cost((size[0], 40, 50)), 1.0)
    cost = random_cost(size)
    return lambda: gradient(function, cost, 1.0)


def time_of(
    functions: dict[str, SoftDTW], size: Size, rounds: int
) -> tuple[dict[str, list[float]], float]:
    cost = random_cost(size)
    runs = {
        name: lambda function=function: gradient(function, cost, 1.0)
        for name, function in functions.items()
    }
    return measure.alternate(runs, rounds)


def errors(functions: dict[str, SoftDTW], size: Size) -> dict[str, list[float]]:
    """Largest deviation of a gradient from the float64 wavefront, at each γ."""
    cost = random_cost(size)
    exact = {g: gradient(functions["dwakd (torch)"], cost.double(), g) for g in GAMMAS}
    return {
        name: [float((gradient(function, cost, g).double() - exact[g]).abs().max()) for g in GAMMAS]
        for name, function in functions.items()
    }


def targets(results: Report) -> list[dict[str, Any]]:
    memory = results["peak_bytes"]["1×4096×4096"][OURS]
    gradient_bytes = 4 * 4096 * 4096
    found = [
        measure.target(
            f"time of {rival} / ours, {size}",
            measure.ratio(times[rival], times[OURS])["median"],
            at_least,
            at_least=True,
        )
        for size in ("8×512×600", "2×2048×2048")
        for times in (results["seconds"][size],)
        for rival, at_least in (("tslearn", 20), (LOOP, 30))
        if rival in times
    ]
    worst = max(max(by_name[OURS]) for by_name in results["gradient_error"].values())
    return [
        *found,
        measure.target("largest gradient error, float32", worst, 3e-6),
        measure.target(
            "MiB beside cost and gradient, 1×4096×4096", (memory - gradient_bytes) / MIB, 16
        ),
    ]


def picture(results: Report, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name in next(iter(results["seconds"].values())):
        medians = [1e3 * measure.spread(by[name])["median"] for by in results["seconds"].values()]
        axes[0].plot(list(results["seconds"]), medians, "o-", label=name)
    axes[0].set(title="forward and backward", ylabel="ms", yscale="log")
    for name in next(iter(results["peak_bytes"].values())):
        peaks = [by[name] / MIB for by in results["peak_bytes"].values()]
        axes[1].plot(list(results["peak_bytes"]), peaks, "o-", label=name)
    axes[1].set(title="peak memory above the cost matrix", ylabel="MiB", yscale="log")
    by_name = list(results["gradient_error"].values())[-1]
    for name, values in by_name.items():
        axes[2].plot(GAMMAS, values, "o-", label=name)
    size = list(results["gradient_error"])[-1]
    axes[2].set(title=f"largest gradient error, {size}", xlabel="γ", xscale="log", yscale="log")
    axes[0].legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def tables(results: Report) -> str:
    """The figures in Markdown."""
    sizes, measured = list(results["seconds"]), list(results["peak_bytes"])
    lines = [
        "| | " + " | ".join([f"{size}, ms" for size in sizes]) + " | "
        + " | ".join([f"{size}, MiB" for size in measured]) + " |",
        "|---" * (1 + len(sizes) + len(measured)) + "|",
    ]  # fmt: skip
    for name in results["seconds"][sizes[0]]:
        cells = []
        for size in sizes:
            s = measure.spread([1e3 * value for value in results["seconds"][size][name]])
            cells.append(f"{s['median']:.3g} ({s['min']:.3g} to {s['max']:.3g})")
        peaks = [results["peak_bytes"][size].get(name) for size in measured]
        cells += ["" if peak is None else f"{peak / MIB:.0f}" for peak in peaks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for size, by_name in results["gradient_error"].items():
        lines += [
            "",
            f"| largest gradient error, {size} | "
            + " | ".join(f"γ = {gamma:g}" for gamma in GAMMAS)
            + " |",
            "|---" * (1 + len(GAMMAS)) + "|",
        ]
        for name, values in by_name.items():
            lines.append(f"| {name} | " + " | ".join(f"{value:.1e}" for value in values) + " |")
    return "\n".join(lines)


def main(
    quick: Annotated[bool, typer.Option(help="A smoke run of a few seconds.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each implementation.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    memory_limit: Annotated[float, typer.Option(help="GiB; what needs more fails.")] = 16.0,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the picture.")] = (
        measure.RESULTS
    ),
) -> None:
    """Soft-DTW alone, against tslearn, pysdtw and a research-style loop over samples."""
    measure.set_up(threads, memory_limit)
    started = measure.start(threads, quick, ["tslearn", "pysdtw"])
    functions = implementations(packages=not quick)  # they compile for 15 s in each process
    timed, measured, accuracy = TIMED, MEASURED, ACCURACY
    if quick:
        rounds, timed, measured, accuracy = 2, [(2, 24, 30)], [(1, 256, 256)], [(2, 24, 30)]

    kinds = ("seconds", "disturbance", "peak_bytes", "gradient_error")
    results: Report = {"gammas": GAMMAS} | {kind: {} for kind in kinds}
    for size in accuracy:
        results["gradient_error"]["×".join(map(str, size))] = errors(functions, size)
    for size in timed:
        measure.say(f"time at {size}")
        label = "×".join(map(str, size))
        timed_ = time_of(functions, size, rounds)
        results["seconds"][label], results["disturbance"][label] = timed_
    for size in measured:
        measure.say(f"memory at {size}")
        results["peak_bytes"]["×".join(map(str, size))] = {
            name: measure.peak_memory(prepare, name, size, threads=threads, preload=PRELOAD)
            for name in ([OURS, LOOP] if quick else functions)
        }
    file = measure.write_report(
        NAME, started, results, [] if quick else targets(results), out
    )  # fmt: skip
    picture(results, file.with_suffix(".png"))
    print(tables(results))
    for size in () if quick else ((512, 600), (4096, 4096)):
        one_warp, own = 3 * steps_of_a_pass(*size, WARP), serial_steps(*size)
        print(
            f"A GPU's serial steps at {size[0]}×{size[1]}: {own:,}, "
            f"and {one_warp / own:.1f} times as many with one warp and no weights kept"
        )


if __name__ == "__main__":
    typer.run(main)
