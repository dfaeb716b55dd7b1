"""What two tokenizers have in common, compared as the bytes that their tokens stand for.

Raw vocabulary strings mislead across families: byte-level tokenizers write a space as `Ġ`,
SentencePiece as `▁`, and byte fallbacks as `<0x0A>`. So every token is mapped to bytes first.

Where a token lies in a text is counted from these bytes as well. A tokenizer's own offsets will not
do: they count characters, so tokens that share one share its span, and the `▁` that SentencePiece
puts before a text has the span of the text's first character.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from dwakd_plugin.errors import UserError

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What the tokenizers library strips: Unicode's White_Space, which U+001C to U+001F are not of,
# though Python strips them too.
_WHITE_SPACE = "".join(
    character
    for character in map(chr, range(0x3001))
    if character.isspace() and not "\x1c" <= character <= "\x1f"
)


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes are themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


def _stages(tokenizer: Any) -> str:
    """Normaliser, pre-tokenizer and decoder as JSON (the whole tokenizer's would be megabytes)."""
    backend = tokenizer.backend_tokenizer
    stages = [backend.normalizer, backend.pre_tokenizer, backend.decoder]
    return "".join(stage.__getstate__().decode() for stage in stages if stage is not None)


def is_byte_level(tokenizer: Any) -> bool:
    """Whether the tokenizer writes bytes in GPT-2's alphabet (otherwise: SentencePiece's way)."""
    return '"ByteLevel"' in _stages(tokenizer)


def token_bytes(token: str, *, byte_level: bool) -> bytes:
    """The bytes that a vocabulary entry stands for.

    >>> token_bytes("Ġthe", byte_level=True), token_bytes("▁the", byte_level=False)
    (b' the', b' the')
    >>> token_bytes("<0x0A>", byte_level=False)
    b'\\n'
    """
    if byte_level:
        table = _byte_of_character()
        try:
            return bytes(map(table.__getitem__, token))
        except KeyError:  # an added token, which is written as it is
            return token.encode()
    fallback = _BYTE_FALLBACK.fullmatch(token)
    if fallback:
        return bytes([int(fallback.group(1), 16)])
    return token.replace("▁", " ").encode()


def text_of(piece: bytes) -> str | None:
    """The text that a token's bytes are; None where they are a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def vocabulary_bytes(tokenizer: Any) -> dict[bytes, int]:
    """Byte string to token id, without added and special tokens.

    Where a byte fallback and an ordinary token stand for the same byte, the ordinary one counts.
    """
    vocabulary = tokenizer.get_vocab()
    pieces = _pieces(vocabulary, byte_level=is_byte_level(tokenizer))
    return _ids_by_bytes(vocabulary, pieces, set(tokenizer.get_added_vocab()))


def _pieces(vocabulary: Mapping[str, int], *, byte_level: bool) -> dict[int, bytes]:
    """Token id to the bytes that it stands for."""
    return {index: token_bytes(token, byte_level=byte_level) for token, index in vocabulary.items()}


def _ids_by_bytes(
    vocabulary: Mapping[str, int], pieces: Mapping[int, bytes], added: Collection[str]
) -> dict[bytes, int]:
    entries: dict[bytes, tuple[bool, int]] = {}
    for token, index in vocabulary.items():
        if token not in added:
            piece = pieces[index]
            entry = token.startswith("<0x") and bool(_BYTE_FALLBACK.fullmatch(token)), index
            if piece not in entries or entry < entries[piece]:
                entries[piece] = entry
    return {piece: index for piece, (_, index) in entries.items()}


def shared_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any) -> list[tuple[int, int]]:
    """(teacher id, student id) of every byte string that both vocabularies have, in byte order."""
    teacher = vocabulary_bytes(teacher_tokenizer)
    student = vocabulary_bytes(student_tokenizer)
    return [(teacher[piece], student[piece]) for piece in sorted(teacher.keys() & student.keys())]


# --- Texts as bytes ---------------------------------------------------------------------------


class Cut(NamedTuple):
    """How a tokenizer cuts a text: token ids, and the UTF-8 byte at which each token ends.

    Token i holds the bytes from ends[i - 1] (0 for the first) to ends[i], so each byte belongs to
    exactly one token; the last end is the text's length. A token that stands for nothing but the
    space which SentencePiece puts before a text holds no byte.
    """

    ids: list[int]
    ends: list[int]


class Changed(NamedTuple):
    """A text that a tokenizer does not keep as it is: what it reads instead (normalised), or None
    where a part is lost to its unknown token."""

    text: str | None


class ByteCutter:
    """Cuts texts with one tokenizer and says where each token ends, in bytes.

    Knows tokenizers of the byte-level (GPT-2, Llama 3, Qwen, SmolLM2) and the SentencePiece kind
    (BPE with byte fallback as in Llama 2, Mistral and Gemma; Unigram as in T5 and XLM-R).

    Raises UserError for every other kind, by name: their tokens do not say where spaces were.
    """

    def __init__(self, tokenizer: Any, role: str) -> None:
        self.tokenizer = tokenizer
        self.byte_level = is_byte_level(tokenizer)
        model = tokenizer.backend_tokenizer.model
        kind = type(model).__name__
        suffix = getattr(model, "end_of_word_suffix", None)
        if kind not in ("BPE", "Unigram"):
            reason = f"it is of the {kind} kind"
        elif suffix:
            reason = f"it ends words with `{suffix}`"
        elif not self.byte_level and "▁" not in _stages(tokenizer):
            reason = f"it is a {kind} that marks spaces neither as `Ġ` nor as `▁`"
        else:
            reason = ""
        if reason:
            raise UserError(
                f"The {role}'s tokenizer cannot be compared byte by byte: {reason}, so its tokens "
                "do not say where spaces were. Byte-level (GPT-2, Llama 3, Qwen) and SentencePiece "
                "(Llama 2, Mistral, Gemma, T5) tokenizers can."
            )
        self._added = tokenizer.added_tokens_decoder
        self._unknown = tokenizer.unk_token_id
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()  # made anew at each call
        self.pieces = _pieces(self.vocabulary, byte_level=self.byte_level)
        for index, token in self._added.items():  # these stand in the vocabulary as they are
            self.pieces[index] = self._fold(token.content)

    def ids_by_bytes(self) -> dict[bytes, int]:
        """What `vocabulary_bytes` makes of the tokenizer."""
        added = {token.content for token in self._added.values()}
        return _ids_by_bytes(self.vocabulary, self.pieces, added)

    def _fold(self, text: str) -> bytes:
        """The text's bytes as the tokens spell them: SentencePiece's own ▁ is a space to it."""
        return (text if self.byte_level else text.replace("▁", " ")).encode()

    def cut(self, texts: Sequence[str]) -> list[Cut | Changed]:
        """Each text's cut without special tokens; Changed where the tokens are not the text."""
        return [self._cut(text, ids) for text, ids in zip(texts, self.ids(texts), strict=True)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's token ids without special tokens."""
        # Turns truncation and padding off, which another call or the file may have left on.
        self.tokenizer("", add_special_tokens=False)
        # What transformers makes of each encoding would take as long again, and only ids count.
        rows = self.tokenizer.backend_tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [row.ids for row in rows]

    def _cut(self, text: str, ids: list[int]) -> Cut | Changed:
        ends = self._ends(self._fold(text), ids)
        if ends is None:
            return Changed(self._reading(text, ids))
        if not self.byte_level and "▁" in text:
            ends = _unfold(text, ends)
        return Cut(ids, ends)

    def _ends(self, data: bytes, ids: list[int]) -> list[int] | None:
        """Follows the tokens through the text's bytes; None where they are not these bytes.

        The ordinary tokens between two added ones are a run. SentencePiece may have put a space
        before a run: it is there if the run only fits without its first byte.
        """
        ends: list[int] = []
        begin = 0
        run: list[bytes] = []
        for index in [*ids, None]:
            if index is not None and index not in self._added:
                run.append(self.pieces[index])
                continue
            token = None if index is None else self._added[index]
            place = self._place(b"".join(run), data, begin, token)
            if place is None:
                return None
            run_begin, begin = place
            ends += accumulate([len(piece) for piece in run], initial=run_begin)
            del ends[-len(run) - 1]  # the initial one
            if token is not None:
                begin += len(self._fold(token.content))
                begin += _spaces(data, begin) if token.rstrip else 0
                ends.append(begin)
            run = []
        return ends

    def _place(self, run: bytes, data: bytes, begin: int, token: Any) -> tuple[int, int] | None:
        """Where a run lies that ends at the text's end (token None) or at an added token: its first
        byte, one less than `begin` if a space was put before it; and the added token's first."""
        for extra in (0, 1) if run.startswith(b" ") else (0,):
            end = begin + len(run) - extra
            if not data.startswith(run[extra:], begin):
                continue
            if token is None:
                if end == len(data):
                    return begin - extra, end
                continue
            after = end + (_spaces(data, end) if token.lstrip else 0)
            if data.startswith(self._fold(token.content), after):
                return begin - extra, after
        return None

    def _reading(self, text: str, ids: list[int]) -> str | None:
        if self._unknown in ids:
            return None
        data = b"".join(self.pieces[index] for index in ids)
        try:
            reading = data.decode()
        except UnicodeDecodeError:
            return None
        return reading if text.startswith(" ") else reading.removeprefix(" ")


def _spaces(data: bytes, begin: int) -> int:
    """How many bytes of white space there are at `begin`."""
    rest = data[begin:].decode(errors="ignore")
    return len(rest.encode()) - len(rest.lstrip(_WHITE_SPACE).encode())


def _unfold(text: str, ends: list[int]) -> list[int]:
    """Ends in a text whose ▁ (3 bytes) were counted as spaces (1 byte), as ends in the text."""
    place, folded = 0, 0
    places = {0: 0}
    for character in text:
        place += len(character.encode())
        # A token may end within a character, but never within a ▁.
        size = 1 if character == "▁" else len(character.encode())
        places |= {folded + size - back: place - back for back in range(size)}
        folded += size
    return [places[end] for end in ends]


class PairCut(NamedTuple):
    """One text, cut by both tokenizers. `text` is as both read it, which may not be as given."""

    text: str
    teacher: Cut
    student: Cut


def cut_both(
    teacher: ByteCutter, student: ByteCutter, texts: Sequence[str]
) -> list[PairCut | None]:
    """Each text cut by both, None where a tokenizer has no token for a part of it.

    Where a tokenizer normalises a text (composes accents, folds case, drops line breaks), both
    are given the normalised text, so that they are compared on the same bytes.
    """
    cuts: list[PairCut | None] = []
    for text, by_teacher, by_student in zip(
        texts, teacher.cut(texts), student.cut(texts), strict=True
    ):
        for _ in range(4):  # normalising twice changes nothing more, but the two may take turns
            if isinstance(by_teacher, Cut) and isinstance(by_student, Cut):
                cuts.append(PairCut(text, by_teacher, by_student))
                break
            changed = by_teacher if isinstance(by_teacher, Changed) else by_student
            assert isinstance(changed, Changed)
            if not changed.text:
                cuts.append(None)
                break
            text = changed.text
            (by_teacher,), (by_student,) = teacher.cut([text]), student.cut([text])
        else:
            cuts.append(None)
    return cuts
