"""A tokenizer trained on texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, like: Any = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives the round trip.

    Numbers stay whole before merging, as in GPT-2, where SmolLM2 splits them into digits.
    `<|endoftext|>` begins and ends a text; `<|pad|>` is a token of its own. `like` is a tokenizer
    whose special tokens, chat template and beginning of a text are taken instead; of tokens that
    have no role, those that the template names. Little text may give fewer than `vocab_size`
    tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    settings: dict[str, Any] = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    special = [END, PAD]
    if like is not None:
        roles = ("bos_token", "eos_token", "pad_token", "unk_token")
        settings = {role: getattr(like, role) for role in roles} | {
            "chat_template": like.chat_template,
            "model_max_length": like.model_max_length,
            "padding_side": like.padding_side,
        }
        template = str(like.chat_template or "")
        named = [token for token in like.get_added_vocab() if token in template]
        special = list(dict.fromkeys(filter(None, [*(settings[role] for role in roles), *named])))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if like is not None and like.bos_token_id in like("")["input_ids"]:
        begin = like.bos_token
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, tokenizer.token_to_id(begin))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings
    )
