"""A frozen teacher as a source of hidden states at response positions.

The states come from a loaded model or from a cache on disk; nothing behind `Teacher.states` knows
which. The teacher never trains, is never wrapped by accelerate and never saved.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, modeling_utils
from transformers.integrations import deepspeed

from dwakd_plugin.errors import UserError, first_line
from dwakd_plugin.loss import (
    ContinuationTable,
    Head,
    ResponseStates,
    SpellingTable,
    valid_positions,
)
from dwakd_plugin.models.batches import LIVE, known_and_read
from dwakd_plugin.models.causal_lm import (
    EmbeddingTable,
    causal_lm,
    check_logits,
    embedding_table,
    gather_positions,
    hidden_states,
    output_head,
    parameter_count,
    short_dtype,
    weights_dtype,
)
from dwakd_plugin.models.folder import ADAPTER_WEIGHTS, fit_vocabulary
from dwakd_plugin.models.out_of_memory import explain_out_of_memory
from dwakd_plugin.models.quantised_layers import expect_half_precision, keep_as_stored
from dwakd_plugin.models.teacher.attention import attention_facts, choose_attention
from dwakd_plugin.models.teacher.quantisation import (
    asked,
    check_device,
    check_head,
    check_packages,
    check_range,
    describe,
    own_quantisation,
    quantisation_config,
)
from dwakd_plugin.models.teacher.served import ServedTeacher
from dwakd_plugin.models.teacher.top_tokens import from_bits, top_of_states
from dwakd_plugin.recipe.schema import TeacherConfig


@dataclass
class Teacher:
    """A frozen teacher: embeddings and head always, its body only where states are computed.

    Embeddings and head are on the student's device; the body takes its tokens on `device`.
    """

    embeddings: EmbeddingTable
    head: Head
    model: PreTrainedModel | None
    parameters: int | None  # None: nobody says
    attention: str
    precision: str
    device: torch.device | None = None
    offload_folder: Any = None  # a temporary folder that goes when the teacher does
    token_map: Tensor | None = None  # (V,) where the loss matches by bytes: see ResponseStates
    continuations: ContinuationTable | None = None
    spellings: SpellingTable | None = None
    top_k: int | None = None  # what the loss gets of the probabilities, instead of the states
    served: ServedTeacher | None = None  # whose rows come as numbers that it was asked by

    @property
    def hidden_size(self) -> int:
        return self.embeddings.weight.shape[1]

    @torch.no_grad()
    def hidden(self, batch: dict[str, Any]) -> Tensor:
        """Final hidden states at response positions (B, T, D), for a collated batch.

        In the head's dtype, from the body or the cache; D is 0 where it has but probabilities.
        Raises UserError where memory runs out.
        """
        if "teacher_top" in batch:
            return self.head.weight.new_zeros(*batch["teacher_positions"].shape, 0)
        if LIVE in batch:
            return known_and_read(batch, self._read(batch[LIVE]))
        known = batch.get("teacher_hidden")
        return self._read(batch) if known is None else known.to(self.head.weight.dtype)

    def _read(self, batch: dict[str, Tensor]) -> Tensor:
        """The body's states at the response positions of a batch."""
        if self.model is None:
            raise RuntimeError("the teacher's body was released and the batch holds no states")
        positions = batch["teacher_positions"]
        inputs = {
            name: batch[f"teacher_{name}"].to(self.device)
            for name in ("input_ids", "attention_mask", "position_ids")
            if f"teacher_{name}" in batch
        }
        # In its own dtype, whatever the student's autocast is: a cache holds the same states.
        own = torch.autocast(inputs["input_ids"].device.type, enabled=False)
        with explain_out_of_memory("the teacher's forward"), own:
            states = hidden_states(self.model, mask=inputs.pop("attention_mask", None), **inputs)
            states = gather_positions(states, positions.to(states.device))
        return states.to(positions.device, self.head.weight.dtype)

    @torch.no_grad()
    def states(self, batch: dict[str, Any]) -> ResponseStates:
        """What the loss needs of the teacher, for a collated batch on the teacher's device."""
        if self.served is not None:
            self.served.complete(batch)
        read = gather_positions(batch["teacher_input_ids"], batch["teacher_positions"])
        predicted = gather_positions(batch["teacher_input_ids"], batch["teacher_positions"] + 1)
        lengths, hidden = batch["teacher_lengths"], self.hidden(batch)
        top = None
        if "teacher_top" in batch:
            top = from_bits(batch["teacher_top"])
        elif self.top_k is not None:
            top = top_of_states(hidden, self.head, self.top_k)
        return ResponseStates(
            input_embeds=self.embeddings(read),
            target_embeds=self.embeddings(predicted),
            hidden=hidden,
            lengths=lengths,
            head=self.head,
            labels=predicted.where(valid_positions(lengths, predicted.shape[1]), -100),
            index=batch.get("teacher_index"),
            pairs=batch.get("teacher_pairs"),
            token_map=self.token_map,
            continuations=self.continuations,
            spelt=batch.get("teacher_spelt"),
            spellings=self.spellings,
            top=top,
        )


