"""A small untrained student, whose embeddings may know the language from a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwakd_plugin.io.folders import new_folder
from dwakd_plugin.tokenizers.loading import load_tokenizer
from dwakd_plugin.tokenizers.pair import vocabulary_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


EMBEDDING_STD = 0.04  # of the compressed rows: what two passes of pretraining arrive at


def create_student(
    dest: Path,
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int,
    seed: int,
    teacher: Path | None = None,
) -> Path:
    """Save an untrained Llama with tied embeddings and 512 positions, and its tokenizer.

    With a `teacher` folder, the embeddings start as the teacher's, compressed to `hidden_size`: a
    real student's embeddings know the language, and so do these.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    if teacher is not None:
        _compress_embeddings(model.model.embed_tokens.weight, tokenizer, teacher)
    with new_folder(dest) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return dest


def _compress_embeddings(weight: Any, tokenizer: PreTrainedTokenizerFast, teacher: Path) -> None:
    """Set `weight` (V, d) to the teacher's rows of the same texts, on their d principal axes.

    A token that the teacher lacks gets the mean of the tokens that the teacher writes it with.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    theirs = AutoModelForCausalLM.from_pretrained(teacher, **options)
    rows = theirs.get_input_embeddings().weight.detach().double()
    teacher_tokenizer = load_tokenizer(teacher, f"The tokenizer of `{teacher}`")
    known = vocabulary_bytes(teacher_tokenizer)
    spelled: dict[int, list[int]] = {}
    for piece, index in vocabulary_bytes(tokenizer).items():
        text = piece.decode("utf-8", errors="ignore")
        ids = [known[piece]] if piece in known else teacher_tokenizer(text)["input_ids"]
        if ids:
            spelled[index] = ids
    means = torch.stack([rows[ids].mean(0) for ids in spelled.values()])
    axes = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[: weight.shape[1]]
    compressed = (means - means.mean(0)) @ axes.T
    with torch.no_grad():
        scale = EMBEDDING_STD / compressed.std()
        weight[list(spelled)] = (compressed * scale).to(weight)
