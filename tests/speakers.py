"""A tiny teacher that answers in plain letters and comes to an end, as random weights never do."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def make_speaker(lab: Path, folder: Path, end: float = 0.15) -> Path:
    """The teacher of `lab`, rebuilt: tokens that are no letters are all but impossible.

    Its embeddings' first dimension is a large constant, which makes that of the head a bias; the
    others decide among the letters. `end` is the bias of its end of turn.
    """
    tokenizer = AutoTokenizer.from_pretrained(lab / "teacher")
    model = AutoModelForCausalLM.from_pretrained(lab / "teacher", dtype=torch.float32)
    texts = {index: tokenizer.decode([index]).strip() for index in tokenizer.get_vocab().values()}
    plain = [index for index, text in texts.items() if text.isalpha() and text.isascii()]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 30.0
        head = model.get_output_embeddings().weight
        head[:, 0] = -10.0
        head[plain, 0] = 0.0
        head[tokenizer.eos_token_id, 0] = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
