"""What `dwakd plan` says is alive at once, against every tensor of two real steps, counted.

python -m benchmarks.plan_allocated

Models of random weights on a CPU, on rows that fill `sequence_len` on both sides. Each storage is
noted as it comes and goes, so the figure is the same on each run, whatever else the machine does;
what malloc keeps, and what kernels take beside tensors, isn't in it, nor in what is planned here.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from benchmarks.measure import MIB, write_between

NAME = "plan_allocated"
DOCUMENT = Path(__file__).parents[1] / "docs" / "planning.md"
ROWS, LENGTH = 3, 160
LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}


def models() -> dict[str, Any]:
    from transformers import LlamaConfig, Qwen2Config

    return {
        "student": LlamaConfig(
            vocab_size=16_000,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=8,
        ),
        "teacher": Qwen2Config(
            vocab_size=24_000,
            hidden_size=384,
            intermediate_size=1056,
            num_hidden_layers=10,
            num_attention_heads=8,
            num_key_value_heads=8,
        ),
    }


def configurations() -> dict[str, dict[str, Any]]:
    """Settings by name: of the `dwakd` block, and `recipe` for the recipe's own keys."""
    return {
        "mapped": {},
        "mapped, checkpointing": {"recipe": {"gradient_checkpointing": True}},
        "mapped, LoRA": {"recipe": LORA},
        "mapped, LoRA, checkpointing": {"recipe": {**LORA, "gradient_checkpointing": True}},
        "mapped, packed": {"recipe": {"sample_packing": True}},
        "mapped, states from a cache": {"teacher": {"cache": "states"}},
        "mapped, 64 likeliest tokens from a cache": {"teacher": {"cache": "top", "top_k": 64}},
        "mapped, reverse KL": {"loss": {"divergence": "reverse_kl"}},
        "mapped, labels inside tokens": {"loss": {"inside_tokens": "label"}},
        "mapped, hidden states": {
            "variant": "mapped",
            "loss": {"cosine_weight": 3.0, "dtw_weight": 0.2},
        },
        "mapped, two teachers": {"teachers": [{}, {}]},
        "mapped, LoRA, two teachers, one from a cache": {
            "teachers": [{}, {"cache": "second"}],
            "recipe": LORA,
        },
        "paper": {"variant": "paper"},
    }


def recipe_of(folder: Path, settings: dict[str, Any], rows: int, length: int) -> dict[str, Any]:
    teachers: list[dict[str, Any]] = []
    for number, keys in enumerate(settings.get("teachers", [settings.get("teacher", {})])):
        teachers.append({"base_model": str(folder / "teacher")} | keys)
        if "cache" in keys:
            teachers[-1]["cache"] = str(folder / keys["cache"])
        if "teachers" in settings:
            teachers[-1]["name"] = f"teacher-{number}"
    own = settings.get("recipe", {})
    packs = bool(own.get("sample_packing"))  # all rows in one sequence
    block = ({"teachers": teachers} if "teachers" in settings else {"teacher": teachers[0]}) | {
        key: settings[key] for key in ("variant", "loss") if key in settings
    }
    if "variant" in block:
        block["projectors"] = {"init": "random"}  # or the shared tokens would be the peak
    return {
        "base_model": str(folder / "student"),
        "distillation": "dwakd",
        "dwakd": block,
        "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
        "sequence_len": rows * length if packs else length,
        "micro_batch_size": 1 if packs else rows,
        "optimizer": "adamw_torch",
        "bf16": False,
        "fp16": False,
    } | own


def planned(recipe: dict[str, Any]) -> float:
    """Bytes of tensors at the plan's worst moment."""
    from dwakd_plugin.models.teacher.cache import INDEX
    from dwakd_plugin.plan import card, plan
    from dwakd_plugin.recipe import Recipe

    read = Recipe(recipe)
    for cache in filter(None, (teacher.cache for teacher in read.config.each_teacher)):
        Path(cache).mkdir(exist_ok=True)
        (Path(cache) / INDEX).touch()
    made = plan(read, replace(card("cpu"), flops=1.0, bandwidth=1.0))
    return made.total - made.parts["kept by malloc"] - made.parts["runtime"]


