"""Settings of a recipe that distillation does not go with, found before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.adapters import (
    CHANGES_BASE,
    adapter_settings,
    base_of_adapter,
    changes_base,
)
from dwakd_plugin.recipe.blocks import OwnAnswersConfig
from dwakd_plugin.recipe.messages import as_found, name_problem, nearest
from dwakd_plugin.recipe.recipe import ENGINE_KEYS, Recipe

# Settings of axolotl that distillation does not go with: key, and what to do about it.
_CONFLICTS = {
    "batch_flattening": "flattened samples cannot be paired with the teacher's; use sample_packing",
    "use_pose": "it moves position ids, which tell the two sides' rows apart; remove it",
    "pretraining_dataset": "distillation needs rows with a response; use `datasets`",
    "streaming": "the two sides of a row are prepared before training; remove it",
    "skip_prepare_dataset": "rows must be tokenised for both models; remove it",
    "rl": "distillation is supervised fine-tuning; remove `rl` and give instruction data",
    "reward_model": "distillation trains a causal language model; remove it",
    "process_reward_model": "distillation trains a causal language model; remove it",
    "kd_trainer": "this is axolotl's own distillation; choose one of the two",
    "label_smoothing_factor": "the teacher's distribution takes its place; remove it",
    "loss_watchdog_threshold": "it stops at a loss that is high for a cross-entropy, and the whole "
    "objective is larger; remove it (a loss that is not finite stops the run anyway)",
    "processor_type": "multimodal data has no teacher's side; remove it",
    "use_eaft": "it weights the labels' loss in its own way; remove it",
}

PARALLEL_KEYS = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")

_LONGEST_OWN = ("own_answers", "max_new_tokens")

# Sections of a DeepSpeed config that take away from the recipe what the projectors need.
_DEEPSPEED_SECTIONS = ("optimizer", "scheduler")

# What kind of value the keys have that are looked at here, before axolotl's own schema sees them.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("base_model", "tokenizer_config", "lora_model_dir", "output_dir"), (str,)),
    **dict.fromkeys(("datasets", "test_datasets", "plugins"), (list,)),
    **dict.fromkeys(PARALLEL_KEYS, (int,)),
    "resume_from_checkpoint": (str, bool),
    "fsdp_config": (dict,),
    "deepspeed": (str, dict),
}

_IN_WORDS = {str: "text", list: "a list", int: "a whole number", bool: "true", dict: "a mapping"}


def check_kinds(recipe: Recipe) -> None:
    """Raises UserError that names every key whose value is of another kind than it must be."""
    problems = []
    for key, kinds in _KINDS.items():
        value = recipe.keys.get(key)
        if value is None or value is False:
            continue
        if not isinstance(value, kinds):
            wanted = " or ".join(_IN_WORDS[kind] for kind in kinds)
            problems.append(f"  {key}: must be {wanted} ({as_found(value)})")
        elif isinstance(value, str) and (problem := name_problem(value)) is not None:
            problems.append(f"  {key}: {problem} ({as_found(value)})")
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(entries(recipe.keys.get(key))):
            if not isinstance(dataset, dict):
                problems.append(
                    f"  {key}[{index}]: must be a mapping with `path` and `type` "
                    f"({as_found(dataset)})"
                )
            elif isinstance(path := dataset.get("path"), str) and name_problem(path) is not None:
                problems.append(f"  {key}[{index}].path: {name_problem(path)} ({as_found(path)})")
    if problems:
        raise UserError("The recipe cannot be read:\n" + "\n".join(problems))


def check_recipe(recipe: Recipe) -> None:
    """Raises UserError that names every setting distillation does not go with."""
    check_kinds(recipe)
    problems = [
        f"  {key}: {recipe.keys[key]} — {remedy}"
        for key, remedy in _CONFLICTS.items()
        if recipe.keys.get(key)
    ]
    for key in PARALLEL_KEYS:
        if (recipe.keys.get(key) or 1) > 1:
            problems.append(f"  {key}: {recipe.keys[key]} — sequences must be whole; set it to 1")
    problems += _adapter_problems(recipe)
    problems += _engine_problems(recipe)
    if recipe.written("own_answers") is not None:
        problems += _own_answers_problems(recipe)
    if not recipe.datasets:
        problems.append("  datasets: none given — add the rows to train on")
    if problems:
        raise UserError(
            "These settings do not work with `distillation: dwakd`:\n" + "\n".join(problems)
        )


def check_taught(recipe: Recipe) -> None:
    """Raises UserError where a teacher is for data that isn't there, or data are without one."""
    teachers = recipe.config.teachers
    if not teachers:
        return
    every = [*recipe.datasets, *entries(recipe.keys.get("test_datasets"))]
    paths = [str(dataset.get("path")) for dataset in every]
    problems = []
    for number, teacher in enumerate(teachers):
        for path in teacher.datasets or ():
            if path not in paths:
                near = nearest(path, paths)
                hint = f"did you mean `{near}`?" if near else f"it has: {', '.join(paths)}"
                problems.append(
                    f"  dwakd.teachers[{number}].datasets: {path} — no `path` of the recipe's data "
                    f"sets; {hint}"
                )
    for number, path in enumerate(paths[: len(recipe.datasets)]):
        if not any(teacher.teaches(path) for teacher in teachers):
            names = ", ".join(teacher.name for teacher in teachers)
            problems.append(
                f"  datasets[{number}].path: {path} — none of the teachers ({names}) teaches it; "
                "name it among the `datasets` of one, or leave those out of a teacher of all"
            )
    if problems:
        raise UserError("Teachers and data sets do not fit together:\n" + "\n".join(problems))


