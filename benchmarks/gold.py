"""A cross-tokenizer step of TRL's GOLD beside ours, from hidden states to gradients.

    python -m benchmarks.gold

Both get the same states and heads, form what logits they need, and leave gradients in the student's
states and head; ours in its projectors too. GOLD's loss is its own `ULDLoss`, as `GOLDTrainer`
calls it, at its defaults: no cross-entropy of the labels, which ours has. It is timed with and
without its hybrid form. The two losses are different methods; only their cost compares.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks import measure, objective
from benchmarks.measure import MIB, Report
from benchmarks.objective import FULL, QUICK, WARM_UP, Batch, Sizes, make_batch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # its warning that interfaces may change

PRELOAD = "trl.experimental.gold.gold_trainer"
NAME = "gold"
OURS = "DWA-KD"
GOLD = {"GOLD": False, "GOLD, hybrid": True}
BYTES_PER_STUDENT_TOKEN = 4
SHARED_VOCABULARY = 0.9  # of the student's, as GPT-2 and Qwen1.5 share it
SHARED_ENDS = 0.8  # of the shorter side's tokens end where one of the other side does


@dataclass(frozen=True)
class _Vocabulary:
    """All that ULDLoss asks of a tokenizer."""

    size: int
    shared: int

    def get_vocab(self) -> dict[str, int]:
        own = {f"{self.size}:{index}": index for index in range(self.shared, self.size)}
        return {str(index): index for index in range(self.shared)} | own


def byte_offsets(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Start and end byte of each token of one text cut in two ways: (B, S, 2), (B, T, 2)."""
    generator = torch.Generator().manual_seed(1)
    total = BYTES_PER_STUDENT_TOKEN * max(sizes.S, sizes.T)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in range(sizes.B):
        order = torch.randperm(total - 1, generator=generator) + 1
        common = int(SHARED_ENDS * min(sizes.S, sizes.T))
        rest = common
        for side, count in zip(sides, (sizes.S, sizes.T), strict=True):
            own = count - 1 - common
            cuts = torch.cat([order[:common], order[rest : rest + own]]).sort().values
            rest += own
            ends = torch.cat([torch.tensor([0]), cuts, torch.tensor([total])])
            side.append(torch.stack([ends[:-1], ends[1:]], 1))
    return torch.stack(sides[0]), torch.stack(sides[1])


def uld_loss(student_vocabulary: int, teacher_vocabulary: int, hybrid: bool) -> Any:
    """GOLD's loss for two vocabularies of these sizes, without what it leaves out of a response."""
    from trl.experimental.gold.gold_config import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = GOLDConfig(
        output_dir=gettempdir(),  # nothing is written there
        use_uld_loss=True,
        uld_use_hybrid_loss=hybrid,
        # Every position here belongs to the response.
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        bf16=False,
        report_to="none",
    )
    shared = int(SHARED_VOCABULARY * min(student_vocabulary, teacher_vocabulary))
    both = (_Vocabulary(size, shared) for size in (student_vocabulary, teacher_vocabulary))
    return ULDLoss(config, *both, device=torch.device("cpu"))


def gold_step(batch: Batch, sizes: Sizes, hybrid: bool) -> Callable[[], float]:
    uld = uld_loss(sizes.Vs, sizes.Vt, hybrid)
    student, teacher = batch.student, batch.teacher
    offsets = byte_offsets(sizes)

    def run() -> float:
        for leaf in batch.leaves().values():
            leaf.grad = None
        student_logits = F.linear(student.hidden, student.head.weight)
        with torch.no_grad():
            teacher_logits = F.linear(teacher.hidden, teacher.head.weight)
        loss = uld(
            student_logits,
            teacher_logits,
            student_labels=student.labels,
            teacher_labels=teacher.labels,
            student_input_ids=student.labels,
            teacher_input_ids=teacher.labels,
            student_byte_offsets=offsets[0],
            teacher_byte_offsets=offsets[1],
        )
        loss.backward()
        return float(loss)

    return run


def a_step(name: str, batch: Batch, sizes: Sizes) -> Callable[[], float]:
    if name == OURS:
        return partial(objective.step, OURS, batch)
    return gold_step(batch, sizes, GOLD[name])


def prepare(name: str, sizes: Sizes) -> Callable[[], float]:
    a_step(name, make_batch(WARM_UP), WARM_UP)()
    return a_step(name, make_batch(sizes), sizes)


def targets(results: Report) -> list[dict[str, Any]]:
    """None was set: the shares are for the reader, and the bound is GOLD's own cost."""
    runs = results["runs"]
    found = []
    for name in GOLD:
        time = measure.ratio(runs[OURS]["seconds"], runs[name]["seconds"])["median"]
        memory = runs[OURS]["peak_bytes"] / runs[name]["peak_bytes"]
        found.append(measure.target(f"time / {name}", time, 1.0))
        found.append(measure.target(f"peak memory / {name}", memory, 1.0))
    return found


def picture(results: Report, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    names, runs = list(results["runs"]), results["runs"].values()
    axes[0].barh(names, [measure.spread(run["seconds"])["median"] for run in runs])
    axes[0].set(xlabel="seconds a step")
    axes[1].barh(names, [run["peak_bytes"] / MIB for run in runs])
    axes[1].set(xlabel="peak MiB above inputs", yticks=[])
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def tables(results: Report) -> str:
    """The figures in Markdown."""
    sizes = ", ".join(f"{name} {value}" for name, value in results["sizes"].items())
    lines = [f"| {sizes} | seconds a step | peak MiB above inputs |", "|---|---|---|"]
    for name, run in results["runs"].items():
        s = measure.spread(run["seconds"])
        seconds = f"{s['median']:.3g} ({s['min']:.3g} to {s['max']:.3g})"
        lines.append(f"| {name} | {seconds} | {run['peak_bytes'] / MIB:.0f} |")
    return "\n".join(lines)


def main(
    quick: Annotated[bool, typer.Option(help="A smoke run of a few seconds.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each step.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    samples: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = FULL.B,
    memory_limit: Annotated[float, typer.Option(help="GiB; what needs more fails.")] = 16.0,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the picture.")] = (
        measure.RESULTS
    ),
) -> None:
    """A step of TRL's GOLD for two tokenizers, beside ours."""
    measure.set_up(threads, memory_limit)
    started = measure.start(threads, quick, ["trl", "transformers"])
    sizes = replace(FULL, B=samples)
    if quick:
        sizes, rounds = QUICK, 1
    batch = make_batch(sizes)
    steps = {name: a_step(name, batch, sizes) for name in (OURS, *GOLD)}
    seconds, disturbance = measure.alternate(steps, rounds)
    names = list(steps)
    del batch, steps  # the processes that measure memory have their own
    results: Report = {"sizes": asdict(sizes), "disturbance": disturbance, "runs": {}}
    for name in names:
        measure.say(f"memory of {name}")
        results["runs"][name] = {
            "seconds": seconds[name],
            "peak_bytes": measure.peak_memory(
                prepare, name, sizes, threads=threads, preload=PRELOAD
            ),
        }
    file = measure.write_report(NAME, started, results, [] if quick else targets(results), out)
    picture(results, file.with_suffix(".png"))
    print(tables(results))


if __name__ == "__main__":
    typer.run(main)
