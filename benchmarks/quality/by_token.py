"""Which tokens a model is better at: those that both tokenizers cut off, others, and the ends."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.quality.materials import Materials, example
from benchmarks.quality.runs import read_rows
from dwakd_plugin.tokenizers.alignment import TokenAligner

Kinds = dict[str, list[float]]

ROWS = 100  # of dev: some thousand tokens


def figures(base: Materials, students: dict[str, Path], teachers: dict[str, Path]) -> Any:
    """Mean nats of the response tokens of dev's first ROWS rows by kind, for each model.

    Of all: `first` and `end`, the first token of a response and the one that ends it, and `all`. Of
    a student also `paired`, which the teacher cuts off as well, and `others`: not the end.
    """
    found = {
        name: _nats_by_kind(base, folder, None if name in teachers else base.teacher)
        for name, folder in {**students, **teachers}.items()
    }
    return {
        name: {kind: statistics.fmean(nats) for kind, nats in kinds.items()}
        for name, kinds in found.items()
    }


@torch.no_grad()
def _nats_by_kind(base: Materials, folder: Path, partner: Path | None) -> Kinds:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other = None if partner is None else AutoTokenizer.from_pretrained(partner)
    aligner = None if other is None else TokenAligner(tokenizer, other)
    kinds: Kinds = {"first": [], "end": [], "all": []}
    for row in read_rows(base, "dev")[:ROWS]:
        own = example(tokenizer, row)
        ids, labels = torch.tensor([own["input_ids"]]), torch.tensor(own["labels"][1:])
        logits = model(input_ids=ids).logits[0, :-1]
        nats = F.cross_entropy(logits, labels, reduction="none")[labels != -100].tolist()
        kinds["first"].append(nats[0])
        kinds["end"].append(nats[-1])
        kinds["all"] += nats
        if aligner is None:
            continue
        theirs = example(other, row)
        pairs = aligner.pairs(*own.values(), *theirs.values())
        paired = {i for i, _ in pairs}
        for i, value in enumerate(nats[:-1]):
            kinds.setdefault("paired" if i in paired else "others", []).append(value)
    return kinds
