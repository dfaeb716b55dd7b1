"""The whole objective: time and peak memory of a step from hidden states to gradients.

    python -m benchmarks.objective

A step takes hidden states, embeddings and heads, computes the loss and every gradient that training
needs (student states, student head, projectors). The models themselves are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks import measure, research
from benchmarks.measure import MIB, Report
from dwakd_plugin.loss import Head, ResponseStates, dwakd_loss
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.recipe.schema import VARIANTS, LossConfig, SoftDTWConfig

PRELOAD = "benchmarks.research"
NAME = "objective"
PRODUCTS = "the heads' products alone"
RIVAL, BROADCAST = "research-style", "research-style, broadcast cosine"
TERMS = ("ce", "t2s_ce", "student_kd", "teacher_kd", "hidden_dtw", "embed_dtw")
DSKD = LossConfig(**VARIANTS["dskd"]["loss"])
AGREEMENT = 1e-4  # relative, ours against research-style; both in float32


@dataclass(frozen=True)
class Sizes:
    """B samples of S student and T teacher tokens; widths d, D; rows of the heads Vs, Vt."""

    B: int
    S: int
    T: int
    d: int
    D: int
    Vs: int
    Vt: int


FULL = Sizes(B=8, S=256, T=300, d=768, D=1536, Vs=50257, Vt=151936)  # GPT-2 and Qwen1.5-1.8B
QUICK = Sizes(B=2, S=24, T=30, d=32, D=48, Vs=500, Vt=900)
WARM_UP = Sizes(B=2, S=40, T=44, d=16, D=24, Vs=50, Vt=60)

# Narrow models, so that what grows is seen: (axis of the picture, its value of sizes, the sizes).
BASE = replace(FULL, S=64, T=75, d=64, D=128)
SWEEPS: dict[str, list[Sizes]] = {
    "tokens": [replace(BASE, B=B) for B in (2, 4, 8, 16)],
    "vocabulary": [replace(BASE, B=4, Vs=V // 3, Vt=V) for V in (19_000, 38_000, 76_000, 152_000)],
    "sequence length": [
        replace(BASE, B=1, S=S, T=S * 75 // 64, Vs=2_000, Vt=6_000) for S in (256, 512, 1024, 2048)
    ],
}


@dataclass(frozen=True)
class Batch:
    student: ResponseStates
    teacher: ResponseStates
    projectors: Projectors

    def leaves(self) -> dict[str, Tensor]:
        """What a step leaves gradients in."""
        return {
            "hidden": self.student.hidden,
            "target_embeds": self.student.target_embeds,
            "head": self.student.head.weight,
            **dict(self.projectors.named_parameters()),
        }


def make_batch(sizes: Sizes, device: str = "cpu") -> Batch:
    """Random states without padding, and heads that give logits a spread of 2, as models have."""
    generator = torch.Generator().manual_seed(0)

    def side(length: int, width: int, vocab: int) -> ResponseStates:
        embeds = [torch.randn(sizes.B, length, width, generator=generator) for _ in range(3)]
        head = torch.randn(vocab, width, generator=generator).mul_(2 * width**-0.5)
        labels = torch.randint(vocab, (sizes.B, length), generator=generator)
        tensors = [each.to(device) for each in (*embeds, torch.full((sizes.B,), length))]
        return ResponseStates(*tensors, Head(head.to(device)), labels.to(device))

    torch.manual_seed(0)
    batch = Batch(
        side(sizes.S, sizes.d, sizes.Vs),
        side(sizes.T, sizes.D, sizes.Vt),
        Projectors(sizes.d, sizes.D).to(device),
    )
    for leaf in batch.leaves().values():
        leaf.requires_grad_()
    return batch


def ours(batch: Batch, loss: LossConfig) -> Tensor:
    terms = dwakd_loss(batch.student, batch.teacher, batch.projectors, loss=loss)
    return terms.total(loss)


def research_style(batch: Batch, broadcast_cosine: bool = False) -> Tensor:
    loss = LossConfig()
    terms = research.objective(
        batch.student,
        batch.teacher,
        batch.projectors,
        loss,
        SoftDTWConfig(),
        broadcast_cosine=broadcast_cosine,
    )
    return (
        loss.ce_weight * terms["ce"]
        + loss.kd_weight * (terms["student_kd"] + terms["teacher_kd"] + terms["t2s_ce"])
        + loss.dtw_weight * (terms["hidden_dtw"] + terms["embed_dtw"])
    )


def products(batch: Batch) -> Tensor:
    """The products with the heads and nothing else: no step in the same dtype can be faster.

    Both states of each side through its head; back to the student's states and head, and to the
    projected states (here copies of the right shape).
    """
    student, teacher = batch.student, batch.teacher
    t2s_hidden, s2t_hidden = (
        states.hidden.detach().clone().requires_grad_() for states in (student, teacher)
    )
    with torch.no_grad():
        constant = F.linear(teacher.hidden, teacher.head.weight).sum()
    return (
        constant
        + F.linear(s2t_hidden, teacher.head.weight).sum()
        + F.linear(t2s_hidden, student.head.weight.detach()).sum()
        + F.linear(student.hidden, student.head.weight).sum()
    )


STEPS: dict[str, Callable[[Batch], Tensor]] = {
    "DWA-KD": lambda batch: ours(batch, LossConfig()),
    "DSKD": lambda batch: ours(batch, DSKD),
    RIVAL: research_style,
    PRODUCTS: products,
    BROADCAST: lambda batch: research_style(batch, broadcast_cosine=True),
}


def step(name: str, batch: Batch) -> float:
    """Loss and gradients; the gradients of the step before are dropped first, as training does."""
    for leaf in batch.leaves().values():
        leaf.grad = None
    loss = STEPS[name](batch) / batch.student.lengths.sum()
    loss.backward()
    return loss.item()


def prepare(name: str, sizes: Sizes) -> Callable[[], float]:
    step(name, make_batch(WARM_UP))
    batch = make_batch(sizes)
    return lambda: step(name, batch)


def agreement(sizes: Sizes, rival: str) -> dict[str, float]:
    """Relative deviation of DWA-KD's loss and gradients (in norm) from a rival's.

    Raises AssertionError where one exceeds `AGREEMENT`: then the two do not compute the same.
    """
    batch = make_batch(sizes)
    expected = step(rival, batch)
    gradients = {name: leaf.grad for name, leaf in batch.leaves().items()}
    found = {"loss": abs(step("DWA-KD", batch) - expected) / abs(expected)}
    for name, leaf in batch.leaves().items():
        assert leaf.grad is not None and gradients[name] is not None
        norm = gradients[name].norm()
        # The query's bias moves all scores of a row alike: its gradient is 0 but for rounding.
        if norm > 1e-6:
            found[f"gradient of {name}"] = float((leaf.grad - gradients[name]).norm() / norm)
    wrong = {name: value for name, value in found.items() if not value <= AGREEMENT}
    assert not wrong, f"ours and {rival} differ: {wrong}"
    return found


def compare(names: list[str], sizes: Sizes, rounds: int, threads: int) -> dict[str, Any]:
    """Time and peak memory of steps, alternated."""
    batch = make_batch(sizes)
    steps = {name: partial(step, name, batch) for name in names}
    seconds, disturbance = measure.alternate(steps, rounds)
    del batch, steps  # the processes that measure memory have their own
    runs = {
        name: {
            "seconds": seconds[name],
            "peak_bytes": measure.peak_memory(
                prepare, name, sizes, threads=threads, preload=PRELOAD
            ),
        }
        for name in names
    }
    return {"sizes": asdict(sizes), "disturbance": disturbance, "runs": runs}


def targets(results: Report) -> list[dict[str, Any]]:
    full = results["full"]["runs"]
    pairs = {RIVAL: (full["DWA-KD"], full[RIVAL])}
    if "quarter" in results:
        quarter = results["quarter"]["runs"]
        pairs[f"{BROADCAST} (a quarter of the batch)"] = quarter["DWA-KD"], quarter[BROADCAST]
    dwakd, dskd = full["DWA-KD"], full["DSKD"]
    tokens = results["sweeps"]["tokens"]
    few, many = tokens[0]["runs"], tokens[-1]["runs"]
    added = {name: many[name]["peak_bytes"] - few[name]["peak_bytes"] for name in ("DWA-KD", RIVAL)}

    def time(a: dict[str, Any], b: dict[str, Any]) -> float:
        return measure.ratio(a["seconds"], b["seconds"])["median"]

    def memory(a: dict[str, Any], b: dict[str, Any]) -> float:
        return float(a["peak_bytes"] / b["peak_bytes"])

    return [
        *(
            measure.target(f"peak memory / {name}", memory(*pair), 0.15)
            for name, pair in pairs.items()
        ),
        *(measure.target(f"time / {name}", time(*pair), 0.6) for name, pair in pairs.items()),
        measure.target("DWA-KD / DSKD, peak memory", memory(dwakd, dskd), 1.05),
        measure.target("DWA-KD / DSKD, time", time(dwakd, dskd), 1.05),
        measure.target(
            f"memory added by more tokens / {RIVAL}'s", added["DWA-KD"] / added[RIVAL], 0.05
        ),
    ]


def growth(axis: str, sizes: Sizes) -> int:
    """Where a run of a sweep lies on its axis."""
    return {
        "tokens": sizes.B * (sizes.S + sizes.T),
        "vocabulary": sizes.Vs + sizes.Vt,
        "sequence length": sizes.S,
    }[axis]


def picture(results: Report, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for column, (axis, points) in enumerate(results["sweeps"].items()):
        at = [growth(axis, Sizes(**point["sizes"])) for point in points]
        for name in points[0]["runs"]:
            runs = [point["runs"][name] for point in points]
            medians = [measure.spread(run["seconds"])["median"] for run in runs]
            axes[0, column].plot(at, [run["peak_bytes"] / MIB for run in runs], "o-", label=name)
            axes[1, column].plot(at, medians, "o-", label=name)
        axes[0, column].set(ylim=0, ylabel="peak MiB above inputs")
        axes[1, column].set(ylim=0, ylabel="seconds a step", xlabel=axis)
    axes[0, 0].legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def tables(results: Report) -> str:
    """The figures in Markdown."""
    lines: list[str] = []
    for which in ("full", "quarter"):
        if which in results:
            sizes = ", ".join(f"{name} {n}" for name, n in results[which]["sizes"].items())
            lines += ["", f"| {sizes} | seconds a step | peak MiB above inputs |", "|---|---|---|"]
            for name, run in results[which]["runs"].items():
                lines.append(f"| {name} | {_seconds(run)} | {run['peak_bytes'] / MIB:.0f} |")
    for axis, points in results["sweeps"].items():
        names = list(points[0]["runs"])
        heads = [f"{name}, {unit}" for name in names for unit in ("s", "MiB")]
        lines += ["", f"| {axis} | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
        for point in points:
            cells = []
            for name in names:
                run = point["runs"][name]
                cells += [_seconds(run), f"{run['peak_bytes'] / MIB:.0f}"]
            at = growth(axis, Sizes(**point["sizes"]))
            lines.append(f"| {at} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def _seconds(run: dict[str, Any]) -> str:
    s = measure.spread(run["seconds"])
    return f"{s['median']:.3g} ({s['min']:.3g} to {s['max']:.3g})"


def main(
    quick: Annotated[bool, typer.Option(help="A smoke run of a few seconds.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each step.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    teacher_vocab: Annotated[int, typer.Option(min=2, help="Rows of the teacher's head.")] = (
        FULL.Vt
    ),
    samples: Annotated[int, typer.Option(min=1, help="Samples of the full batch.")] = FULL.B,
    broadcast_cosine: Annotated[
        bool,
        typer.Option(help="A rival that broadcasts its cosines, at a quarter of the batch."),
    ] = False,
    memory_limit: Annotated[float, typer.Option(help="GiB; what needs more fails.")] = 16.0,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the picture.")] = (
        measure.RESULTS
    ),
) -> None:
    """The whole objective, against a research-style implementation of the same equations."""
    measure.set_up(threads, memory_limit)
    started = measure.start(threads, quick, [])
    rivals = [RIVAL, BROADCAST] if broadcast_cosine else [RIVAL]
    sizes, sweeps = replace(FULL, B=samples, Vt=teacher_vocab), SWEEPS
    if quick:
        sizes, sweeps, rounds = QUICK, {"tokens": [QUICK]}, 1

    results: Report = {"sweeps": {}}
    small = QUICK if quick else SWEEPS["vocabulary"][0]
    results["agreement"] = {rival: agreement(small, rival) for rival in rivals}
    for axis, points in sweeps.items():
        measure.say(f"growth with {axis}")
        results["sweeps"][axis] = [
            compare(["DWA-KD", RIVAL], point, rounds, threads) for point in points
        ]
    measure.say(f"full size: {sizes}")
    results["full"] = compare(["DWA-KD", "DSKD", RIVAL, PRODUCTS], sizes, rounds, threads)
    if broadcast_cosine:  # at half the batch it needs more than 16 GiB
        results["quarter"] = compare(
            ["DWA-KD", BROADCAST], replace(sizes, B=max(1, sizes.B // 4)), rounds, threads
        )
    kept = [] if quick else targets(results)
    file = measure.write_report(NAME, started, results, kept, out)
    picture(results, file.with_suffix(".png"))
    print(tables(results))


if __name__ == "__main__":
    typer.run(main)
