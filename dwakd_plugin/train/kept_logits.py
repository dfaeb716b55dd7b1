"""A few logits of the student as it was trained, kept beside its weights.

What is loaded from a run later is compared with them: a LoRA on another base than the one that was
trained, or merged into weights that were quantised in training, gives other logits without a word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import replace_file
from dwakd_plugin.models.quantised_layers import bits_of_layers

LOGITS_FILE = Path("dwakd") / "logits.safetensors"  # within a run's or a checkpoint's folder
# Rows, and tokens of each; logits of the first row's last positions.
ROWS, TOKENS, POSITIONS = 8, 256, 8

# RMS of a difference over RMS of the centred logits, for one student twice: kernels and devices add
# in other orders, and 16 bits round every activation.
EXACT, ROUNDED = 1e-3, 0.15


@dataclass(frozen=True)
class KeptLogits:
    """What the student said of `ids`: `logits` (positions, V) and nats of the labels, in sum.

    `held` is how training held the student: `float32`, `bfloat16`, `4 bit`, `8 bit`, ...
    """

    ids: list[list[int]]
    labels: list[list[int]]
    logits: Tensor
    nats: float
    utf8_bytes: int
    held: str
    device: str

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.utf8_bytes

    @property
    def is_quantised(self) -> bool:
        return self.held.endswith("bit")

    def tolerance(self, model: Any) -> float:
        """How far a model may be from the student, if it is the same."""
        here = next(model.parameters()).device.type
        exact = (self.held, self.device, here) == ("float32", "cpu", "cpu")
        return EXACT if exact else ROUNDED


@dataclass(frozen=True)
class Difference:
    """How far a student is from the one whose logits were kept."""

    relative: float
    trained_bits_per_byte: float
    found_bits_per_byte: float


def held_as(model: Any, *, autocast: str | None) -> str:
    """How a model computes, in a word: its quantisation, else its dtype or that of autocast."""
    bits = bits_of_layers(model)
    if bits is not None:
        return f"{bits} bit"
    return autocast or str(next(model.parameters()).dtype).removeprefix("torch.")


def keep_logits(
    model: Any,
    rows: Iterable[dict[str, Any]],
    decode: Callable[[list[int]], str],
    folder: Path,
    held: str,
) -> None:
    """Writes what the student says of the first rows below `folder`."""
    ids, labels = [], []
    for row in rows:
        own = list(row["labels"])[:TOKENS]
        if any(label != -100 for label in own[1:]):
            ids.append(list(row["input_ids"])[:TOKENS])
            labels.append(own)
        if len(ids) == ROWS:
            break
    if not ids:
        return
    logits, nats = _said(model, ids, labels)
    texts = [decode([label for label in own if label != -100]) for own in labels]
    facts = {
        "ids": ids,
        "labels": labels,
        "nats": nats,
        "utf8_bytes": max(1, sum(len(text.encode()) for text in texts)),
        "held": held,
        "device": next(model.parameters()).device.type,
    }
    file = folder / LOGITS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save({"logits": logits.cpu()}, {"facts": json.dumps(facts)}))


def read_logits(folder: Path) -> KeptLogits | None:
    """What was kept in a folder; None where nothing was. Raises UserError where it is damaged."""
    file = folder / LOGITS_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            facts = json.loads((stored.metadata() or {})["facts"])
            return KeptLogits(logits=stored.get_tensor("logits"), **facts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}). Remove it to go on without it.") from error


def difference(model: Any, kept: KeptLogits) -> Difference:
    """How far a model, in whatever precision it is, is from the student that was trained."""
    logits, nats = _said(model, kept.ids, kept.labels)
    reference = kept.logits
    width = min(reference.shape[-1], logits.shape[-1])  # an export may have a padded head
    logits, reference = logits.cpu()[:, :width], reference[:, :width]
    scale = (reference - reference.mean(-1, keepdim=True)).norm().clamp(min=1e-12)
    relative = ((logits - reference).norm() / scale).item()
    bits = nats / math.log(2) / kept.utf8_bytes
    return Difference(relative, kept.bits_per_byte, bits)


def check_resumed(model: Any, checkpoint: Path, held: str) -> None:
    """Raises UserError where the student that a checkpoint gave is not the one it was made of."""
    kept = read_logits(checkpoint)
    if kept is None or kept.held != held:  # in another precision it is another student, knowingly
        return
    found = difference(model, kept)
    if found.relative > kept.tolerance(model):
        raise UserError(
            f"The student that {checkpoint} gives is not the one that was trained: its logits "
            f"differ by {found.relative:.2g} of their size. Has its base model changed since? A "
            "checkpoint of the same run that was made with it can be resumed."
        )


@torch.no_grad()
def _said(model: Any, ids: list[list[int]], labels: list[list[int]]) -> tuple[Tensor, float]:
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    nats, kept = 0.0, None
    try:
        for row, own in zip(ids, labels, strict=True):
            logits = model(input_ids=torch.tensor([row], device=device)).logits[0].float()
            targets = torch.tensor(own, device=device)[1:]
            nats += F.cross_entropy(logits[:-1], targets, reduction="sum").item()
            kept = logits[-POSITIONS:].clone() if kept is None else kept
    finally:
        model.train(was_training)
    assert kept is not None
    return kept, nats
