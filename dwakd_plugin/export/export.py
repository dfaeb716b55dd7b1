"""The student of a run, ready to be used: one folder with weights, tokenizer and model card.

Nothing of the distillation is in it: no projector, no teacher. A folder is written beside its
destination, read back in a process of its own, compared with the run's student, and renamed last.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dwakd_plugin.errors import UserError
from dwakd_plugin.export.card import model_card
from dwakd_plugin.io.files import is_full_disk
from dwakd_plugin.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, fit_vocabulary
from dwakd_plugin.models.projectors import PROJECTOR_FILE, read_projectors
from dwakd_plugin.train.run_folder import RUN_FILE, read_run_file

MODEL_WEIGHTS = "model.safetensors"
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Largest difference of logits that an export may have from the run's student, both computed in
# float32: RMS of the difference over RMS of the centred logits. Merging sums W + B A once instead
# of in every forward; 16 bits round each weight by up to 2^-9 (bfloat16) or 2^-12 (float16), which
# grows over the layers to a few parts in a hundred or in a thousand.
MERGE_TOLERANCE = 1e-3
TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 0.1, torch.float16: 0.01}

PROBE = (
    "The export is compared with the run on this text. Numbers: 3.14159, 2026; code: "
    "def add(a, b):\n    return a + b\nGrößte Brücke, naïve café, 数学, данные."
)
PROBE_TOKENS = 64
SPARE_BYTES = 64 * 2**20  # tokenizer, configs and card


@dataclass(frozen=True)
class Student:
    """Where a run's student is, and what is known of the run."""

    folder: Path
    is_adapter: bool
    record: dict[str, Any]  # of RUN_FILE
    log: list[dict[str, Any]]  # of trainer_state.json, empty where there is none


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
) -> dict[str, Any]:
    """Writes the student of `run`, a run or checkpoint folder, to `dest`; returns a report.

    LoRA is merged unless `keep_adapter`; `dtype` auto keeps the precision that the weights have.
    `say` hears what is being done. Raises UserError.
    """
    started = time.monotonic()
    student = find_student(run)
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", shard_size):
        raise UserError(f"--shard-size is `{shard_size}`; write it like 500MB or 5GB.")
    if keep_adapter and not student.is_adapter:
        raise UserError(f"{run} holds a whole model, no adapter to keep. Leave --keep-adapter out.")
    with _new_folder(run, dest, force=force) as partial:
        say("Loading the student")
        tokenizer = _tokenizer(student, base_model, trust_remote_code)
        model, stored = _load(student, base_model, trust_remote_code)
        if keep_adapter:
            stored = _stored_dtype(student.folder)
        precision = stored if dtype == "auto" else PRECISIONS[dtype]
        ids = _probe_ids(tokenizer)
        reference = _logits(model, ids)
        _complete_generation_config(model.generation_config, tokenizer)
        if not keep_adapter:
            if student.is_adapter:
                say("Merging the adapter")
                model = _merged(model)
                _compare("Merging", _logits(model, ids), reference, MERGE_TOLERANCE)
            model.to(precision)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            _check_space(dest, parameters * precision.itemsize)
            say("Writing the model")
            with _writing_to(dest):
                model.save_pretrained(partial, max_shard_size=shard_size)
        else:
            say("Writing the adapter")
            with _writing_to(dest):
                parameters = _write_adapter(student, partial, base_model, precision)
        with _writing_to(dest):
            tokenizer.save_pretrained(partial)
            model.generation_config.save_pretrained(partial)
        del model
        kind = "adapter" if keep_adapter else "merged" if student.is_adapter else "full"
        say("Reading it back in a new process")
        check = _verify_in_new_process(
            partial,
            tokenizer,
            ids,
            reference,
            _tolerance(kind, stored, precision),
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
        }
        card = model_card(student.record, student.log, report)
        with _writing_to(dest):
            (partial / "README.md").write_text(card, encoding="utf-8")
    return report | {"seconds": round(time.monotonic() - started, 1)}


# The run ------------------------------------------------------------------------------------


