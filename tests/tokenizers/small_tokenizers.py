"""Small tokenizers of each kind, trained here, and texts that are awkward to all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from dwakd_cli.sample_texts import SAMPLE

CORPUS = [text for group in SAMPLE.values() for text in group]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


def byte_level(size: int = 600, *, prefix: bool = False, normalizer: Any = None) -> Any:
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:8], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece(prepend: str = "always", *, legacy: bool = False, own_tokens: bool = True) -> Any:
    """BPE with byte fallback: Llama 2's way (`legacy`: as a normaliser), or Gemma's (`never`)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:8], trainer)
    description = json.loads(tokenizer.to_str())
    description["model"] |= {"byte_fallback": True, "fuse_unk": True}
    description["added_tokens"] = description["added_tokens"][:2]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    if legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    if own_tokens:  # as Gemma's runs of spaces and Phi-3's turn marks
        fast.add_tokens(
            [
                AddedToken("▁▁▁", normalized=False),
                AddedToken("<turn>", normalized=False, rstrip=True),
                AddedToken("<mask>", normalized=False, lstrip=True),
            ]
        )
    return fast


def unigram() -> Any:
    """T5's way: NFKC, white space is one space, no token for unseen characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:8], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


LOSSLESS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level, space before": lambda: byte_level(prefix=True),
    "SentencePiece, space before every run": sentencepiece,
    "SentencePiece, space before the text": lambda: sentencepiece("first"),
    "SentencePiece, no space before": lambda: sentencepiece("never"),
    "SentencePiece, as a normaliser": lambda: sentencepiece(legacy=True, own_tokens=False),
}
# Whatever Unicode has but surrogates, and what is awkward: markers, special tokens, white space.
AWKWARD = ["</s>", "<|end|>", "<turn>", "<mask>", "<0x0A>", "▁", "Ġ", " ", "  ", "\n", "\t", "1"]
TEXT = st.lists(
    st.one_of(st.sampled_from(AWKWARD), st.text(max_size=4), st.sampled_from(["the", "🎉", "é"])),
    max_size=8,
).map("".join)
