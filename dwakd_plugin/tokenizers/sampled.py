"""An answer that the student sampled, as the teacher reads it: the same text in its own tokens.

A sample is the tokens that were drawn. Its text may have another cut by the student's own
tokenizer, which is never asked: what is compared is what the student did. The teacher's tokenizer
cuts the text behind the teacher's prompt, as it would have cut it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product, takewhile
from typing import Any

from dwakd_plugin.tokenizers.alignment import NO_ENDS, Pairs, TokenAligner, ids_behind
from dwakd_plugin.tokenizers.pair import ByteCutter, Cut

_TAIL = 32  # tokens of a prompt that decide how a text behind it is cut, and many more


class SampledText:
    """Reads samples of the student for the teacher. Raises UserError for kinds without bytes.

    ends: the teacher's token that ends an answer, and the student's, as of `TokenAligner`.
    """

    def __init__(
        self, student_tokenizer: Any, teacher_tokenizer: Any, ends: Mapping[int, int] = NO_ENDS
    ) -> None:
        self._aligner = TokenAligner(student_tokenizer, teacher_tokenizer, whole=False, ends=ends)
        self._student = ByteCutter(student_tokenizer, "student")
        self._teacher = ByteCutter(teacher_tokenizer, "teacher")
        self.student_special = special_tokens(student_tokenizer) | {*ends.values()}
        self.teacher_special = special_tokens(teacher_tokenizer) | {*ends}

    def text(self, sample: Sequence[int]) -> str | None:
        """What sampled tokens say, without the one that ends them.

        None where they aren't text: bytes of no character, a special token, or a row of the head
        that no token has. A character that the sample's end cuts off is left out. The space that
        SentencePiece puts before a text is in it.
        """
        pieces = self._student.pieces
        if any(token in self.student_special or token not in pieces for token in sample):
            return None
        data = b"".join(pieces[token] for token in sample)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return None
            text = data[: error.start].decode()
        return text

    def spaced_as(self, text: str, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> str:
        """What the student said, with the space that the teacher's side of the given answer begins
        with and the student's doesn't, or without the one that only the student's begins with.

        SentencePiece puts one before a text, and not where it is tokenised with what comes before.
        """
        ours, theirs = (
            cutter.pieces.get(next(iter(ids), -1), b"").startswith(b" ")
            for cutter, ids in ((self._student, student_ids), (self._teacher, teacher_ids))
        )
        if theirs and not ours and text:
            return f" {text}"
        return text.removeprefix(" ") if ours and not theirs else text

    def behind(self, prompt: Sequence[int], text: str) -> list[int] | None:
        """The teacher's tokens of a text behind its prompt; None where it reads a special token in
        it. Where the text would be joined with the prompt, it is cut by itself."""
        if not text:
            return []
        pieces, added = self._teacher.pieces, self._teacher.tokenizer.added_tokens_decoder
        last = takewhile(lambda token: token not in added, reversed(prompt[-_TAIL:]))
        tail = b"".join(reversed([pieces.get(token, b"") for token in last]))
        before = tail.decode(errors="ignore")  # which may begin within a character
        data, ids = text.encode(), list[int]()
        # A space that the text begins with may be the one that SentencePiece puts there itself.
        for context, said in product((before, ""), dict.fromkeys((text, text.removeprefix(" ")))):
            found = self._cut_behind(context, said)
            exact = b"".join(pieces[token] for token in found) == data
            if exact or not ids:  # else the first that there is: a normaliser changed the text
                ids = found
            if exact:
                break
        return None if self.teacher_special.intersection(ids) else ids

    def _cut_behind(self, before: str, text: str) -> list[int]:
        """The teacher's tokens of `text` in a text that begins with `before`; none where no token
        begins there."""
        if not before:
            return self._teacher.ids([text])[0]
        (cut,) = self._teacher.cut([before + text])
        return ids_behind(cut, len(before.encode())) if isinstance(cut, Cut) else []

    def pairs(self, sample: Sequence[int], teacher_ids: Sequence[int]) -> Pairs:
        """(student, teacher) places of tokens before which both have read the same bytes: what
        `TokenAligner` pairs where the teacher's probabilities are mapped. Both may end with an end
        of turn."""
        ours, theirs = [0, *sample], [0, *teacher_ids]  # nothing predicts a row's first token
        return self._aligner.pairs(ours, ours, theirs, theirs)


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """The ids that aren't text."""
    return frozenset(
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    )
