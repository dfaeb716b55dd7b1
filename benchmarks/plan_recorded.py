"""What `dwakd plan` says today of every run whose memory was recorded; nothing is trained.

python -m benchmarks.plan_recorded

A plan reads configs alone, so the recorded runs' models are made as configs on the spot.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import typer

from benchmarks import plan, plan_held_out
from benchmarks.measure import MIB, RESULTS, write_between

NAME = "plan_recorded"
MACHINE = 23.5  # GiB, of both recordings; the chunks' size depends on it
DOCUMENT = Path(__file__).parents[1] / "docs" / "planning.md"


def embedded_pair() -> dict[str, Any]:
    """Configs of the small pair: SmolLM2-135M, and what `small_pair.STUDENT` makes."""
    from transformers import LlamaConfig

    from benchmarks.small_pair import STUDENT, VOCABULARY

    return {
        "small-pair/teacher": LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        "small-pair/untrained": LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=STUDENT["hidden_size"],
            intermediate_size=STUDENT["intermediate_size"],
            num_hidden_layers=STUDENT["layers"],
            num_attention_heads=STUDENT["heads"],
            tie_word_embeddings=True,
        ),
    }


def recorded() -> dict[str, dict[str, Any]]:
    """What was recorded of each of the fourteen runs, by name."""
    return {
        name: one
        for benchmark in (plan.NAME, plan_held_out.NAME)
        for name, one in json.loads((RESULTS / f"{benchmark}.json").read_text(encoding="utf-8"))[
            "results"
        ].items()
    }


def planned(folder: Path) -> dict[str, Any]:
    """The plan of each recorded run, by name; writes the models' configs into `folder`."""
    from dwakd_plugin.models.teacher.cache import INDEX
    from dwakd_plugin.plan import Card
    from dwakd_plugin.plan import plan as make
    from dwakd_plugin.recipe import Recipe

    configs = embedded_pair() | plan.random_models() | plan_held_out.random_models()
    for name, config in configs.items():
        config.save_pretrained(folder / name)
    held_out = plan_held_out.configurations(folder)
    for run in held_out.values():
        if run.cache_is_full:
            states = Path(run.recipe["dwakd"]["teacher"]["cache"])
            states.mkdir()
            (states / INDEX).touch()
    card = Card("the recording machine", "cpu", int(MACHINE * 2**30), 1.0, 1.0, "recorded")
    recipes = plan.configurations(folder) | {n: run.recipe for n, run in held_out.items()}
    for recipe in recipes.values():
        # The runs' tokenizers shared 4,096 tokens at most. They aren't made here, and a plan that
        # finds none takes all of the vocabulary as shared, which would make this the peak.
        recipe["dwakd"]["projectors"] = {"init": "random"}
    return {name: make(Recipe(recipe), card) for name, recipe in recipes.items()}


def table(plans: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """Markdown: measured, what the plan said then, what it says now, and its worst moment alone."""
    lines = [
        "| configuration | measured, MiB | planned then | off by | planned now | off by "
        "| alive at once | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, made in plans.items():
        one = found[name]
        measured = one["measured"]["peak"]
        then = one["predicted"]["bytes"] if "predicted" in one else one["planned"]
        alive = made.total - made.parts.get("kept by malloc", 0)
        cells = [
            f"{size / MIB:,.0f} | {size / measured - 1:+.1%}" for size in (then, made.total, alive)
        ]
        lines.append(f"| {name} | {measured / MIB:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Write what `dwakd plan` says today of each recorded run into docs/planning.md."""
    with tempfile.TemporaryDirectory() as folder:
        text = table(planned(Path(folder)), recorded())
    print(text)
    write_between(DOCUMENT, NAME, text)


if __name__ == "__main__":
    typer.run(main)
