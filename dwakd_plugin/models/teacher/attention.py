"""Which attention a teacher runs with: a decision from facts, and the finding of the facts."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
)

from dwakd_plugin.errors import UserError

HUB_KERNEL = "kernels-community/flash-attn2"
LARGEST_HEAD = 256  # features of an attention head, for flash attention 2 and 3


@dataclass(frozen=True)
class AttentionFacts:
    """What the choice depends on.

    capability: of an NVIDIA GPU, else None. dtype: of the weights, as `bfloat16`.
    flash, sdpa: whether the architecture has them. soft_capped: whether it caps the attention's
    scores, which sdpa leaves out without a word (Gemma 2). compatible: the only flash
    implementations that an architecture takes, where it is particular. installed: of
    flash_attention_2, flash_attention_3 and kernels, those that can be imported. hub_problem:
    why the hub's kernel can't be fetched, where that was tried. known: every name that
    transformers knows.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: str
    architecture: str
    head_size: int
    flash: bool
    sdpa: bool
    soft_capped: bool = False
    compatible: tuple[str, ...] | None = None
    installed: frozenset[str] = frozenset()
    hub_problem: str | None = None
    known: frozenset[str] = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3"})


def choose_attention(asked: str, facts: AttentionFacts) -> tuple[str, str]:
    """The implementation, and why.

    `asked` is a name of transformers' or a kernel on the hub (`owner/name`), which are taken as
    they are, or `auto`. Raises UserError where what was asked for cannot work.
    """
    if asked != "auto":
        problem = _problem(asked, facts)
        if problem is not None:
            reason, remedy = problem
            raise UserError(
                f"dwakd.teacher.attn_implementation: {asked} cannot be used: {reason}. {remedy}; "
                "or `auto`, which takes the fastest that works."
            )
        return asked, "the recipe's choice"
    reason = "the architecture has none"
    for candidate in facts.compatible or ("flash_attention_3", "flash_attention_2", HUB_KERNEL):
        problem = _problem(candidate, facts, only_itself=True)
        if problem is None:
            return candidate, "installed, and device, dtype and architecture can"
        reason = problem[0]
    if facts.soft_capped:
        return "eager", f"no flash attention: {reason}; sdpa leaves out its soft-capping"
    return "sdpa" if facts.sdpa else "eager", f"no flash attention: {reason}"


def _problem(
    name: str, facts: AttentionFacts, *, only_itself: bool = False
) -> tuple[str, str] | None:
    """Why an implementation cannot run, and the remedy; None where it can.

    transformers takes the hub's kernel where the package of flash_attention_2 or 3 is missing;
    `only_itself` leaves that out.
    """
    from_hub = "/" in name
    plain = "sdpa" if facts.sdpa else "eager"
    if not from_hub and name not in facts.known:
        nearest = difflib.get_close_matches(name, facts.known, n=1)
        return "transformers does not know it", f"Write {nearest[0] if nearest else plain}"
    if name == "sdpa" and not facts.sdpa:
        return f"{facts.architecture} has no sdpa attention", "Write eager"
    if not from_hub and not name.startswith("flash_attention"):
        return None
    if facts.device != "cuda":
        return f"it needs an NVIDIA GPU, and the teacher is on the {facts.device}", f"Write {plain}"
    if facts.dtype not in ("bfloat16", "float16"):
        return (
            f"it takes half precision only, and the teacher is held in {facts.dtype}",
            "Set dwakd.teacher.dtype: bfloat16",
        )
    if not facts.flash:
        return f"{facts.architecture} has no flash attention", f"Write {plain}"
    if facts.head_size > LARGEST_HEAD:
        return (
            f"it takes heads of {LARGEST_HEAD} features at most, and the teacher's have "
            f"{facts.head_size}",
            f"Write {plain}",
        )
    needed = (9, 0) if name == "flash_attention_3" else (8, 0)
    if facts.capability is not None and facts.capability < needed:
        return (
            f"it needs compute capability {needed[0]}.{needed[1]}, and the GPU has "
            f"{facts.capability[0]}.{facts.capability[1]}",
            f"Write {'flash_attention_2' if facts.capability >= (8, 0) else plain}",
        )
    if facts.compatible is not None and name not in facts.compatible:
        return (
            f"{facts.architecture} takes only {', '.join(facts.compatible)}",
            f"Write {facts.compatible[0]}",
        )
    if from_hub or (name not in facts.installed and "kernels" in facts.installed):
        if from_hub and "kernels" not in facts.installed:
            return "the package kernels is not installed", "Run `pip install kernels`"
        if not from_hub and only_itself:
            return f"the package of {name} is not installed", f"Write {plain}"
        return None if facts.hub_problem is None else (facts.hub_problem, f"Write {plain}")
    if name == "flash_attention_2" and name not in facts.installed:
        return "the package flash-attn is not installed", "Run `pip install flash-attn`"
    if name == "flash_attention_3" and name not in facts.installed:  # not on PyPI
        return "the package flash-attn-3 is not installed", "Write flash_attention_2"
    return None


def attention_facts(
    asked: str, model_config: Any, device: str, dtype: torch.dtype
) -> AttentionFacts:
    """Facts of this machine and of the architecture, without loading the model.

    The hub's kernel is fetched where it would be taken and everything else allows it.
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if isinstance(model, (list, tuple)):
        model = model[0]
    text = model_config.get_text_config()
    kind = torch.device(device).type
    installed = {
        name
        for name, there in (
            ("flash_attention_2", is_flash_attn_2_available()),
            ("flash_attention_3", is_flash_attn_3_available()),
            ("kernels", is_kernels_available()),
        )
        if there
    }
    compatible = getattr(model, "_compatible_flash_implementations", None)
    facts = AttentionFacts(
        device={"cpu": "CPU"}.get(kind, kind),
        capability=(
            torch.cuda.get_device_capability(device)
            if kind == "cuda" and torch.version.hip is None
            else None
        ),
        dtype=str(dtype).removeprefix("torch."),
        architecture="a model with code of its own" if model is None else model.__name__,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        # Of code that is not transformers' own, only transformers' loading can tell.
        flash=bool(getattr(model, "_supports_flash_attn", False))
        or (model is None and asked != "auto"),
        sdpa=bool(getattr(model, "_supports_sdpa", True)),
        soft_capped=bool(getattr(text, "attn_logit_softcapping", None)),
        compatible=None if compatible is None else tuple(compatible),
        installed=frozenset(installed),
        known=frozenset({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}),
    )
    hub = asked if "/" in asked else HUB_KERNEL
    wanted = asked == "auto" or asked == hub or asked.startswith("flash_attention")
    without = "flash_attention_2" not in installed and "flash_attention_3" not in installed
    if wanted and (without or asked == hub) and _problem(hub, facts) is None:
        facts = replace(facts, hub_problem=_hub_problem(hub))
    return facts


def _hub_problem(repository: str) -> str | None:
    """Fetches the kernel, as transformers will. Why it can't be fetched, or None."""
    from transformers.integrations.hub_kernels import load_and_register_attn_kernel

    try:
        load_and_register_attn_kernel(repository)
    except Exception as error:  # the network's, the hub's and the kernel's own
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"the kernel {repository} cannot be fetched from the hub ({first})"
    return None
