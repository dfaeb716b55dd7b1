"""The student of a run, ready to be used: one folder with weights, tokenizer and model card.

Nothing of the distillation is in it: no projector, no teacher. A folder is written beside its
destination, read back in a process of its own, compared with the run's student, and renamed last.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dwakd_plugin.errors import UserError
from dwakd_plugin.export.card import model_card
from dwakd_plugin.export.new_process import NewProcess
from dwakd_plugin.export.run_student import (
    Student,
    base_name,
    find_student,
    load_student,
    load_tokenizer,
    stored_dtype,
)
from dwakd_plugin.export.verify import (
    MERGE_TOLERANCE,
    compare,
    logits_of,
    probe_ids,
    tolerance_of,
    verify_in,
)
from dwakd_plugin.io.files import explaining_writes
from dwakd_plugin.io.folders import new_folder
from dwakd_plugin.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dwakd_plugin.train.kept_logits import difference, read_logits

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

SPARE_BYTES = 64 * 2**20  # tokenizer, configs and card


def export(
    run: Path,
    dest: Path,
    *,
    base_model: str | None = None,
    keep_adapter: bool = False,
    dtype: str = "auto",
    shard_size: str = "5GB",
    trust_remote_code: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
    process: NewProcess | None = None,
) -> dict[str, Any]:
    """Writes the student of `run`, a run or checkpoint folder, to `dest`; returns a report.

    LoRA is merged unless `keep_adapter`; `dtype` auto keeps the precision that the weights have.
    `say` hears what is being done; `process` is to read it back, by default one that is started
    here. Raises UserError.
    """
    started = time.monotonic()
    student = find_student(run)
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", shard_size):
        raise UserError(f"--shard-size is `{shard_size}`; write it like 500MB or 5GB.")
    if keep_adapter and not student.is_adapter:
        raise UserError(f"{run} holds a whole model, no adapter to keep. Leave --keep-adapter out.")
    with ExitStack() as stack:
        process = process or stack.enter_context(NewProcess(lean=not trust_remote_code))
        partial = stack.enter_context(
            new_folder(dest, lambda dest: _check_destination(run, dest, force=force))
        )

        def writing() -> AbstractContextManager[None]:
            return explaining_writes(f"`{dest}`", "Nothing was left there.")

        say("Loading the student")
        tokenizer = load_tokenizer(student, base_model, trust_remote_code)
        model, stored = load_student(student, base_model, trust_remote_code)
        if keep_adapter:
            stored = stored_dtype(student.folder)
        precision = stored if dtype == "auto" else PRECISIONS[dtype]
        ids = probe_ids(tokenizer)
        reference = logits_of(model, ids)
        trained = _compared_with_training(model, student)
        _complete_generation_config(model.generation_config, tokenizer)
        if not keep_adapter:
            if student.is_adapter:
                say("Merging the adapter")
                model = _merged(model)
                compare("Merging", logits_of(model, ids), reference, MERGE_TOLERANCE)
            model.to(precision)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            _check_space(dest, parameters * precision.itemsize)
            say("Writing the model")
            with writing():
                model.save_pretrained(partial, max_shard_size=shard_size)
        else:
            say("Writing the adapter")
            with writing():
                parameters = _write_adapter(student, partial, base_model, precision)
        with writing():
            tokenizer.save_pretrained(partial)
            model.generation_config.save_pretrained(partial)
        del model
        kind = "adapter" if keep_adapter else "merged" if student.is_adapter else "full"
        say("Reading it back in a new process")
        check = verify_in(
            process,
            partial,
            tokenizer,
            ids,
            reference,
            tolerance_of(kind, stored, precision),
            trust_remote_code,
        )
        report = {
            "run": str(run),
            "destination": str(dest),
            "kind": kind,
            "dtype": str(precision).removeprefix("torch."),
            "parameters": parameters,
            "bytes": sum(file.stat().st_size for file in partial.rglob("*")),
            "weights": sorted(file.name for file in partial.glob("*.safetensors")),
            "verification": check,
            **trained,
        }
        card = model_card(student.record, student.log, report)
        with writing():
            (partial / "README.md").write_text(card, encoding="utf-8")
    return report | {"seconds": round(time.monotonic() - started, 1)}


def _compared_with_training(model: Any, student: Student) -> dict[str, Any]:
    """How far the student, loaded in float32, is from the one that was trained, for the report.

    Raises UserError where it is another one, and no quantisation of its base accounts for that.
    """
    kept = read_logits(student.folder)
    if kept is None:  # the run is of before they were kept, or was sharded
        return {}
    found = difference(model, kept)
    if not kept.is_quantised and not found.relative <= kept.tolerance(model):
        raise UserError(
            f"The student in `{student.folder}` is not the one that was trained: its logits differ "
            f"by {found.relative:.2g} of their size. "
            + (
                f"Its adapter belongs to another base model than `{base_name(student)}` is now; "
                "name that one with --base-model."
                if student.is_adapter
                else "Its weights were changed since."
            )
        )
    return {
        "trained": {
            "held": kept.held,
            "relative_logit_difference": found.relative,
            "bits_per_byte": found.trained_bits_per_byte,
            "exported_bits_per_byte": found.found_bits_per_byte,
        }
    }


def _merged(model: Any) -> Any:
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"The adapter cannot be merged: {error}") from error


def _write_adapter(
    student: Student, folder: Path, base_model: str | None, dtype: torch.dtype
) -> int:
    """The adapter in `dtype`, for the base model it belongs to; returns its parameters' number."""
    tensors = load_file(student.folder / ADAPTER_WEIGHTS)
    _check_space(folder, sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = json.loads((student.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = base_model or config["base_model_name_or_path"]
    # A relative folder would be looked for wherever the adapter is used.
    config["base_model_name_or_path"] = str(Path(base).resolve()) if Path(base).is_dir() else base
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def _complete_generation_config(config: Any, tokenizer: Any) -> None:
    """Generation ends where the tokenizer's text does, and pads as it does."""
    eos = config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:  # sampling settings beside `do_sample: false`, which would not be saved
        config.do_sample = True


def _check_destination(run: Path, dest: Path, *, force: bool) -> None:
    inside = run.resolve()
    if dest.resolve() in (inside, *inside.parents):
        raise UserError(f"`{dest}` is the run itself, or holds it. Give another destination.")
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return
    if not force:
        raise UserError(f"`{dest}` exists already. Give another destination, or --force.")
    if not any((dest / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise UserError(
            f"`{dest}` isn't a model, and --force only replaces models. Remove it first."
        )


def _check_space(dest: Path, size: int) -> None:
    parent = next(path for path in dest.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    needed = size + SPARE_BYTES
    if free < needed:
        raise UserError(
            f"The export needs {needed / 1e9:.2f} GB, and {parent} has {free / 1e9:.2f} GB left. "
            "Make room, give another destination, or choose --dtype bfloat16."
        )
