"""What can be found wrong before any model is loaded: in the recipe, and in the output folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dwakd_plugin.config import DWAKDConfig, TeacherConfig, as_found, name_problem, parse_recipe
from dwakd_plugin.errors import UserError, without_credentials
from dwakd_plugin.files import json_checksum
from dwakd_plugin.run_lock import check_free
from dwakd_plugin.teacher_quantisation import check_packages, own_quantisation

RUN_FILE = Path("dwakd") / "run.json"  # within the output folder: whose run it holds
CHECKSUM = "crc32"  # of all else in that file

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
# What shards the student over several processes.
ENGINE_KEYS = ("fsdp", "fsdp_config", "fsdp_version", "deepspeed")
PARALLEL_KEYS = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")
# Sections of a DeepSpeed config that take away from the recipe what the projectors need.
_DEEPSPEED_SECTIONS = ("optimizer", "scheduler")

_TRAINING_KEYS = (
    "adapter",
    "lora_r",
    "lora_alpha",
    "learning_rate",
    "lr_scheduler",
    "optimizer",
    "num_epochs",
    "max_steps",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "sequence_len",
    "seed",
)


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


def check_kinds(recipe: Any) -> None:
    """Raises UserError that names every key whose value is of another kind than it must be."""
    problems = []
    for key, kinds in _KINDS.items():
        value = recipe.get(key)
        if value is None or value is False:
            continue
        if not isinstance(value, kinds):
            wanted = " or ".join(_IN_WORDS[kind] for kind in kinds)
            problems.append(f"  {key}: must be {wanted} ({as_found(value)})")
        elif isinstance(value, str) and (problem := name_problem(value)) is not None:
            problems.append(f"  {key}: {problem} ({as_found(value)})")
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(_list(recipe.get(key))):
            if not isinstance(dataset, dict):
                problems.append(
                    f"  {key}[{index}]: must be a mapping with `path` and `type` "
                    f"({as_found(dataset)})"
                )
            elif isinstance(path := dataset.get("path"), str) and name_problem(path) is not None:
                problems.append(f"  {key}[{index}].path: {name_problem(path)} ({as_found(path)})")
    if problems:
        raise UserError("The recipe cannot be read:\n" + "\n".join(problems))


def check_recipe(recipe: Any) -> None:
    """Raises UserError that names every setting distillation does not go with."""
    check_kinds(recipe)
    problems = [
        f"  {key}: {recipe.get(key)} — {remedy}"
        for key, remedy in _CONFLICTS.items()
        if recipe.get(key)
    ]
    for key in PARALLEL_KEYS:
        if (recipe.get(key) or 1) > 1:
            problems.append(f"  {key}: {recipe.get(key)} — sequences must be whole; set it to 1")
    problems += _engine_problems(recipe)
    if not recipe.get("datasets"):
        problems.append("  datasets: none given — add the rows to train on")
    if problems:
        raise UserError(
            "The recipe asks for what does not go with `distillation: dwakd`:\n"
            + "\n".join(problems)
        )


def _engine_problems(recipe: Any) -> Iterator[str]:
    """What distillation cannot do under FSDP and DeepSpeed, with what to do about it."""
    fsdp = recipe.get("fsdp_config") or {}
    stage: Any = 0
    if fsdp or recipe.get("fsdp"):
        version = recipe.get("fsdp_version") or _fsdp(fsdp, "version") or 1
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
    if recipe.get("deepspeed"):
        try:
            config = _deepspeed_config(recipe["deepspeed"])
        except (OSError, ValueError) as error:
            yield (
                f"  deepspeed: {recipe['deepspeed']} — cannot be read ({error}); give a JSON file, "
                "such as `axolotl fetch deepspeed_configs` brings"
            )
            return
        stage = _section(config, "zero_optimization").get("stage")
        for section in _DEEPSPEED_SECTIONS:
            if config.get(section):
                yield (
                    f"  deepspeed: its `{section}` section — it has one learning rate for student "
                    f"and projectors; remove it: axolotl's own {section} is used then"
                )
        if _section(config, "tensor_parallel").get("autotp_size") not in (None, 0, 1):
            yield "  deepspeed: tensor_parallel.autotp_size — heads must be whole; remove it"
    block = recipe.get("dwakd")
    block = block if isinstance(block, dict) else {}
    sharded = fsdp or recipe.get("fsdp") or stage == 3
    exact = _section(block, "loss").get("matching") == "exact"
    if sharded and (exact or block.get("variant") in ("dskdv2", "dwakdv2")):
        yield (
            "  dwakd.loss.matching: exact — its map between the heads follows the whole student, "
            "which no process holds under FSDP and ZeRO-3; use DDP, ZeRO-1 or ZeRO-2"
        )
    steps = _section(block, "projectors").get("warmup_steps")
    if steps and sharded:
        yield (
            f"  dwakd.projectors.warmup_steps: {steps} — no process holds the whole student under "
            "FSDP and ZeRO-3; run `dwakd warmup RECIPE` before, and give its file as "
            "dwakd.projectors.path"
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


def check_data_types(recipe: dict[str, Any]) -> None:
    """Raises UserError where the data is plain text, which the tokenising would refuse later."""
    for dataset in _list(recipe.get("datasets")):
        kind = str(dataset.get("type")) if isinstance(dataset, dict) else ""
        if kind.startswith(("completion", "pretrain")):
            raise UserError(
                f"datasets: {dataset.get('path')} has `type: {kind}`, which is plain text to "
                "continue, cut into chunks of tokens, and the chunks of two tokenizers do not "
                "match. Distillation needs rows with a response: `type: alpaca`, "
                "`type: chat_template`, ..."
            )


def check_all(recipe: dict[str, Any]) -> DWAKDConfig:
    """The distillation settings of a recipe with which a run can begin.

    Raises UserError with the findings of every check at once: the schema of the `dwakd:` block,
    settings that distillation does not go with, missing files and folders, the output folder.
    """
    findings: list[str] = []
    config: DWAKDConfig | None = None
    try:
        config = parse_recipe(recipe)
        if config is None:
            findings.append("The recipe does not say `distillation: dwakd`.")
    except UserError as error:
        findings.append(str(error))

    def check(what: Callable[[], None]) -> None:
        try:
            what()
        except UserError as error:
            findings.append(str(error))

    check(lambda: check_kinds(recipe))
    if len(findings) > (config is None):  # the rest reads these values
        raise UserError("\n".join(findings))
    check(lambda: check_recipe(recipe))
    check(lambda: check_data_types(recipe))
    check(lambda: check_files(recipe))
    if config is not None:
        check(lambda: check_teacher_recipe(config))
    # What is whose run can be said of a recipe that names both models.
    if config is not None and isinstance(recipe.get("base_model"), str):
        check(lambda: check_free(output_folder(recipe)))
        check(lambda: check_output_folder(recipe, config, only_look=True))
    if findings or config is None:
        raise UserError("\n".join(findings))
    return config


def check_teacher_recipe(config: DWAKDConfig) -> None:
    """Raises UserError where the teacher's quantisation, attention or device cannot be had here.

    Looks at the packages, and no further where the recipe leaves attention and device to us: only
    then are torch and transformers not needed for it.
    """
    teacher = config.teacher
    if not config.loss.needs_teacher or not loads_body(teacher):
        return
    file = Path(teacher.base_model) / "config.json"
    model_config: dict[str, Any] = {}
    if file.is_file():
        try:
            model_config = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"The teacher's {file} is damaged: {error}") from error
    check_packages(teacher, own_quantisation(model_config))
    usual = teacher.attn_implementation in ("auto", "sdpa", "eager")
    if not usual or teacher.device is not None:
        import torch

        from dwakd_plugin.teacher import check_teacher

        check_teacher(teacher, "cuda:0" if torch.cuda.is_available() else "cpu")


def loads_body(teacher: TeacherConfig) -> bool:
    """Whether a run loads more of the teacher than head and embeddings, as far as can be seen."""
    if teacher.cache is None or not Path(teacher.cache).is_dir():
        return True
    from dwakd_plugin.teacher_cache import INDEX

    return not (Path(teacher.cache) / INDEX).is_file()


def check_files(recipe: dict[str, Any]) -> None:
    """Raises UserError that names every local file or folder of the recipe that is not there.

    What may be a hub id is left to the hub, unless that is switched off.
    """
    problems = [
        f"  {place}: {found} — {remedy}"
        for place, found, remedy in _missing(recipe)
        if remedy is not None
    ]
    if not recipe.get("base_model"):
        problems.insert(0, "  base_model: none given — name the student, a folder or a hub id")
    if problems:
        raise UserError(
            f"The recipe names what is not there (paths start in {Path.cwd()}):\n"
            + "\n".join(problems)
        )


def _missing(recipe: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """Place in the recipe, value, and remedy or None where nothing is wrong."""
    block = recipe.get("dwakd")
    teacher = block.get("teacher") if isinstance(block, dict) else None
    if isinstance(teacher, str):
        teacher = {"base_model": teacher}
    models = {
        "base_model": recipe.get("base_model"),
        "tokenizer_config": recipe.get("tokenizer_config"),
        "lora_model_dir": recipe.get("lora_model_dir"),
    }
    if isinstance(teacher, dict):
        models |= {
            f"dwakd.teacher.{key}": teacher.get(key)
            for key in ("base_model", "tokenizer", "adapter")
        }
    for place, model in models.items():
        if isinstance(model, str) and name_problem(model) is None:
            yield place, model, model_remedy(model, is_adapter="model_dir" in place)
    projectors = block.get("projectors") if isinstance(block, dict) else None
    files = {
        "dwakd.projectors.path": projectors.get("path") if isinstance(projectors, dict) else None,
        "resume_from_checkpoint": recipe.get("resume_from_checkpoint"),
    }
    for place, file in files.items():
        if isinstance(file, str) and name_problem(file) is None and not Path(file).exists():
            yield place, file, "no such file or folder"
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(_list(recipe.get(key))):
            path = dataset.get("path") if isinstance(dataset, dict) else None
            if isinstance(path, str):
                yield f"{key}[{index}].path", path, _dataset_remedy(path)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def model_remedy(model: str, *, is_adapter: bool) -> str | None:
    """What is wrong with a model's folder or hub id, as far as can be seen here; None: nothing."""
    folder = Path(model)
    if folder.is_dir():
        names = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
        if any((folder / name).is_file() for name in names):
            return None
        return "a folder without a model's config.json"
    if folder.exists():
        return "a file; give the model's folder"
    if is_adapter or _is_a_path(model):
        return "no such folder"
    if not _hub_is_off():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        names = ("config.json", "adapter_config.json", "tokenizer_config.json")
        if any(isinstance(try_to_load_from_cache(model, name), str) for name in names):
            return None
    except HFValidationError:
        return "no such folder, and no valid hub id"
    return "no such folder, not among the downloaded models, and HF_HUB_OFFLINE is set"


