"""A step on the student's own answers beside TRL's GOLD, once the answers are sampled.

    python -m benchmarks.own_step

Both read the same prompts and answers with the same student and teacher, form their loss and leave
gradients in the student: ours the reverse KL of `own_answers` at the positions of the same bytes,
GOLD its own `ULDLoss` on the logits of whole sequences, as `GOLDTrainer.compute_loss` calls it. The
student has the layers of `benchmarks.mapped`'s over GPT-2's vocabulary, the teacher SmolLM2-135M's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import gold, measure
from benchmarks.mapped import KNOWN, a_llama
from benchmarks.measure import Report
from benchmarks.objective import Sizes
from dwakd_plugin.loss import own_answer_terms, own_loss_config
from dwakd_plugin.recipe.blocks import OwnAnswersConfig
from dwakd_plugin.recipe.schema import LossConfig

NAME = "own_step"
OURS = "own answers"
BODIES = "both models without heads"  # the floor of all of them
TARGET = 0.5  # of GOLD's time, and of its memory

tables = gold.tables


@dataclass(frozen=True)
class Pair:
    """Both models' shapes, which differ in layers and vocabulary, and the step's rows."""

    width: int
    inner: int
    heads: int
    student_layers: int
    student_vocabulary: int
    teacher_layers: int
    teacher_vocabulary: int
    rows: int
    prompt: int  # tokens, as many on both sides
    answer: int


FULL = Pair(576, 1536, 9, 20, 50257, 30, 49152, 8, 64, 128)
SMALL = Pair(36, 64, 3, 2, 400, 2, 900, 2, 8, 24)


def a_step(name: str, pair: Pair) -> Callable[[], float]:
    """Forward of both models, loss, and backward through the student."""
    torch.manual_seed(0)
    shape = pair.width, pair.inner, pair.heads
    student = a_llama(pair.student_layers, *shape, pair.student_vocabulary).train()
    teacher = a_llama(pair.teacher_layers, *shape, pair.teacher_vocabulary).eval()
    teacher.requires_grad_(False)
    length = pair.prompt + pair.answer
    student_ids, teacher_ids = (
        torch.randint(size, (pair.rows, length))
        for size in (pair.student_vocabulary, pair.teacher_vocabulary)
    )
    loss_of = {OURS: _ours, BODIES: _bodies}.get(name, _golds)
    loss = loss_of(pair, student, teacher, student_ids, teacher_ids, gold.GOLD.get(name, False))

    def run() -> float:
        student.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    return run


def _ours(
    pair: Pair, student: Any, teacher: Any, student_ids: Tensor, teacher_ids: Tensor, _: bool
) -> Callable[[], Tensor]:
    from dwakd_plugin.models.causal_lm import embedding_table, output_head
    from dwakd_plugin.models.student import student_states
    from dwakd_plugin.models.teacher.loaded import Teacher

    config = own_loss_config(OwnAnswersConfig(), LossConfig())
    compared = int(gold.SHARED_ENDS * pair.answer)
    generator = torch.Generator().manual_seed(2)
    # A position predicts the token behind it.
    student_positions, teacher_positions = (
        torch.stack(
            [
                torch.randperm(pair.answer - 1, generator=generator)[:compared].sort().values
                for _ in range(pair.rows)
            ]
        )
        + pair.prompt
        - 1
        for _ in range(2)
    )
    lengths = torch.full((pair.rows,), compared)
    batch = {
        "student_positions": student_positions,
        "student_lengths": lengths,
        "teacher_input_ids": teacher_ids,
        "teacher_positions": teacher_positions,
        "teacher_lengths": lengths,
    }
    token_map = torch.randint(pair.student_vocabulary, (pair.teacher_vocabulary,))
    token_map[torch.rand(pair.teacher_vocabulary) > KNOWN] = -1
    judge = Teacher(
        embeddings=embedding_table(teacher),
        head=output_head(teacher),
        model=teacher,
        parameters=None,
        attention="sdpa",
        precision="float32",
        device=torch.device("cpu"),
        token_map=token_map,
    )

    def loss() -> Tensor:
        states = student_states(student, batch, student_ids, student_ids, embeds=False)
        terms = own_answer_terms(states, judge.states(batch), config)
        return terms.total(config) / (pair.rows * compared)

    return loss


def _bodies(
    pair: Pair, student: Any, teacher: Any, student_ids: Tensor, teacher_ids: Tensor, _: bool
) -> Callable[[], Tensor]:
    """Every state of both, and back through the student."""

    def loss() -> Tensor:
        with torch.no_grad():
            constant = teacher.model(input_ids=teacher_ids, use_cache=False)[0].sum()
        hidden: Tensor = student.model(input_ids=student_ids, use_cache=False)[0]
        return constant + hidden.sum()

    return loss


def _golds(
    pair: Pair, student: Any, teacher: Any, student_ids: Tensor, teacher_ids: Tensor, hybrid: bool
) -> Callable[[], Tensor]:
    uld = gold.uld_loss(pair.student_vocabulary, pair.teacher_vocabulary, hybrid)
    sizes = Sizes(pair.rows, pair.answer, pair.answer, 1, 1, 1, 1)
    labels, offsets = [], []
    for ids, of_answer in zip((student_ids, teacher_ids), gold.byte_offsets(sizes), strict=True):
        labels.append(ids.clone())
        labels[-1][:, : pair.prompt] = -100
        offsets.append(torch.cat([of_answer.new_zeros(pair.rows, pair.prompt, 2), of_answer], 1))

    def loss() -> Tensor:
        student_logits = student(input_ids=student_ids, use_cache=False).logits
        with torch.no_grad():
            teacher_logits = teacher(input_ids=teacher_ids).logits
        value: Tensor = uld(
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            student_labels=labels[0],
            teacher_labels=labels[1],
            student_input_ids=student_ids,
            teacher_input_ids=teacher_ids,
            student_byte_offsets=offsets[0],
            teacher_byte_offsets=offsets[1],
        )
        return value

    return loss


def prepare(name: str, pair: Pair) -> Callable[[], float]:
    a_step(name, SMALL)()
    return a_step(name, pair)


def targets(results: Report) -> list[dict[str, Any]]:
    ours, found = results["runs"][OURS], []
    for name in gold.GOLD:
        rival = results["runs"][name]
        time = measure.ratio(ours["seconds"], rival["seconds"])["median"]
        found += [
            measure.target(f"time / {name}", time, TARGET),
            measure.target(
                f"peak memory / {name}", ours["peak_bytes"] / rival["peak_bytes"], TARGET
            ),
        ]
    return found


def main(
    quick: Annotated[bool, typer.Option(help="A smoke run of a few seconds.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each step.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = FULL.rows,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    memory_limit: Annotated[float, typer.Option(help="GiB; what needs more fails.")] = 18.0,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the picture.")] = (
        measure.RESULTS
    ),
) -> None:
    """A step on answers that the student sampled, sampling left out, beside GOLD's."""
    measure.set_up(threads, memory_limit)
    started = measure.start(threads, quick, ["trl", "transformers"])
    pair, rounds = (SMALL, 1) if quick else (replace(FULL, rows=rows), rounds)
    steps = {name: a_step(name, pair) for name in (OURS, *gold.GOLD, BODIES)}
    seconds, disturbance = measure.alternate(steps, rounds)
    names = list(steps)
    del steps  # the processes that measure memory have their own
    results: Report = {"sizes": asdict(pair), "disturbance": disturbance, "runs": {}}
    for name in names:
        measure.say(f"memory of {name}")
        peak = measure.peak_memory(prepare, name, pair, threads=threads, preload=gold.PRELOAD)
        results["runs"][name] = {"seconds": seconds[name], "peak_bytes": peak}
    file = measure.write_report(NAME, started, results, [] if quick else targets(results), out)
    gold.picture(results, file.with_suffix(".png"))
    print(tables(results))


if __name__ == "__main__":
    typer.run(main)
