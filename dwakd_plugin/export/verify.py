"""An export read back: the same tokenizer, nothing of the distillation, the run's logits."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dwakd_plugin.errors import UserError
from dwakd_plugin.export.new_process import NewProcess
from dwakd_plugin.models.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_revision,
    fit_vocabulary,
)
from dwakd_plugin.tokenizers.loading import load_tokenizer

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


def probe_ids(tokenizer: Any) -> list[int]:
    return list(tokenizer(PROBE)["input_ids"])[:PROBE_TOKENS]


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    """The logits of one sequence, (tokens, vocabulary), in float32."""
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0].float()
    if not logits.isfinite().all():
        raise UserError("The student's logits are not finite. Export an earlier checkpoint.")
    return logits


def tolerance_of(kind: str, stored: torch.dtype, precision: torch.dtype) -> float:
    """How far an export's logits may be from the run's: not at all where no weight was rounded."""
    if kind == "merged":
        return max(MERGE_TOLERANCE, TOLERANCE[precision])
    return 0.0 if precision in (stored, torch.float32) else TOLERANCE[precision]


def compare(what: str, found: Tensor, reference: Tensor, tolerance: float) -> dict[str, float]:
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


def verify_in(
    process: NewProcess,
    folder: Path,
    tokenizer: Any,
    ids: list[int],
    reference: Tensor,
    tolerance: float,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Has the export read where nothing else is; returns what `compare` and generation say."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"logits": reference.contiguous()}, Path(scratch) / "reference.safetensors")
        return process.verify(
            {
                "folder": str(folder),
                "reference": str(Path(scratch) / "reference.safetensors"),
                "ids": ids,
                "chat_template": tokenizer.chat_template,
                "tolerance": tolerance,
                "trust_remote_code": trust_remote_code,
            }
        )


def _verify(request: dict[str, Any]) -> dict[str, Any]:
    """In the new process: tokenizer, tensors, logits and a greedy generation of the export."""
    folder, ids = Path(request["folder"]), request["ids"]
    options = {"trust_remote_code": request["trust_remote_code"]}
    tokenizer = load_tokenizer(folder, "The exported tokenizer", **options)
    if probe_ids(tokenizer) != ids or tokenizer.chat_template != request["chat_template"]:
        raise UserError("The exported tokenizer is not the run's.")
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            strangers = [name for name in stored.keys() if "dwakd" in name]  # noqa: SIM118
        if strangers:
            raise UserError(f"Projectors are in the export: {', '.join(strangers)}")
    if (folder / ADAPTER_CONFIG).is_file():
        from peft import PeftModel

        base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(
            base, revision=base_revision(folder), dtype=torch.float32, **options
        )
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
    found = compare("The export", logits_of(model, ids), reference, request["tolerance"])
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


def main() -> None:
    """In the new process: what is to be compared comes as JSON, and so does the outcome."""
    try:
        print(json.dumps(_verify(json.load(sys.stdin))))
    except UserError as problem:
        sys.exit(str(problem))
