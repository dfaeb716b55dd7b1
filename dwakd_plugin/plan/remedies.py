"""What would make a recipe take less: changes of it, each planned by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import variant_of
from dwakd_plugin.plan.parts import Lengths
from dwakd_plugin.plan.peak import Plan, plan
from dwakd_plugin.recipe import Recipe


@dataclass(frozen=True)
class Suggestion:
    """A change of the recipe, and what it saves."""

    title: str
    yaml: str
    saves: float
    fits: bool


def suggestions(
    recipe: Recipe,
    now: Plan,
    *,
    response_share: float = 1.0,
    lengths: Lengths | None = None,
) -> list[Suggestion]:
    """Changes that save memory, each planned by itself, the most effective first."""
    found = []
    for title, yaml, changed in _changes(recipe, now):
        try:
            then = plan(changed, now.card, response_share=response_share, lengths=lengths)
        except UserError:
            continue  # a LoRA that fits nothing, say
        if now.total - then.total > 0.01 * now.total:
            found.append(Suggestion(title, yaml, now.total - then.total, then.fits))
    return sorted(found, key=lambda one: -one.saves)


def _changes(recipe: Recipe, now: Plan) -> Iterator[tuple[str, str, Recipe]]:
    for number in range(len(recipe.config.each_teacher)):
        yield from _changes_of(recipe, number, now.card.kind)
    if not recipe.keys.get("gradient_checkpointing"):
        yield (
            "gradient checkpointing",
            "gradient_checkpointing: true",
            recipe.but(gradient_checkpointing=True),
        )
    if "8bit" not in str(recipe.keys.get("optimizer")):
        yield (
            "an optimizer with 8-bit state",
            "optimizer: adamw_bnb_8bit",
            recipe.but(optimizer="adamw_bnb_8bit"),
        )
    if not recipe.adapter:
        lora = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
        yield (
            "a LoRA instead of full fine-tuning",
            "\n".join(f"{key}: {json.dumps(value)}" for key, value in lora.items()).replace(
                '"', ""
            ),
            recipe.but(**lora),
        )
    batch = now.micro_batch
    if batch > 1:
        smaller = max(1, batch // 2)
        steps = recipe.accumulation_steps * math.ceil(batch / smaller)
        changed = {"micro_batch_size": smaller, "gradient_accumulation_steps": steps}
        yield (
            "half the micro-batch, twice the accumulation",
            "\n".join(f"{key}: {value}" for key, value in changed.items()),
            recipe.but(**changed),
        )
    length = now.lengths.student
    if length >= 128:
        yield (
            "half the sequence length (longer rows are dropped)",
            f"sequence_len: {length // 2}",
            recipe.but(sequence_len=length // 2),
        )


def _changes_of(recipe: Recipe, number: int, kind: str) -> Iterator[tuple[str, str, Recipe]]:
    """Of one teacher, by its place."""
    teacher = recipe.config.each_teacher[number]
    name = teacher.name if recipe.config.teachers else None
    whose = f"teacher {name}" if name else "the teacher"
    own = f"_{name}" if name else ""
    if teacher.server is not None:
        return

    def change(title: str, yaml: dict[str, Any], **further: Any) -> tuple[str, str, Recipe]:
        keys = [f"{key}: {json.dumps(value)}".replace('"', "") for key, value in yaml.items()]
        if name:
            head, keys = "dwakd:\n  teachers:\n    - ", [f"name: {name}", *keys]
            text = head + "\n      ".join(keys)
        else:
            text = "dwakd:\n  teacher:\n    " + "\n    ".join(keys)
        return title, text, recipe.with_teacher(number, **(yaml | further))

    if not teacher.cache:
        if not teacher.load_in_8bit and not teacher.load_in_4bit:
            yield change(f"{whose} in 8 bit", {"load_in_8bit": True})
        if not teacher.load_in_4bit:
            yield change(f"{whose} in 4 bit", {"load_in_4bit": True}, load_in_8bit=False)
        yield change(f"{whose}'s states from a cache on disk", {"cache": f"teacher_states{own}"})
        loss = recipe.config.loss
        if not variant_of(loss).needs_states(loss):
            title = f"{whose}'s likeliest tokens from a cache on disk"
            yield change(title, {"cache": f"teacher_tokens{own}", "top_k": 64})
    if teacher.dtype in ("auto", "float32") and kind == "cuda":
        yield change(f"{whose} in bfloat16", {"dtype": "bfloat16"})