def _dataset_remedy(path: str) -> str | None:
    data_file = Path(path).suffix in (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")
    if Path(path).exists() or "://" in path or not (_is_a_path(path) or data_file):
        return None
    return "no such file or folder"


def _is_a_path(name: str) -> bool:
    """Whether a name cannot be a hub id, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _hub_is_off() -> bool:
    switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in switches)


def run_identity(recipe: Any, config: DWAKDConfig) -> dict[str, str]:
    """Which run an output folder belongs to."""
    return {
        "student": str(recipe["base_model"]),
        "teacher": config.teacher.base_model,
        "adapter": str(recipe.get("adapter") or "none"),
    }


def run_facts(recipe: Any) -> dict[str, Any]:
    """What a run was trained on and how, for its records. Local files go by their last name."""
    data = []
    for dataset in recipe.get("datasets") or []:
        path = str(dataset.get("path"))
        name = Path(path).name if Path(path).exists() or _is_a_path(path) else path
        data.append(f"{without_credentials(name)} ({dataset.get('type')})")
    return {
        "data": data,
        "training": {
            key: recipe.get(key) for key in _TRAINING_KEYS if recipe.get(key) not in (None, "")
        },
    }


def check_output_folder(recipe: Any, config: DWAKDConfig, *, only_look: bool = False) -> None:
    """Raises UserError where the output folder holds a run that this one would overwrite.

    Checkpoints that were cut off while being written are set aside, so that a resumed run takes the
    last whole one; `only_look` changes nothing.
    """
    folder = output_folder(recipe)
    _check_writable(folder)
    resumes = bool(
        recipe.get("resume_from_checkpoint") or recipe.get("auto_resume_from_checkpoints")
    )
    own = run_identity(recipe, config)
    record = read_run_file(folder / RUN_FILE)
    found = None if record is None else record.get("identity")
    if resumes:
        if found is not None and found != own:
            differing = "\n".join(
                f"  {key}: {found.get(key)} there, {value} in this recipe"
                for key, value in own.items()
                if found.get(key) != value
            )
            raise UserError(
                f"output_dir {folder} holds another run, which this one cannot resume:\n"
                f"{differing}\nGive another output_dir."
            )
        if not only_look:
            _set_incomplete_checkpoints_aside(folder)
        return
    held = [
        path.name
        for pattern in ("checkpoint-*", "*.safetensors")
        for path in sorted(folder.glob(pattern))
    ]
    if held:
        whose = f" ({found['teacher']} teaching {found['student']})" if found else ""
        raise UserError(
            f"output_dir {folder} holds a run already{whose}: {', '.join(held[:4])}. Resume it "
            "with `auto_resume_from_checkpoints: true`, give another output_dir, or remove it."
        )


def output_folder(recipe: Any) -> Path:
    """Where axolotl writes the run."""
    return Path(recipe.get("output_dir") or "./model-out")  # axolotl's own default


def _check_writable(folder: Path) -> None:
    """Raises UserError where the folder, or the nearest that exists above it, takes no files."""
    nearest = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    if not nearest.is_dir():
        raise UserError(f"output_dir {folder}: {nearest} is a file. Give another output_dir.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: {nearest} is not writable. Give another output_dir.")


def read_run_file(file: Path) -> dict[str, Any] | None:
    """What a run says of itself; None where there is none. Raises UserError where it is damaged."""
    try:
        record = dict(json.loads(file.read_text(encoding="utf-8")))
        expected = record.pop(CHECKSUM, None)
        if expected is not None and expected != json_checksum(record):
            raise ValueError("its checksum does not match")
        if not isinstance(record.get("identity", {}), dict):
            raise TypeError("its `identity` is no mapping")
        return record
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({error}). Give another output_dir; or remove the file, if the "
            "folder is the run that you mean."
        ) from error


def _set_incomplete_checkpoints_aside(folder: Path) -> None:
    """Renames checkpoints whose last file was never written, so that none is resumed from.

    Removes what a kill left of a student that was being written: safetensors' own partial file.
    """
    for left in folder.glob(".tmp??????"):
        left.unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            aside = checkpoint.with_name(f"incomplete-{checkpoint.name}")
            suffix = 1
            while aside.exists():
                suffix += 1
                aside = checkpoint.with_name(f"incomplete-{checkpoint.name}.{suffix}")
            checkpoint.rename(aside)