def _adapter_problems(recipe: Recipe) -> Iterator[str]:
    """LoRAs that no run folder keeps whole."""
    if _section(_section(recipe.keys, "peft"), "loftq_config").get("loftq_bits"):
        yield f"  peft.loftq_config: {CHANGES_BASE}; remove it"
    asked = recipe.keys.get("peft_init_lora_weights")
    if changes_base(asked):
        yield (
            f"  peft_init_lora_weights: {asked} — {CHANGES_BASE}; use "
            "`peft_init_lora_weights: gaussian`, or leave it out"
        )
    folders = {"lora_model_dir": recipe.keys.get("lora_model_dir")}
    for place, teacher in recipe.written_teachers.items():
        own = _section({"teacher": teacher}, "teacher")
        folders[f"{place}.adapter"] = own.get("adapter")
        if not own.get("adapter") and base_of_adapter(own.get("base_model")) is not None:
            folders[f"{place}.base_model"] = own["base_model"]
    for key, folder in folders.items():
        init = adapter_settings(folder).get("init_lora_weights")
        if changes_base(init):
            yield (
                f"  {key}: {folder} — begun with init_lora_weights: {init}, and {CHANGES_BASE}; "
                "convert it to a plain LoRA where it was trained (peft's "
                "`path_initial_model_for_weight_conversion`)"
            )