def load_teacher(config: TeacherConfig, device: str) -> Teacher:
    """Loads the teacher frozen, in eval mode; `device` is the student's, and the default.

    Raises UserError where the checkpoint, its quantisation, its attention or the memory for it
    cannot be had.
    """
    config.must_be_loaded("This")
    model_config = teacher_config(config)
    attention, why = check_teacher(config, device)
    own = teacher_device(config, device)
    dtype = teacher_dtype(config, model_config, own)
    quantised = own_quantisation(model_config) is not None or asked(config) is not None
    if quantised:
        expect_half_precision()
    quantisation = {}  # a None here would switch the checkpoint's own off
    if own_quantisation(model_config) is None and asked(config) is not None:
        quantisation["quantization_config"] = quantisation_config(config, dtype)
    folder = _OffloadFolder() if _is_spread(config) else None
    try:
        with explain_out_of_memory("loading the teacher"), _whole_on_every_rank():
            model = AutoModelForCausalLM.from_pretrained(
                config.base_model,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=dtype,
                attn_implementation=attention,
                **quantisation,
                **(_limits(config, own, folder.name) if folder else {"device_map": {"": own}}),
            )
            if config.adapter:
                from peft import PeftModel

                if (weights := Path(config.adapter) / ADAPTER_WEIGHTS).is_file():
                    fit_vocabulary(model, weights)  # as tokens may have been added to it
                model = PeftModel.from_pretrained(model, config.adapter)
                if model.active_peft_config.is_prompt_learning:
                    raise UserError(
                        f"The teacher's adapter {config.adapter} is learnt prompts "
                        f"({model.peft_type.value}), which stand before the tokens and aren't read "
                        "here. Give a LoRA, or a whole model."
                    )
                if not quantised:
                    model = model.merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # of a damaged file each library raises what it likes
        raise UserError(
            f"The teacher {config.base_model} cannot be loaded: {str(error).partition(chr(10))[0]}"
        ) from error
    keep_as_stored(model)
    model.eval().requires_grad_(False)
    _give_own_projections(model)
    lm = causal_lm(model)
    reads, writes = lm.get_input_embeddings(), lm.get_output_embeddings()
    # What is offloaded has no values but in these two blocks.
    with align_module_device(reads), align_module_device(writes):
        table, head = embedding_table(model), output_head(model)
    name = f"The teacher {config.base_model}"
    if not check_logits(model, name, head, _input_device(reads)):
        check_range(config, own_quantisation(model_config))
    check_head(config.base_model, head.weight, table.weight)
    if table.weight.device != torch.device(device):
        tied = head.weight is table.weight
        table = replace(table, weight=table.weight.to(device))
        head = replace(head, weight=table.weight if tied else head.weight.to(device))
    return Teacher(
        embeddings=table,
        head=head,
        model=model,
        parameters=parameter_count(lm),
        attention=f"{attention} ({why})",
        precision=_description(config, model_config, own, lm, head),
        device=_input_device(reads),
        offload_folder=folder,
        top_k=config.top_k,
    )


def check_teacher(config: TeacherConfig, device: str) -> tuple[str, str]:
    """The teacher's attention and why; raises UserError where it cannot be loaded as asked.

    Looks at its config, at the packages that are installed and at the device, and loads no weights.
    """
    model_config = teacher_config(config)
    own = teacher_device(config, device)
    quantisation = own_quantisation(model_config)
    check_packages(config, quantisation)
    kind = torch.device(own).type
    if kind == "cuda":
        count = torch.cuda.device_count()
        if (torch.device(own).index or 0) >= count:
            raise UserError(
                f"dwakd.teacher.device: {config.device}, and this machine has {count or 'no'} "
                "GPU" + ("" if count == 1 else "s") + ". Leave it out for the student's device."
            )
    if quantisation is None and asked(config) is not None:
        import bitsandbytes

        capability = torch.cuda.get_device_capability(own) if kind == "cuda" else None
        check_device(config, kind, capability, set(bitsandbytes.supported_torch_devices))
    dtype = teacher_dtype(config, model_config, own)
    facts = attention_facts(config.attn_implementation, model_config, own, dtype)
    return choose_attention(config.attn_implementation, facts)


def teacher_config(config: TeacherConfig) -> Any:
    """The teacher's transformers config. Raises UserError where there is none."""
    try:
        return AutoConfig.from_pretrained(
            config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"The teacher `{config.base_model}` cannot be found: {first_line(error)}\n"
            "dwakd.teacher.base_model takes a folder with a config.json, or a hub id."
        ) from error


def teacher_device(config: TeacherConfig, device: str) -> str:
    """Where the teacher computes: the recipe's device, else the student's, `device`.

    Of a teacher that is spread over several, the first GPU of them.
    """
    if isinstance(config.device, dict):
        return min((name for name in config.device if name != "cpu"), default="cpu")
    return device if config.device in (None, "offload") else config.device


