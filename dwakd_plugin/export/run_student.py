"""The student that a run or checkpoint folder holds: found, checked, loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from dwakd_plugin.errors import UserError, first_line
from dwakd_plugin.models.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_revision,
    fit_vocabulary,
)
from dwakd_plugin.models.projectors import PROJECTOR_FILE, read_projectors
from dwakd_plugin.tokenizers import loading
from dwakd_plugin.train.run_folder import RUN_FILE, read_run_file

MODEL_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Student:
    """Where a run's student is, and what is known of the run."""

    folder: Path
    is_adapter: bool
    record: dict[str, Any]  # of RUN_FILE
    log: list[dict[str, Any]]  # of trainer_state.json, empty where there is none


def find_student(run: Path) -> Student:
    """What a run or checkpoint folder holds. Raises UserError without a whole student in it."""
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise UserError(
            f"The run `{run}` {what}. Give the output folder of a run, or a checkpoint."
        )
    record = _record(run)
    checkpoints = sorted(
        (path.parent for path in run.glob("checkpoint-*/trainer_state.json")),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    weights = [name for name in (ADAPTER_CONFIG, MODEL_WEIGHTS) if (run / name).is_file()]
    index = run / f"{MODEL_WEIGHTS}.index.json"
    if not weights and not index.is_file():
        if checkpoints:
            raise UserError(
                f"The run `{run}` did not reach its end and holds no student; its last whole "
                f"checkpoint does: {checkpoints[-1]}"
            )
        if list(run.glob("*.bin")):
            raise UserError(f"`{run}` holds pickled weights, which are not read: use safetensors.")
        if record is None:
            raise UserError(
                f"`{run}` isn't a run: it has neither a model nor dwakd/run.json. Give the "
                "output_dir of a run, or one of its checkpoints."
            )
        raise UserError(f"The run `{run}` holds no student yet: it was stopped before it saved.")
    if record is None:
        raise UserError(
            f"`{run}` holds a model that no run of dwakd wrote: neither it nor the one above has "
            f"{RUN_FILE} or {PROJECTOR_FILE}. There is nothing to export from it: use it as it is."
        )
    if run.name.startswith("checkpoint-") and not (run / "trainer_state.json").is_file():
        raise _incomplete(run, "trainer_state.json is missing")
    is_adapter = ADAPTER_CONFIG in weights
    _check_weights(run, is_adapter, index)
    state = run / "trainer_state.json"
    if not state.is_file() and checkpoints:
        state = checkpoints[-1] / "trainer_state.json"
    log = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.is_file() else []
    return Student(run, is_adapter, record, log)


def _record(run: Path) -> dict[str, Any] | None:
    """What the run says of itself; at least both models' names, from the projectors."""
    for folder in (run, run.absolute().parent):
        record = read_run_file(folder / RUN_FILE)
        if record is not None:
            return record
    if (run / PROJECTOR_FILE).is_file():
        return {"identity": read_projectors(run / PROJECTOR_FILE)[1]}
    return None


def _check_weights(run: Path, is_adapter: bool, index: Path) -> None:
    """Raises UserError where a file of weights is missing or cut off."""
    if is_adapter:
        names = {ADAPTER_WEIGHTS}
    elif index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            strangers = sorted(name for name in names if Path(name).name != name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _incomplete(run, f"{index.name} cannot be read") from error
        if strangers:
            raise _incomplete(run, f"{index.name} names {strangers[0]}, outside of the folder")
    else:
        names = {MODEL_WEIGHTS}
    for name in sorted(names):
        if not (run / name).is_file():
            raise _incomplete(run, f"{name} is missing")
        try:
            with safe_open(run / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise _incomplete(run, f"{name} cannot be read ({error})") from error


def _incomplete(run: Path, what: str) -> UserError:
    return UserError(f"`{run}` is incomplete: {what}. Export another checkpoint.")


def load_student(
    student: Student, base_model: str | None, trust_remote_code: bool
) -> tuple[Any, torch.dtype]:
    """The student in float32 on the CPU, its adapter attached, and the dtype it is stored in."""
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if not student.is_adapter:
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                student.folder, output_loading_info=True, **options
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"The student in `{student.folder}` cannot be loaded: {error}"
            ) from error
        if info["missing_keys"]:
            raise _incomplete(
                student.folder,
                f"weights are missing: {', '.join(sorted(info['missing_keys'])[:4])}",
            )
        return model.eval(), stored_dtype(student.folder)
    from peft import PeftModel

    base = base_model or base_name(student)
    revision = base_revision(student.folder) if base_model is None else None
    try:
        config = AutoConfig.from_pretrained(
            base, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"The adapter in `{student.folder}` belongs to the model `{base}`, which is not there "
            f"({first_line(error)}). Name it with --base-model: a folder or a hub id."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"The adapter's base model `{base}` is stored quantised, and merging needs whole "
            "weights. Name an unquantised one with --base-model."
        )
    model = AutoModelForCausalLM.from_pretrained(base, revision=revision, **options)
    fit_vocabulary(model, student.folder / ADAPTER_WEIGHTS)
    try:
        model = PeftModel.from_pretrained(model, student.folder)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The adapter in `{student.folder}` does not fit its base model `{base}`: {error}"
        ) from error
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return model.float().eval(), stored


def base_name(student: Student) -> str:
    file = student.folder / ADAPTER_CONFIG
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}).") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The narrowest dtype that holds all stored weights."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            found |= {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    sixteen = {"BF16": torch.bfloat16, "F16": torch.float16}
    return sixteen.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def load_tokenizer(student: Student, base_model: str | None, trust_remote_code: bool) -> Any:
    """The run's tokenizer: of the folder, of the one above, or the base model's."""
    folders = [student.folder, student.folder.absolute().parent]
    sources = [str(f) for f in folders if (f / "tokenizer_config.json").is_file()]
    if not sources:
        identity = student.record.get("identity", {})
        sources = [base_model or str(identity.get("student", student.folder))]
    return loading.load_tokenizer(
        sources[0],
        f"The tokenizer of `{student.folder}`, looked for in `{sources[0]}`,",
        "Copy the tokenizer's files into the run.",
        trust_remote_code=trust_remote_code,
    )