def _engine_problems(recipe: Recipe) -> Iterator[str]:
    """What distillation cannot do under FSDP and DeepSpeed, with what to do about it."""
    fsdp = recipe.keys.get("fsdp_config") or {}
    if fsdp or recipe.keys.get("fsdp"):
        version = recipe.keys.get("fsdp_version") or _fsdp(fsdp, "version") or 1
        if str(version) != "2":
            yield (
                f"  fsdp_version: {version} — FSDP1 flattens a student's weights together with the "
                "projectors'; set `fsdp_version: 2`"
            )
        policy = _fsdp(fsdp, "auto_wrap_policy")
        if policy == "SIZE_BASED_WRAP":
            yield (
                f"  fsdp_config.auto_wrap_policy: {policy} — it may part head and embeddings from "
                "the decoder, and the loss needs them together; set TRANSFORMER_BASED_WRAP and "
                "`transformer_layer_cls_to_wrap`"
            )
    if deepspeed := recipe.keys.get("deepspeed"):
        try:
            config = _deepspeed_config(deepspeed)
        except (OSError, ValueError) as error:
            yield (
                f"  deepspeed: {deepspeed} — cannot be read ({error}); give a JSON file, "
                "such as `axolotl fetch deepspeed_configs` brings"
            )
            return
        for section in _DEEPSPEED_SECTIONS:
            if config.get(section):
                yield (
                    f"  deepspeed: its `{section}` section — it has one learning rate for student "
                    f"and projectors; remove it: axolotl's own {section} is used then"
                )
        if _section(config, "tensor_parallel").get("autotp_size") not in (None, 0, 1):
            yield "  deepspeed: tensor_parallel.autotp_size — heads must be whole; remove it"
    steps = recipe.written("projectors", "warmup_steps")
    if steps and is_sharded(recipe):
        yield (
            f"  dwakd.projectors.warmup_steps: {steps} — no process holds the whole student under "
            "FSDP and ZeRO-3; run `dwakd warmup RECIPE` before, and give its file as "
            "dwakd.projectors.path"
        )


def is_sharded(recipe: Recipe) -> bool:
    """Whether no process holds the whole student. Raises OSError, ValueError (DeepSpeed's file)."""
    if recipe.keys.get("fsdp_config") or recipe.keys.get("fsdp"):
        return True
    deepspeed = recipe.keys.get("deepspeed")
    return bool(deepspeed) and (
        _section(_deepspeed_config(deepspeed), "zero_optimization").get("stage") == 3
    )


def _own_answers_problems(recipe: Recipe) -> Iterator[str]:
    """What sampling answers from the student cannot do yet, with what to do about it."""
    if recipe.has_engine:
        found = ", ".join(key for key in ENGINE_KEYS if recipe.keys.get(key))
        yield (
            f"  dwakd.own_answers: with {found} — each process samples from the student as it "
            "holds it, and under FSDP and DeepSpeed that isn't the whole of it; remove these keys: "
            "several GPUs train without them too (DDP), each with the whole student"
        )
    bits = [key for key in ("load_in_8bit", "load_in_4bit") if recipe.keys.get(key)]
    if bits and recipe.written("own_answers", "backend") == "vllm":
        yield (
            f"  dwakd.own_answers.backend: vllm with {bits[0]} — vLLM cannot be handed quantised "
            "weights; remove one of the two keys"
        )
    length, longest = recipe.keys.get("sequence_len"), recipe.written(*_LONGEST_OWN)
    if longest is None:
        longest = OwnAnswersConfig.model_fields[_LONGEST_OWN[-1]].default
    if isinstance(length, int) and isinstance(longest, int) and longest >= length:
        yield (
            f"  {'.'.join(('dwakd', *_LONGEST_OWN))}: {longest} — sequence_len is {length}, which "
            "leaves no place for a prompt; raise sequence_len, or lower max_new_tokens"
        )


def _section(config: Any, name: str) -> dict[str, Any]:
    """A mapping within a mapping; empty where it is not there, or no mapping."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _fsdp(config: Any, key: str) -> Any:
    """A key of `fsdp_config`, which may have axolotl's old prefix."""
    return config.get(key) or config.get(f"fsdp_{key}")


def _deepspeed_config(value: Any) -> Any:
    """The DeepSpeed config of a recipe, given as a file or whole. Raises OSError, ValueError."""
    if isinstance(value, dict):
        return value
    config = json.loads(Path(value).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("it holds no mapping")
    return config


def check_data_types(recipe: Recipe) -> None:
    """Raises UserError where the data is plain text, which the tokenising would refuse later."""
    for dataset in recipe.datasets:
        kind = str(dataset.get("type"))
        if kind.startswith(("completion", "pretrain")):
            raise UserError(
                f"datasets: {dataset.get('path')} has `type: {kind}`, which is plain text to "
                "continue, cut into chunks of tokens, and the chunks of two tokenizers do not "
                "match. Distillation needs rows with a response: `type: alpaca`, "
                "`type: chat_template`, ..."
            )


def entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