def find_student(run: Path) -> Student:
    """What a run or checkpoint folder holds. Raises UserError where that is no whole student."""
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
                f"`{run}` is no run: it holds neither a model nor dwakd/run.json. Give the "
                "output_dir of a run, or one of its checkpoints."
            )
        raise UserError(f"The run `{run}` holds no student yet: it was stopped before it saved.")
    if record is None:
        raise UserError(
            f"`{run}` holds a model and is no run of dwakd: neither it nor the folder above has "
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


# The models ---------------------------------------------------------------------------------


def _load(
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
        return model.eval(), _stored_dtype(student.folder)
    from peft import PeftModel

    base = base_model or _base_name(student)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The adapter in `{student.folder}` belongs to the model `{base}`, which is not there "
            f"({str(error).splitlines()[0]}). Name it with --base-model: a folder or a hub id."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"The adapter's base model `{base}` is stored quantised, and merging needs whole "
            "weights. Name an unquantised one with --base-model."
        )
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    fit_vocabulary(model, student.folder / ADAPTER_WEIGHTS)
    try:
        model = PeftModel.from_pretrained(model, student.folder)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The adapter in `{student.folder}` does not fit its base model `{base}`: {error}"
        ) from error
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return model.float().eval(), stored


def _base_name(student: Student) -> str:
    file = student.folder / ADAPTER_CONFIG
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}).") from error


def _stored_dtype(folder: Path) -> torch.dtype:
    """The narrowest dtype that holds all stored weights."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            found |= {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    sixteen = {"BF16": torch.bfloat16, "F16": torch.float16}
    return sixteen.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


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


def _tokenizer(student: Student, base_model: str | None, trust_remote_code: bool) -> Any:
    """The run's tokenizer: of the folder, of the one above, or the base model's."""
    folders = [student.folder, student.folder.absolute().parent]
    sources = [str(f) for f in folders if (f / "tokenizer_config.json").is_file()]
    if not sources:
        identity = student.record.get("identity", {})
        sources = [base_model or str(identity.get("student", student.folder))]
    try:
        return AutoTokenizer.from_pretrained(sources[0], trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"No tokenizer in `{student.folder}` or `{sources[0]}`: {error}") from error


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


# The folder ---------------------------------------------------------------------------------


@contextmanager
def _new_folder(run: Path, dest: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside `dest` that becomes it when the block ends well, and vanishes otherwise.

    What a killed export left there is removed first. Raises UserError where `dest` is in use.
    """
    target = dest.absolute()
    if _old(target).exists() and not target.exists():
        _old(target).rename(target)  # killed between the two renames that replace a model
    _check_destination(run, dest, force=force)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"`{dest}` cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another export to `{dest}` is running.") from None
        try:
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            with _writing_to(dest):
                for path in (*partial.rglob("*"), partial):
                    path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0o600
                    _sync(path)
                _put_in_place(partial, target)
                _sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


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
            f"`{dest}` is no model, and --force replaces models alone. Remove it first."
        )


