"""Tiny random models with the architectures that recipes name, and tokenizers of their kinds.

Everything is made from code. The tokenizers are trained on the tests' rows and do what their models
of origin do: what begins and ends a text, how spaces and unknown characters are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.chat_templates import get_chat_template
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.conftest import CHAT_TEMPLATE, ROWS

# ASCII alone: what else the rows hold must be spelt in bytes.
TEXTS = [
    f"{row['instruction']} {row['input']} {row['output']}".encode("ascii", "ignore").decode()
    for row in ROWS
]
WINDOW = 16  # of the sliding attentions; every row is longer
VOCABULARY = 360


# Tokenizers -------------------------------------------------------------------------------------


def byte_level(
    *, begins: str | None, ends: str, pad: str | None, others: tuple[str, ...] = (), digits: bool
) -> PreTrainedTokenizerFast:
    """As GPT-2, OPT, Llama 3, Qwen and SmolLM2 have it; `begins` is put before each text."""
    special = list(dict.fromkeys(token for token in (begins, ends, pad, *others) if token))
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _finished(tokenizer, begins, ends, pad, others)


def sentencepiece(
    *, begins: str, ends: str, pad: str | None, others: tuple[str, ...] = (), dummy_prefix: bool
) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have it: `▁` for spaces, and a token for each byte."""
    spaces = [normalizers.Prepend("▁")] if dummy_prefix else []
    normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    special = list(dict.fromkeys(token for token in ("<unk>", begins, ends, pad, *others) if token))
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if dummy_prefix else steps
    )
    tokenizer.add_special_tokens(special)
    return _finished(tokenizer, begins, ends, pad, others)


def _finished(
    tokenizer: Tokenizer, begins: str | None, ends: str, pad: str | None, others: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    if begins is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begins} $A", special_tokens=[(begins, tokenizer.token_to_id(begins))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begins,
        eos_token=ends,
        pad_token=pad,
        additional_special_tokens=list(others),
        clean_up_tokenization_spaces=False,
    )


def _gpt2() -> PreTrainedTokenizerFast:
    return byte_level(begins=None, ends="<|endoftext|>", pad=None, digits=False)


def _opt() -> PreTrainedTokenizerFast:
    return byte_level(begins="</s>", ends="</s>", pad="<pad>", digits=False)


def _llama2() -> PreTrainedTokenizerFast:
    return sentencepiece(begins="<s>", ends="</s>", pad=None, dummy_prefix=True)


def _mistral() -> PreTrainedTokenizerFast:
    tokenizer = _llama2()
    tokenizer.padding_side = "left"  # axolotl's choice for it, with flash attention
    return tokenizer


def _llama3() -> PreTrainedTokenizerFast:
    others = ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
    tokenizer = byte_level(
        begins="<|begin_of_text|>",
        ends="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        others=others,
        digits=False,
    )
    tokenizer.chat_template = get_chat_template("llama3")
    return tokenizer


def _qwen(ends: str, template: str) -> PreTrainedTokenizerFast:
    others = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer = byte_level(begins=None, ends=ends, pad="<|endoftext|>", others=others, digits=True)
    tokenizer.chat_template = template
    return tokenizer


def _smollm2() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(
        begins=None,
        ends="<|im_end|>",
        pad="<|im_end|>",  # the token that ends a turn pads, too
        others=("<|endoftext|>", "<|im_start|>"),
        digits=True,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _gemma() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece(
        begins="<bos>",
        ends="<eos>",
        pad="<pad>",
        others=("<start_of_turn>", "<end_of_turn>"),
        dummy_prefix=False,
    )
    tokenizer.chat_template = get_chat_template("gemma")
    return tokenizer


# Models -----------------------------------------------------------------------------------------

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
}
_OPTWIDTHS = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "init_std": 0.3,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Name: the tokenizer's maker, the config's class, its settings, and the head's rows beyond the
# tokenizer's tokens.
Family = tuple[Callable[[], PreTrainedTokenizerFast], type, dict[str, Any], int]
FAMILIES: dict[str, Family] = {
    "gpt2": (
        _gpt2,
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.3},
        0,
    ),
    "opt": (_opt, OPTConfig, {**_OPTWIDTHS, "word_embed_proj_dim": 32}, 7),
    # OPT-350m's two peculiarities: narrower embeddings, and norms after the layers.
    "opt-350m": (
        _opt,
        OPTConfig,
        {**_OPTWIDTHS, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
        7,
    ),
    "llama": (_llama2, LlamaConfig, {**WIDTHS, "tie_word_embeddings": False}, 0),
    "llama-biased": (
        _llama2,
        LlamaConfig,
        {**WIDTHS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        0,
    ),
    "llama3": (
        _llama3,
        LlamaConfig,
        {**WIDTHS, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
        0,
    ),
    "smollm2": (
        _smollm2,
        LlamaConfig,
        {**WIDTHS, "num_key_value_heads": 4, "tie_word_embeddings": True},
        0,
    ),
    "mistral": (
        _mistral,
        MistralConfig,
        {**WIDTHS, "sliding_window": WINDOW, "tie_word_embeddings": False},
        0,
    ),
    "qwen2": (
        lambda: _qwen("<|endoftext|>", CHAT_TEMPLATE),
        Qwen2Config,
        {**WIDTHS, "tie_word_embeddings": False},
        21,
    ),
    "qwen2-instruct": (
        lambda: _qwen("<|im_end|>", CHAT_TEMPLATE),
        Qwen2Config,
        {
            **WIDTHS,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        21,
    ),
    "qwen3": (
        lambda: _qwen("<|im_end|>", get_chat_template("qwen3")),
        Qwen3Config,
        {**WIDTHS, "head_dim": 16, "tie_word_embeddings": False},
        21,
    ),
    "gemma": (_gemma, GemmaConfig, {**WIDTHS, "head_dim": 16}, 5),
    "gemma2": (
        _gemma,
        Gemma2Config,
        {
            **WIDTHS,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        5,
    ),
    "gemma3": (
        _gemma,
        Gemma3TextConfig,
        {
            **WIDTHS,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        5,
    ),
}


def create(
    name: str, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 1
) -> Path:
    """Writes a family's model and tokenizer, or another tokenizer, into a folder."""
    make_tokenizer, config_class, settings, further_rows = FAMILIES[name]
    tokenizer = tokenizer or make_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer) + further_rows,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms, which start as 0 and 1
                    parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