def teacher_dtype(config: TeacherConfig, model_config: Any, device: str) -> torch.dtype:
    """The dtype of the teacher's unquantised weights on a device."""
    return weights_dtype(config.dtype, model_config, device)


def precision_name(config: TeacherConfig, model_config: Any, device: str) -> str:
    """What decides the states' values beside the weights: the quantisation, or the dtype."""
    own = own_quantisation(model_config)
    dtype = short_dtype(teacher_dtype(config, model_config, device))
    if own is not None:
        return f"{describe(own)}, {dtype}"
    names = {
        "load_in_8bit": "8 bit, "
        + ("" if config.int8_threshold is None else f"threshold {config.int8_threshold:g}, ")
        + dtype,
        "load_in_4bit": f"4 bit (nf4), {dtype}",
        None: dtype,
    }
    return names[asked(config)]


def _description(
    config: TeacherConfig, model_config: Any, device: str, lm: PreTrainedModel, head: Head
) -> str:
    """How the teacher is held, for the log."""
    words = [precision_name(config, model_config, device)]
    own = own_quantisation(model_config)
    if own is not None:
        ignored = asked(config)
        words[0] += " (the checkpoint's own" + (f"; {ignored} left out)" if ignored else ")")
    if own is not None or asked(config):
        words.append(f"head and embeddings in {short_dtype(head.weight.dtype)}")
    if config.adapter:
        quantised = own is not None or asked(config)
        words.append(f"adapter {config.adapter} {'attached' if quantised else 'merged'}")
    if _is_spread(config):
        counts: dict[str, int] = {}
        for place in getattr(lm, "hf_device_map", {"": device}).values():
            name = f"cuda:{place}" if isinstance(place, int) else str(place)
            counts[name] = counts.get(name, 0) + 1
        words.append("modules on " + ", ".join(f"{name}: {n}" for name, n in counts.items()))
    elif config.device is not None:
        words.append(f"on {device}")
    return ", ".join(words)


def _is_spread(config: TeacherConfig) -> bool:
    return isinstance(config.device, dict) or config.device == "offload"


class _OffloadFolder(tempfile.TemporaryDirectory):
    """Where layers go that fit neither GPU nor CPU; in TMPDIR, as large as they are."""

    def __init__(self) -> None:
        super().__init__(prefix="dwakd-teacher-", ignore_cleanup_errors=True)


def _limits(config: TeacherConfig, device: str, folder: str) -> dict[str, Any]:
    """How accelerate spreads the layers: first to the GPUs, then the CPU, then disk."""
    limits: dict[int | str, int | str]
    if isinstance(config.device, dict):
        limits = {
            name if name == "cpu" else int(name.partition(":")[2]): limit
            for name, limit in config.device.items()
        }
    else:
        # The other half is the student's: its gradients, optimizer and activations are yet to come.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        limits = {"cpu": psutil.virtual_memory().available // (2 * processes)}
        if torch.device(device).type == "cuda":
            limits[torch.device(device).index or 0] = torch.cuda.mem_get_info(device)[0] // 2
    return {"device_map": "sequential", "max_memory": limits, "offload_folder": folder}


def _input_device(embeddings: torch.nn.Module) -> torch.device:
    """Where the body takes its tokens; what is offloaded is on no device until it computes."""
    hook = getattr(embeddings, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return embeddings.weight.device if execution is None else torch.device(execution)


def _give_own_projections(model: torch.nn.Module) -> None:
    """Lets the teacher compute where axolotl's LoRA kernels have rewritten its architecture.

    They rewrite the attention of the student's class to call `apply_qkv` and `apply_o`, which the
    student's layers alone are given; a teacher of the same class shares the rewritten forward.
    """
    for module in model.modules():
        if hasattr(type(module), "_original_forward") and not hasattr(module, "apply_qkv"):
            module.apply_qkv = lambda x, m=module: (m.q_proj(x), m.k_proj(x), m.v_proj(x))
            module.apply_o = lambda x, m=module: m.o_proj(x)


@contextlib.contextmanager
def _whole_on_every_rank() -> Iterator[None]:
    """Keeps `from_pretrained` from treating the teacher as it treats the student.

    FSDP's variable makes it zero-fill weights on other ranks. Under ZeRO-3 it partitions them: it
    asks a function that looks at the config to which transformers holds a weak reference, and that
    axolotl replaces by one that always says yes.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    value = os.environ.pop(name, None)
    reference = deepspeed._hf_deepspeed_config_weak_ref
    zero_config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    places = (deepspeed, modeling_utils)
    asked_of = [place.is_deepspeed_zero3_enabled for place in places]
    for place in places:
        place.is_deepspeed_zero3_enabled = lambda: False
    try:
        yield
    finally:
        for place, function in zip(places, asked_of, strict=True):
            place.is_deepspeed_zero3_enabled = function
        if value is not None:
            os.environ[name] = value
        if zero_config is not None:
            deepspeed.set_hf_deepspeed_config(zero_config)