def allocated(recipe: dict[str, Any], rows: int, length: int) -> int:
    """Bytes of all tensors at once, at most, over two steps."""
    import torch
    from transformers import AutoModelForCausalLM

    from dwakd_plugin.loss import dwakd_loss, trained_projectors, variant_of
    from dwakd_plugin.models.causal_lm import causal_lm, embedding_table, output_head
    from dwakd_plugin.models.projectors import Projectors
    from dwakd_plugin.models.student import student_states
    from dwakd_plugin.models.teacher.cached import teacher_of_probabilities
    from dwakd_plugin.models.teacher.loaded import Teacher
    from dwakd_plugin.plan.loss_trace import tables
    from dwakd_plugin.plan.model_sizes import lora_settings, with_lora
    from dwakd_plugin.plan.trace import Recorder
    from dwakd_plugin.recipe import Recipe
    from dwakd_plugin.train.parts import label_tokens, objective, parts_of

    config = Recipe(recipe).config
    loss, configs = config.loss, models()
    student = AutoModelForCausalLM.from_config(configs["student"])
    if (lora := lora_settings(recipe)) is not None:
        student = with_lora(student, lora)
    if recipe.get("gradient_checkpointing"):
        causal_lm(student).gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    vocabularies = student.config.vocab_size, configs["teacher"].vocab_size
    width, maps, teachers = configs["teacher"].hidden_size, [], []
    for block in config.each_teacher if loss.needs_teacher else ():
        body = AutoModelForCausalLM.from_config(configs["teacher"]).eval().requires_grad_(False)
        if block.top_k and block.cache:
            teacher = teacher_of_probabilities(vocabularies[1], "cpu", "", None)
        else:
            kept = None if block.cache else body
            tied = embedding_table(body), output_head(body)
            teacher = Teacher(*tied, kept, None, "", "", body.device)
        del body
        own = tables(*vocabularies)
        maps += own
        if variant_of(loss).match.rows:
            inside = loss.inside_tokens == "condition" and variant_of(loss).match.rows == "prefix"
            teacher = replace(
                teacher,
                token_map=own[0],
                continuations=own[1] if inside else None,
                spellings=own[2] if inside and not block.top_k else None,
            )
        teachers.append(teacher)
    projectors = None
    if trained_projectors(loss):
        projectors = Projectors(student.config.hidden_size, width)
        for name, layer in projectors.named_children():
            layer.requires_grad_(name in trained_projectors(loss))
    bodies = [teacher.model for teacher in teachers]
    modules = [each for each in (student, projectors, *bodies) if each]
    known = [tensor for each in modules for tensor in (*each.parameters(), *each.buffers())]
    for teacher in teachers:
        known += [teacher.embeddings.weight, teacher.head.weight]
    trained = [each for module in modules for each in module.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    taught_by = [[*range(len(teachers))]] * rows if len(teachers) > 1 else None
    of_each: list[Any] = [*zip(config.each_teacher, teachers, strict=False)]
    of_each = of_each or [(config.teacher, None)]
    waiting = []
    with Recorder([*known, *_tensors(maps)]) as recorder:
        for _ in range(2):
            waiting.append(
                [
                    _batch(recipe, config, block, rows, length, vocabularies, width, teacher)
                    for block, teacher in of_each
                ]
            )
            batches = waiting[0]
            batch, own = batches[0]
            embeds = variant_of(loss).needs_embeds(loss)
            states = student_states(student, batch, embeds=embeds, **own)
            sides = [
                (states, None if teacher is None else teacher.states(one))
                for (_, teacher), (one, _) in zip(of_each, batches, strict=True)
            ]
            parts = parts_of(
                config,
                sides,
                taught_by,
                loss,
                lambda student, teacher, own: dwakd_loss(
                    student, teacher, projectors, loss=own, soft_dtw=config.soft_dtw
                ),
            )
            del states, sides
            total = objective(parts, 1.0) / label_tokens(parts)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            del parts, total
    storages = {id(s): s.nbytes() for s in (tensor.untyped_storage() for tensor in known)}
    return sum(storages.values()) + recorder.most()


def _tensors(maps: Any) -> list[Any]:
    import torch

    found = []
    for each in maps:
        values = [each] if isinstance(each, torch.Tensor) else vars(each).values()
        found += [value for value in values if isinstance(value, torch.Tensor)]
    return found


def _batch(
    recipe: dict[str, Any],
    config: Any,
    block: Any,
    rows: int,
    length: int,
    vocabularies: tuple[int, int],
    width: int,
    teacher: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The collator's keys for rows that answer from the first token on, and the student's own."""
    import torch

    from dwakd_plugin.loss import variant_of
    from dwakd_plugin.models.batches import response_positions, teacher_batch
    from dwakd_plugin.models.teacher.top_tokens import TopTokens, to_bits

    packs = bool(recipe.get("sample_packing"))
    ids = [[torch.randint(2, size, (length,)) for _ in range(rows)] for size in vocabularies]
    starts = [row * length for row in range(rows)]
    batch = teacher_batch(ids[1], ids[1], packs, None)
    batch |= response_positions("student", ids[0], starts)
    own = {"input_ids": torch.stack(ids[0]), "labels": torch.stack(ids[0])}
    if packs:
        own = {name: tensor.view(1, -1) for name, tensor in own.items()}
        own["position_ids"] = torch.arange(length).repeat(rows)[None]
    else:
        own["attention_mask"] = torch.ones_like(own["input_ids"])
        own["attention_mask"][0, -1] = 0
    positions = batch["teacher_index"]
    if variant_of(config.loss).match.rows:
        spelt = positions[::6] if teacher is not None and teacher.spellings else positions[:0]
        for side in ("student", "teacher"):
            batch |= {f"{side}_pairs": positions, f"{side}_spelt": spelt}
        batch["student_read"] = torch.zeros_like(positions)
        further = spelt[len(spelt) // 2 :]
        batch["student_spelt_read"] = torch.ones_like(further)
    if block.cache:
        said = torch.zeros(rows, length - 1, block.top_k or width)
        if block.top_k:
            batch["teacher_top"] = to_bits(TopTokens(said.int(), said - 5.0))
        else:
            batch["teacher_hidden"] = said
    return batch, own


def compared(folder: Path, rows: int = ROWS, length: int = LENGTH) -> dict[str, tuple[float, int]]:
    """Planned and allocated bytes of each configuration; writes the models' configs."""
    for name, config in models().items():
        config.save_pretrained(folder / name)
    found = {}
    for name, settings in configurations().items():
        recipe = recipe_of(folder, settings, rows, length)
        found[name] = planned(recipe), allocated(recipe, rows, length)
    return found


def table(found: dict[str, tuple[float, int]]) -> str:
    lines = ["| configuration | allocated, MiB | planned | off by |", "|---|---|---|---|"]
    for name, (plan, real) in found.items():
        lines.append(f"| {name} | {real / MIB:,.0f} | {plan / MIB:,.0f} | {plan / real - 1:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, and writes the table into docs/planning.md."""
    with tempfile.TemporaryDirectory() as folder:
        text = table(compared(Path(folder)))
    print(text)
    write_between(DOCUMENT, NAME, text)


if __name__ == "__main__":
    typer.run(main)
