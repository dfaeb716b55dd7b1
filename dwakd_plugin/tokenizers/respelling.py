"""How one tokenizer spells the tokens of another: what a model needs to be given another one."""

from __future__ import annotations

from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.tokenizers.alignment import BEFORE, ids_behind
from dwakd_plugin.tokenizers.pair import ByteCutter, Cut, text_of, vocabulary_bytes


def spellings(new: Any, old: Any) -> list[list[int]]:
    """For each token id of the tokenizer `new` the ids of `old` that stand for the same bytes.

    One id where `old` has the very token, else those that it cuts the token's text into, or, of a
    part of a character, the longest pieces from the left. Special tokens go by their text, the
    beginning and the end of a text by what they are for; the list is empty where `old` has nothing
    like it. Raises UserError for a tokenizer that cannot be compared by bytes, or, of `new`, one
    that has no token for some text.
    """
    cutter, source = ByteCutter(new, "student"), ByteCutter(old, "model")
    known = vocabulary_bytes(old)
    _refuse_without_bytes(new)
    found: list[list[int]] = [[] for _ in range(max(cutter.pieces) + 1)]
    special = {index for index, token in new.added_tokens_decoder.items() if token.special}
    texts: dict[int, str] = {}
    for index, piece in cutter.pieces.items():
        if index in special or not piece:
            continue
        if piece in known:
            found[index] = [known[piece]]
            continue
        found[index] = _longest_pieces(piece, known)
        if text := text_of(piece):
            texts[index] = text
    for before in reversed(BEFORE):  # not by itself: SentencePiece may put a space before it
        cuts = source.cut([before + text for text in texts.values()])
        for index, cut in zip(texts, cuts, strict=True):
            if isinstance(cut, Cut) and (ids := ids_behind(cut, len(before))):
                found[index] = ids
    theirs = old.get_added_vocab()
    for token, index in new.get_added_vocab().items():
        if token in theirs:
            found[index] = [theirs[token]]
    for role in ("bos_token_id", "eos_token_id"):  # the end last: it may be the beginning as well
        if getattr(new, role) is not None and getattr(old, role) is not None:
            found[getattr(new, role)] = [getattr(old, role)]
    return found


def _longest_pieces(piece: bytes, known: dict[bytes, int]) -> list[int]:
    """The longest known pieces from the left; a byte that is none is left out."""
    ids = []
    while piece:
        end = next((end for end in range(len(piece), 0, -1) if piece[:end] in known), 0)
        if end:
            ids.append(known[piece[:end]])
        piece = piece[end or 1 :]
    return ids


def _refuse_without_bytes(tokenizer: Any) -> None:
    """Every character beyond ASCII ends with one of 64 bytes: with those, all can be spelled."""
    known = vocabulary_bytes(tokenizer)
    missing = sum(bytes([byte]) not in known for byte in range(0x80, 0xC0))
    if missing:
        raise UserError(
            f"The student's tokenizer has no tokens for single bytes ({missing} of the 64 that end "
            "a character are missing), so some texts are lost to its unknown token. Choose a "
            "byte-level one (GPT-2, Llama 3, Qwen) or one with byte fallback (Llama 2, Mistral, "
            "Gemma), or train one: --train-tokenizer."
        )


def ends_like(new: Any, old: Any, old_ends: list[int]) -> list[int]:
    """What ends a response for `new`: its end of text, and the tokens that read as old ends do."""
    read = {token.content for index, token in old.added_tokens_decoder.items() if index in old_ends}
    also = [index for token, index in new.get_added_vocab().items() if token in read]
    ends = [] if new.eos_token_id is None else [new.eos_token_id]
    return [*ends, *sorted(set(also) - set(ends))]
