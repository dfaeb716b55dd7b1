"""What `mapped` adds to fine-tuning: a whole step, and its loss beside TRL's GOLD and its heads.

    python -m benchmarks.mapped

The step: a Llama of 20 layers of SmolLM2's sizes over a vocabulary of 4,096, forward and backward,
with transformers' own loss of the labels, or with ours against the cached states of a teacher
whose head has 49,152 rows. The loss: from hidden states to the gradients of the student's states
and head, at GPT-2's and Qwen1.5-1.8B's sizes.
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

from benchmarks import gold, measure, objective
from benchmarks.measure import MIB, Report
from benchmarks.objective import FULL, QUICK, WARM_UP, Sizes
from dwakd_plugin.loss import ResponseStates, dwakd_loss
from dwakd_plugin.recipe.schema import VARIANTS, LossConfig

NAME = "mapped"
PRELOAD = "trl.experimental.gold.gold_trainer"
MAPPED = LossConfig(**VARIANTS["mapped"]["loss"])
SFT, WITH_TEACHER = "fine-tuning", "mapped, cached teacher"
LOSS, LABELS, PRODUCTS = "mapped", "cross-entropy of the labels", "the heads' products alone"
PAIRED, KNOWN = 0.8, 0.95  # shares of the student's tokens, and of the teacher's vocabulary


@dataclass(frozen=True)
class Student:
    """The shape of the student of a step, and of what teaches it."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int
    teacher_vocabulary: int


P20 = Student(20, 576, 1536, 9, 4096, 8, 256, 49152)
SMALL = Student(2, 36, 64, 3, 400, 2, 24, 900)


def matched(
    student: ResponseStates, teacher: ResponseStates
) -> tuple[ResponseStates, ResponseStates]:
    """Both with as many pairs in ascending order, and a map of the teacher's vocabulary."""
    generator = torch.Generator().manual_seed(2)
    (B, S), T = student.hidden.shape[:2], teacher.hidden.shape[1]
    pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row in range(B):
        for side, size in zip(pairs, (S, T), strict=True):
            chosen = torch.randperm(size, generator=generator)[: int(PAIRED * min(S, T))]
            side.append(chosen.sort().values + row * size)
    ours, theirs = student.head.weight.shape[0], teacher.head.weight.shape[0]
    token_map = torch.randint(ours, (theirs,), generator=generator)
    token_map[torch.rand(theirs, generator=generator) > KNOWN] = -1
    return (
        replace(student, pairs=torch.cat(pairs[0])),
        replace(teacher, pairs=torch.cat(pairs[1]), token_map=token_map),
    )


# The loss -----------------------------------------------------------------------------------------


def _labels(student: ResponseStates, teacher: ResponseStates) -> Tensor:
    assert student.labels is not None
    logits = F.linear(student.hidden, student.head.weight)
    return F.cross_entropy(logits.flatten(0, 1), student.labels.flatten(), reduction="sum")


def _products(student: ResponseStates, teacher: ResponseStates) -> Tensor:
    """Each state through its head, and back to the student's states and head."""
    assert student.pairs is not None and teacher.pairs is not None
    with torch.no_grad():
        paired = teacher.hidden.flatten(0, 1)[teacher.pairs]
        constant = F.linear(paired, teacher.head.weight).sum()
    return constant + F.linear(student.hidden, student.head.weight).sum()


LOSSES: dict[str, Callable[[ResponseStates, ResponseStates], Tensor]] = {
    LOSS: lambda student, teacher: dwakd_loss(student, teacher, None, loss=MAPPED).total(MAPPED),
    LABELS: _labels,
    PRODUCTS: _products,
}


def a_loss(name: str, sizes: Sizes) -> Callable[[], float]:
    """A step from states to gradients; those of the step before are dropped first."""
    batch = objective.make_batch(sizes)
    if name in gold.GOLD:
        return gold.gold_step(batch, sizes, gold.GOLD[name])
    student, teacher = matched(batch.student, batch.teacher)

    def run() -> float:
        student.hidden.grad = student.head.weight.grad = None
        loss = LOSSES[name](student, teacher) / student.lengths.sum()
        loss.backward()
        return loss.item()

    return run


# A whole step -------------------------------------------------------------------------------------


