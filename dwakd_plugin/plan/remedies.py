"""What would make a recipe take less: changes of it, each planned by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

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
    teacher = recipe.config.teacher
    with_teacher = recipe.with_teacher
    if not teacher.cache:
        if not teacher.load_in_8bit and not teacher.load_in_4bit:
            yield (
                "the teacher in 8 bit",
                "dwakd:\n  teacher:\n    load_in_8bit: true",
                with_teacher(load_in_8bit=True),
            )
        if not teacher.load_in_4bit:
            yield (
                "the teacher in 4 bit",
                "dwakd:\n  teacher:\n    load_in_4bit: true",
                with_teacher(load_in_8bit=False, load_in_4bit=True),
            )
        yield (
            "the teacher's states from a cache on disk",
            "dwakd:\n  teacher:\n    cache: teacher_states",
            with_teacher(cache="teacher_states"),
        )
        if not variant_of(recipe.config.loss).needs_states:
            yield (
                "the teacher's likeliest tokens from a cache on disk",
                "dwakd:\n  teacher:\n    cache: teacher_tokens\n    top_k: 64",
                with_teacher(cache="teacher_tokens", top_k=64),
            )
    if teacher.dtype in ("auto", "float32") and now.card.kind == "cuda":
        yield (
            "the teacher in bfloat16",
            "dwakd:\n  teacher:\n    dtype: bfloat16",
            with_teacher(dtype="bfloat16"),
        )
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