def _put_in_place(partial: Path, target: Path) -> None:
    old = _old(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    """Where a model is put while another takes its place."""
    return target.with_name(f".{target.name}.old")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _writing_to(dest: Path) -> Iterator[None]:
    """Explains a disk that fills up, or files that cannot be written."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises a bare one of a full disk
        if not isinstance(error, OSError | SafetensorError) and not is_full_disk(error):
            raise
        raise UserError(f"`{dest}` cannot be written: {error}. Nothing was left there.") from error


def _check_space(dest: Path, size: int) -> None:
    parent = next(path for path in dest.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    needed = size + SPARE_BYTES
    if free < needed:
        raise UserError(
            f"The export needs {needed / 1e9:.2f} GB, and {parent} has {free / 1e9:.2f} GB left. "
            "Make room, give another destination, or choose --dtype bfloat16."
        )


# The comparison -----------------------------------------------------------------------------


def _probe_ids(tokenizer: Any) -> list[int]:
    return list(tokenizer(PROBE)["input_ids"])[:PROBE_TOKENS]


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> Tensor:
    """The logits of one sequence, (tokens, vocabulary), in float32."""
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0].float()
    if not logits.isfinite().all():
        raise UserError("The student's logits are not finite. Export an earlier checkpoint.")
    return logits


def _tolerance(kind: str, stored: torch.dtype, precision: torch.dtype) -> float:
    """How far an export's logits may be from the run's: not at all where no weight was rounded."""
    if kind == "merged":
        return max(MERGE_TOLERANCE, TOLERANCE[precision])
    return 0.0 if precision in (stored, torch.float32) else TOLERANCE[precision]


def _compare(what: str, found: Tensor, reference: Tensor, tolerance: float) -> dict[str, float]:
    """Raises UserError where two students' logits differ by more than the tolerance, relatively."""
    difference = found - reference
    scale = (reference - reference.mean(-1, keepdim=True)).norm().clamp(min=1e-12)
    relative = (difference.norm() / scale).item()
    if not relative <= tolerance:
        raise UserError(
            f"{what} changed the student: its logits differ by {relative:.2g} of their size, and "
            f"{tolerance:g} is allowed. Nothing was exported; try --dtype float32."
        )
    return {
        "relative_logit_difference": relative,
        "max_logit_difference": difference.abs().max().item(),
        "tolerance": tolerance,
    }


def _verify_in_new_process(
    folder: Path,
    tokenizer: Any,
    ids: list[int],
    reference: Tensor,
    tolerance: float,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Loads the export where nothing else is loaded; returns what `_compare` and generation say."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"logits": reference.contiguous()}, Path(scratch) / "reference.safetensors")
        request = {
            "folder": str(folder),
            "reference": str(Path(scratch) / "reference.safetensors"),
            "ids": ids,
            "chat_template": tokenizer.chat_template,
            "tolerance": tolerance,
            "trust_remote_code": trust_remote_code,
        }
        result = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-m", "dwakd_plugin.export.export"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        end = "\n".join(f"  {line}" for line in result.stderr.strip().splitlines()[-8:])
        raise UserError(f"The export cannot be used, and was not kept:\n{end}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _verify(request: dict[str, Any]) -> dict[str, Any]:
    """In the new process: tokenizer, tensors, logits and a greedy generation of the export."""
    folder, ids = Path(request["folder"]), request["ids"]
    options = {"trust_remote_code": request["trust_remote_code"]}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if _probe_ids(tokenizer) != ids or tokenizer.chat_template != request["chat_template"]:
        raise UserError("The exported tokenizer is not the run's.")
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            strangers = [name for name in stored.keys() if "dwakd" in name]  # noqa: SIM118
        if strangers:
            raise UserError(f"Projectors are in the export: {', '.join(strangers)}")
    if (folder / ADAPTER_CONFIG).is_file():
        from peft import PeftModel

        base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
        fit_vocabulary(model, folder / ADAPTER_WEIGHTS)
        model = PeftModel.from_pretrained(model, folder).float()
    else:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
        odd = {key: sorted(names) for key, names in info.items() if names}
        if odd:
            raise UserError(f"The exported weights are not the model's: {odd}")
    model.eval()
    reference = load_file(request["reference"])["logits"]
    found = _compare("The export", _logits(model, ids), reference, request["tolerance"])
    generated = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {
        **found,
        "tokens_compared": len(ids),
        "tokens_generated": generated.shape[1] - len(ids),
    }


# The hub ------------------------------------------------------------------------------------


def check_push(repo: str, run: Path, *, keep_adapter: bool, base_model: str | None) -> None:
    """Raises UserError where an upload could not work, before anything is done."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub takes OWNER/NAME: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub needs the hub, and HF_HUB_OFFLINE is set. Unset it.")
    if get_token() is None:
        raise UserError(
            "--push-to-hub needs a token. Log in with `hf auth login`, or set HF_TOKEN."
        )
    if keep_adapter:
        student = find_student(run)
        base = base_model or (_base_name(student) if student.is_adapter else "")
        if Path(base).is_dir():
            raise UserError(
                f"The adapter's base model is the local folder `{base}`, which nobody else has. "
                "Leave --keep-adapter out to push the merged model."
            )


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads an export and returns its address. Raises UserError; `folder` is whole then."""
    from httpx import HTTPError
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export with dwakd")
    except (OSError, HTTPError, ValueError) as error:
        raise UserError(
            f"The export is whole in `{folder}`, and could not be uploaded: {error}\n"
            f"Try again with `hf upload {repo} {folder}`."
        ) from error
    return str(address)


if __name__ == "__main__":
    try:
        print(json.dumps(_verify(json.load(sys.stdin))))
    except UserError as problem:
        sys.exit(str(problem))