def a_llama(layers: int, width: int, inner: int, heads: int, vocabulary: int) -> Any:
    """A Llama with random weights, tied, three heads for each of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def a_step(name: str, shape: Student) -> Callable[[], float]:
    """Forward and backward of a student, with the labels alone or with a teacher's states."""
    from dwakd_plugin.models.student import student_states

    torch.manual_seed(0)
    model = a_llama(shape.layers, shape.width, shape.inner, shape.heads, shape.vocabulary).train()
    ids = torch.randint(shape.vocabulary, (shape.rows, shape.tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    places = torch.arange(shape.tokens - 1).expand(shape.rows, -1)
    lengths = torch.full((shape.rows,), shape.tokens - 1)
    batch = {"student_positions": places, "student_lengths": lengths}
    sizes = Sizes(
        shape.rows, 1, shape.tokens, 1, shape.width, shape.vocabulary, shape.teacher_vocabulary
    )
    teacher = objective.make_batch(sizes).teacher

    def run() -> float:
        model.zero_grad()
        if name == SFT:
            loss = model(**inputs).loss
        else:
            states = student_states(model, batch, embeds=False, **inputs)
            terms = dwakd_loss(*matched(states, teacher), None, loss=MAPPED)
            loss = terms.total(MAPPED) / terms.student_tokens
        loss.backward()
        return loss.item()

    return run


# Together -----------------------------------------------------------------------------------------


def _prepared(make: Callable[..., Callable[[], float]], name: str, small: Any, size: Any) -> Any:
    make(name, small)()
    return make(name, size)


def compare(
    make: Callable[..., Callable[[], float]],
    names: list[str],
    small: Any,
    size: Any,
    rounds: int,
    threads: int,
) -> dict[str, Any]:
    """Time and peak memory, alternated."""
    runs = {name: make(name, size) for name in names}
    seconds, disturbance = measure.alternate(runs, rounds)
    del runs  # the processes that measure memory have their own
    peaks = {
        name: measure.peak_memory(
            _prepared, make, name, small, size, threads=threads, preload=PRELOAD
        )
        for name in names
    }
    found = {name: {"seconds": seconds[name], "peak_bytes": peaks[name]} for name in names}
    return {"sizes": asdict(size), "disturbance": disturbance, "runs": found}


def targets(results: Report) -> list[dict[str, Any]]:
    def against(which: str, ours: str, other: str, time: float, memory: float) -> list[Any]:
        a, b = (results[which]["runs"][name] for name in (ours, other))
        ratio = measure.ratio(a["seconds"], b["seconds"])["median"]
        return [
            measure.target(f"{which}: time / {other}", ratio, time),
            measure.target(
                f"{which}: peak memory / {other}", a["peak_bytes"] / b["peak_bytes"], memory
            ),
        ]

    rivals = [name for name in gold.GOLD if name in results["loss"]["runs"]]
    return [
        *against("step", WITH_TEACHER, SFT, 1.25, 1.1),
        *(line for name in rivals for line in against("loss", LOSS, name, 0.2, 0.2)),
    ]


def tables(results: Report) -> str:
    """The figures in Markdown."""
    return "\n\n".join(gold.tables(results[which]) for which in ("step", "loss"))


def picture(results: Report, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 4.5), layout="constrained")
    for row, which in zip(axes, ("step", "loss"), strict=True):
        names, runs = zip(*results[which]["runs"].items(), strict=True)
        row[0].barh(names, [measure.spread(run["seconds"])["median"] for run in runs])
        row[0].set(xlabel=f"seconds a {which}")
        row[1].barh(names, [run["peak_bytes"] / MIB for run in runs])
        row[1].set(xlabel="peak MiB above inputs", yticks=[])
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(
    quick: Annotated[bool, typer.Option(help="A smoke run of a few seconds.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    samples: Annotated[int, typer.Option(min=1, help="Samples of the loss's batch.")] = FULL.B,
    beside_gold: Annotated[bool, typer.Option(help="TRL's GOLD too, a sample needs 2 GiB.")] = True,
    memory_limit: Annotated[float, typer.Option(help="GiB; what needs more fails.")] = 18.0,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the picture.")] = (
        measure.RESULTS
    ),
) -> None:
    """A step of `mapped` beside fine-tuning, and its loss beside GOLD's."""
    measure.set_up(threads, memory_limit)
    started = measure.start(threads, quick, ["trl", "transformers"])
    if quick:
        rounds = 1
    shape, sizes = (SMALL, QUICK) if quick else (P20, replace(FULL, B=samples))
    losses = [LOSS, LABELS, PRODUCTS, *(gold.GOLD if beside_gold else ())]
    compared = partial(compare, rounds=rounds, threads=threads)
    results: Report = {
        "step": compared(a_step, [WITH_TEACHER, SFT], SMALL, shape),
        "loss": compared(a_loss, losses, WARM_UP, sizes),
    }
    file = measure.write_report(NAME, started, results, [] if quick else targets(results), out)
    picture(results, file.with_suffix(".png"))
    print(tables(results))


if __name__ == "__main__":
    typer.run(main)
