"""Running out of memory, said in words: which part of a run it was, and what makes it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from dwakd_plugin.errors import UserError

Part = Literal[
    "loading the teacher",
    "the teacher's forward",
    "the student's step",
    "sampling the student's own answers",
]

# The three that help most, best first.
_REMEDIES: dict[Part, tuple[str, str, str]] = {
    "loading the teacher": (
        "run `dwakd cache RECIPE` first, on a bigger machine if need be: training from the cache "
        "loads the teacher's head and embeddings only",
        "hold it in fewer bits: dwakd.teacher.load_in_4bit (or load_in_8bit)",
        "put it elsewhere: dwakd.teacher.device: cuda:1, cpu, or offload",
    ),
    "the teacher's forward": (
        "run `dwakd cache RECIPE` first (smaller --batch-tokens there, if it happens there)",
        "lower micro_batch_size, and raise gradient_accumulation_steps by as much",
        "shorten its rows: dwakd.teacher.sequence_len; or load_in_4bit, which leaves more room",
    ),
    "the student's step": (
        "lower micro_batch_size, and raise gradient_accumulation_steps by as much",
        "set gradient_checkpointing: true, or train a LoRA (adapter: lora)",
        "run `dwakd cache RECIPE` first: the teacher's body then takes no memory; a smaller "
        "dwakd.loss.chunk_size helps where a vocabulary is large",
    ),
    "sampling the student's own answers": (
        "lower dwakd.own_answers.max_new_tokens",
        "lower dwakd.own_answers.share, so that fewer rows are answered at once",
        "hold the teacher in fewer bits: dwakd.teacher.load_in_4bit (or load_in_8bit)",
    ),
}


@contextmanager
def explain_out_of_memory(part: Part) -> Iterator[None]:
    """Turns running out of a GPU's or the CPU's memory into UserError: the part, and remedies."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a type for a GPU's memory and none for the CPU's.
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        remedies = "\n".join(f"  {n}. {text}" for n, text in enumerate(_REMEDIES[part], start=1))
        raise UserError(
            f"Out of memory in {part}: {str(error).partition(chr(10))[0]}\n"
            f"What helps most:\n{remedies}\n`dwakd plan RECIPE` says what fits."
        ) from error
