"""What two tokenizers have in common, compared as the bytes that their tokens stand for.

Raw vocabulary strings mislead across families: byte-level tokenizers write a space as `Ġ`,
SentencePiece as `▁`, and byte fallbacks as `<0x0A>`. So every token is mapped to bytes first.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes are themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


def is_byte_level(tokenizer: Any) -> bool:
    """Whether the tokenizer writes bytes in GPT-2's alphabet (otherwise: SentencePiece's way)."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    return '"ByteLevel"' in json.dumps(
        [description.get("pre_tokenizer"), description.get("decoder")]
    )


def token_bytes(token: str, *, byte_level: bool) -> bytes:
    """The bytes that a vocabulary entry stands for.

    >>> token_bytes("Ġthe", byte_level=True), token_bytes("▁the", byte_level=False)
    (b' the', b' the')
    >>> token_bytes("<0x0A>", byte_level=False)
    b'\\n'
    """
    if byte_level:
        table = _byte_of_character()
        if all(character in table for character in token):
            return bytes(table[character] for character in token)
        return token.encode()
    fallback = _BYTE_FALLBACK.fullmatch(token)
    if fallback:
        return bytes([int(fallback.group(1), 16)])
    return token.replace("▁", " ").encode()


def vocabulary_bytes(tokenizer: Any) -> dict[bytes, int]:
    """Byte string to token id, without added and special tokens.

    Where a byte fallback and an ordinary token stand for the same byte, the ordinary one counts.
    """
    byte_level = is_byte_level(tokenizer)
    added = set(tokenizer.get_added_vocab())
    entries: dict[bytes, int] = {}
    ordinary_last = sorted(
        tokenizer.get_vocab().items(),
        key=lambda entry: (_BYTE_FALLBACK.fullmatch(entry[0]) is None, -entry[1]),
    )
    for token, index in ordinary_last:
        if token not in added:
            entries[token_bytes(token, byte_level=byte_level)] = index
    return entries


def shared_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any) -> list[tuple[int, int]]:
    """(teacher id, student id) of every byte string that both vocabularies have, in byte order."""
    teacher = vocabulary_bytes(teacher_tokenizer)
    student = vocabulary_bytes(student_tokenizer)
    return [(teacher[piece], student[piece]) for piece in sorted(teacher.keys() & student.keys())]
