"""A model to evaluate: where it lies, its tokenizer, and its weights as they are asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from dwakd_plugin.errors import UserError, first_line
from dwakd_plugin.io.files import user_path
from dwakd_plugin.models.causal_lm import causal_lm, short_dtype, weights_dtype
from dwakd_plugin.models.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_revision,
    fingerprint_of_folder,
    fit_vocabulary,
)
from dwakd_plugin.models.quantised_layers import expect_half_precision, keep_as_stored
from dwakd_plugin.recipe.places import model_remedy
from dwakd_plugin.train.run_folder import RUN_FILE, read_run_file

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Source:
    """Where a model is: `weights` and `tokenizer` are folders or hub ids."""

    name: str  # as it was given
    weights: str  # of an adapter: its base model's
    adapter: Path | None
    tokenizer: str


@dataclass(frozen=True)
class Held:
    """How models are held: `device` and `dtype` as torch names them, or auto."""

    device: str = "auto"
    dtype: str = "auto"
    load_in_8bit: bool = False
    trust_remote_code: bool = False


def find_model(name: str) -> Source:
    """A folder (model, adapter, a run's output, a checkpoint) or a hub id.

    Raises UserError where there is no whole model, or no tokenizer beside it.
    """
    folder = user_path(name)
    if not folder.is_dir():
        if (remedy := model_remedy(str(folder), is_adapter=False)) is not None:
            raise UserError(f"The model `{name}` cannot be loaded: {remedy}.")
        return Source(name, name, None, name)
    adapter = folder / ADAPTER_CONFIG
    if adapter.is_file():
        try:
            settings = json.loads(adapter.read_text(encoding="utf-8"))
            weights = str(settings["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{adapter} is damaged ({error}).") from error
        if (remedy := model_remedy(weights, is_adapter=False)) is not None:
            raise UserError(
                f"The adapter in `{name}` belongs to the model `{weights}`: {remedy}. Export it "
                f"first (`dwakd export {name} DEST --base-model FOLDER`) and evaluate DEST."
            )
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"The adapter in `{name}` is incomplete: no {ADAPTER_WEIGHTS}.")
    elif (folder / "config.json").is_file():
        weights = str(folder)
        if not any(folder.glob("*.safetensors")):
            found = "pickled weights, which are not read" if any(folder.glob("*.bin")) else "none"
            raise UserError(f"`{name}` has no weights in *.safetensors (it has {found}).")
    else:
        states = sorted(folder.glob("checkpoint-*/trainer_state.json"))
        last = max((s.parent for s in states), key=lambda p: int(p.name[11:]), default=None)
        raise UserError(
            f"`{name}` holds neither a model (config.json) nor an adapter ({ADAPTER_CONFIG})."
            + (f" Its last checkpoint is {last}." if last is not None else "")
        )
    for place in _run_folders(folder):
        if any((place / file).is_file() for file in _TOKENIZER_FILES):
            return Source(name, weights, folder if adapter.is_file() else None, str(place))
    if adapter.is_file():
        return Source(name, weights, folder, weights)
    raise UserError(
        f"`{name}` has no tokenizer (no {' or '.join(_TOKENIZER_FILES[:2])}). Copy the files that "
        "`tokenizer.save_pretrained` wrote into it."
    )


def _run_folders(folder: Path) -> list[Path]:
    """Where a run may have left what belongs to a model: of a checkpoint, the run's folder too."""
    folder = folder.absolute()
    return [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]


def run_record(source: Source) -> dict[str, Any]:
    """What the run says that wrote a model; {} where none did."""
    for folder in _run_folders(user_path(source.name)):
        record = read_run_file(folder / RUN_FILE)
        if record is not None:
            return record
    return {}


def load_config(source: Source, *, trust_remote_code: bool) -> Any:
    """The model's transformers config. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(
            source.weights,
            revision=base_revision(source.adapter),
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"The model `{source.weights}` cannot be found: {first_line(error)}"
        ) from error


def most_positions(config: Any) -> int | None:
    """How many tokens the model has positions for; None where it names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def identity(source: Source, config: Any, held: Held) -> dict[str, Any]:
    """What a model's outputs depend on beside their input: weights, tokenizer, precision.

    Folders count with their contents, hub ids with the commit that was downloaded.
    """

    def content(place: str) -> str:
        folder = user_path(place)
        if folder.is_dir():
            return fingerprint_of_folder(folder)
        return f"{place}@{getattr(config, '_commit_hash', None)}"

    device = choose_device(held.device)
    return {
        "weights": content(source.weights),
        "adapter": fingerprint_of_folder(source.adapter) if source.adapter else None,
        "tokenizer": content(source.tokenizer),
        "precision": "8 bit"
        if held.load_in_8bit
        else short_dtype(weights_dtype(held.dtype, config, device)),
    }


def choose_device(device: str) -> str:
    """`auto` is the first GPU, else the CPU. Raises UserError for a device that is not here."""
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"--device {device}: {first_line(error)}") from error
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {device}, and this machine has {count or 'no'} such GPU.")
    return device


def load_model(source: Source, config: Any, held: Held) -> Any:
    """The model in eval mode, an adapter merged (attached, in 8 bit). Raises UserError."""
    device = choose_device(held.device)
    options: dict[str, Any] = {"trust_remote_code": held.trust_remote_code}
    if held.load_in_8bit:
        from transformers import BitsAndBytesConfig

        expect_half_precision()
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.weights,
            revision=base_revision(source.adapter),
            dtype=weights_dtype(held.dtype, config, device),
            device_map={"": device},
            output_loading_info=True,
            **options,
        )
        if info["missing_keys"]:
            raise UserError(
                f"`{source.weights}` is incomplete: weights are missing: "
                f"{', '.join(sorted(info['missing_keys'])[:4])}"
            )
        if source.adapter is not None:
            from peft import PeftModel

            fit_vocabulary(model, source.adapter / ADAPTER_WEIGHTS)
            model = PeftModel.from_pretrained(model, source.adapter)
            if not held.load_in_8bit:
                model = model.merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # of a damaged file each library raises what it likes
        raise UserError(
            f"The model `{source.name}` cannot be loaded: {first_line(error)}"
        ) from error
    keep_as_stored(model)
    lm = causal_lm(model)
    # Its own settings (a repetition penalty, a temperature) would slip into ours.
    lm.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval().requires_grad_(False)


def stop_ids(source: Source, tokenizer: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's end and those that the model's makers name."""
    ends = {int(tokenizer.eos_token_id)}
    try:
        revision = base_revision(source.adapter) or "main"
        config = GenerationConfig.from_pretrained(source.weights, revision=revision)
    except (OSError, ValueError):  # many models have none
        return sorted(ends)
    named = config.eos_token_id
    named = named if isinstance(named, list) else [] if named is None else [named]
    return sorted(ends | {int(index) for index in named})
