"""A student that several processes train: its weights whole, and the same projectors everywhere.

DDP and ZeRO-1/2 keep the student whole on every rank. FSDP2 and ZeRO-3 shard it, and then:

- Before it is wrapped, a rank may lack its weights: ZeRO-3 holds a piece of each on every rank, and
  FSDP's `cpu_ram_efficient_loading` loads them on the first alone.
- The loss reads head and embeddings outside their own modules. FSDP2 gathers them with the root's
  parameters, to which they belong where it wraps decoder layers; ZeRO-3 is told to do the same.
- FSDP2 cannot mix dtypes in a unit, so the projectors are units of their own, in float32. DeepSpeed
  trains them in its own dtype, over float32 masters.

The teacher is whole on every rank, or read from a cache (see `teacher.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.causal_lm import embedding_table, output_head
from dwakd_plugin.models.projectors import Projector, Projectors


def is_sharded(trainer: Any) -> bool:
    """Whether the engine splits the student's weights over the ranks."""
    if trainer.is_deepspeed_enabled:
        return bool(trainer.accelerator.state.deepspeed_plugin.zero_stage == 3)
    return bool(trainer.is_fsdp_enabled)


def describe_processes(trainer: Any) -> str:
    """How many there are and what keeps the student on them, for the log."""
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled:
        engine = f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}"
    elif trainer.is_fsdp_enabled:
        engine = f"FSDP{state.fsdp_plugin.fsdp_version}"
    elif state.num_processes > 1:
        engine = "DDP"
    else:
        return "1"
    kept = "sharded" if is_sharded(trainer) else "whole on each"
    return f"{state.num_processes}, {engine}: the student {kept}, the teacher whole on each"


def has_weights(trainer: Any) -> bool:
    """Whether this rank can read the student's weights before they are wrapped."""
    return not trainer.is_fsdp_enabled or trainer.args.process_index == 0


@contextlib.contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """While open, ZeRO-3's partitioned parameters are whole. All ranks must take part."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def tables(student: nn.Module) -> list[Tensor]:
    """What the loss reads of the student outside the modules it belongs to: head and embeddings."""
    head = student.get_output_embeddings()
    ends = (student.get_input_embeddings(), head)
    return list({id(p): p for module in ends if module for p in module.parameters()}.values())


def prepare_for_engine(trainer: Any, projectors: Projectors | None) -> None:
    """Fits student and projectors, attached to it, to the engine that is going to wrap them."""
    student = trainer.model
    if trainer.is_fsdp_enabled:
        # axolotl makes modules of the classes in this list units of their own, in float32.
        others = getattr(student, "_axolotl_fp32_norm_patterns", None) or []
        own = f"{Projector.__module__}.{Projector.__qualname__}"
        student._axolotl_fp32_norm_patterns = [*others, own]
    if trainer.is_deepspeed_enabled:
        plugin = trainer.accelerator.state.deepspeed_plugin
        if projectors is not None:
            projectors.to(plugin.hf_ds_config.dtype())
        if plugin.zero_stage == 3:
            import deepspeed

            for parameter in tables(student):
                deepspeed.zero.register_external_parameter(student, parameter)


def check_gathered(student: Any) -> None:
    """Raises UserError where FSDP2 wraps head or embeddings by themselves.

    To be called within the student's forward, where the root's own parameters are whole.
    """
    for name, weight in (
        ("head", output_head(student).weight),
        ("embeddings", embedding_table(student).weight),
    ):
        if isinstance(weight, DTensor):
            raise UserError(
                f"fsdp_config shards the student's {name} as a unit of its own, and the loss needs "
                "it beside the decoder's layers. Set `auto_wrap_policy: TRANSFORMER_BASED_WRAP` "
                "with the decoder layer's class alone as `transformer_layer_cls_to_wrap`."
            )


def from_first_rank(projectors: Projectors, *facts: Any) -> list[Any]:
    """Overwrites the projectors with the first rank's, and returns its facts. All ranks take part.

    Even where every rank computes them, another GPU may round otherwise.
    """
    with torch.no_grad():
        for parameter in projectors.parameters():
            parameter.copy_(broadcast(parameter.detach().clone()))
    return list(broadcast_object_list(list(facts)))


def gathered(projectors: Projectors) -> dict[str, Tensor]:
    """The projectors' tensors, whole, on the CPU. All ranks must take part."""
    with whole(projectors.parameters()):
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
            .detach()
            .to("cpu", copy=True)
            for name, tensor in projectors.state_dict().items()
        }
