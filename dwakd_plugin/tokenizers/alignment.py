"""Which tokens of the two sides stand at the same bytes of the response.

Two tokens are a pair when they begin and end at the same byte of the same text: all bytes before
them, and their own, are equal (DSKDv2, arXiv 2504.11426). Where the teacher's probabilities are
mapped to the student's tokens it is enough that the teacher's token begins with the student's, and
one that begins inside a teacher's token goes with that (`continuations`).
Strings of the vocabularies are never compared: a walk along strings loses its place where one side
writes a byte as `<0x0A>` and the other as `Ċ`, and never finds it again.

This works on token ids, when a batch is laid out, and adds nothing to the prepared rows: every
variant trains on the very same ones, and on the same teacher cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from dwakd_plugin.tokenizers.continuations import Continuations, Read
from dwakd_plugin.tokenizers.pair import ByteCutter, Cut, shared_vocabulary, text_of
from dwakd_plugin.tokenizers.same_text import Run, common_runs, spelling
from dwakd_plugin.tokenizers.spellings import Spellings

Pairs = list[tuple[int, int]]
# With the number of what the student has read of the teacher's token, 0 where they begin alike; or,
# of one that the teacher spells, the number of the spelling's beginning.
NumberedPairs = list[tuple[int, int, int]]

# What a text may follow without being joined with it: words and spaced words, white space, marks.
BEFORE = ("\n", "a", ".")
NO_ENDS: Mapping[int, int] = {}


class TokenAligner:
    """Pairs the response tokens of two tokenizers. Raises UserError for kinds without bytes.

    whole: only tokens of the same bytes; otherwise also a student's with a longer one of the
    teacher's that begins with it.
    continuations: what `aligned` finds inside the teacher's tokens; None for nothing.
    spellings: what it finds of those that the teacher cuts in several; None for nothing.
    ends: the teacher's token that ends an answer, and the student's (`paired_ends`), which are no
    text even where a tokenizer doesn't call them special.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        whole: bool = True,
        continuations: Continuations | None = None,
        spellings: Spellings | None = None,
        ends: Mapping[int, int] = NO_ENDS,
    ) -> None:
        self._whole = whole
        self._spellings = spellings
        self._continuations = continuations
        self._student = _Spelling(student_tokenizer, "student", ends.values())
        self._teacher = _Spelling(teacher_tokenizer, "teacher", ends.keys())

    def pairs(
        self,
        student_ids: Sequence[int],
        student_labels: Sequence[int],
        teacher_ids: Sequence[int],
        teacher_labels: Sequence[int],
    ) -> Pairs:
        """(student, teacher) response positions of one row whose predicted tokens pair, in order.

        Positions count those whose shifted label is not −100, from 0. A *turn* is a run of them
        without a gap; the k-th turns of both sides are compared, and each from its own beginning.
        A turn that one side cuts short is compared as far as it goes.
        """
        numbered, _ = self.aligned(student_ids, student_labels, teacher_ids, teacher_labels)
        return [(i, j) for i, j, number in numbered if number == 0]

    def aligned(
        self,
        student_ids: Sequence[int],
        student_labels: Sequence[int],
        teacher_ids: Sequence[int],
        teacher_labels: Sequence[int],
    ) -> tuple[NumberedPairs, NumberedPairs]:
        """The same with 0 for each, and among them the student's tokens that begin inside a
        teacher's, with that one's position and the number of what was read of it.

        And (student, teacher) positions of the others that the teacher spells, with the number of
        the beginning before each of its positions (`Spellings.nodes`).
        """
        turns = zip(
            _turns(student_ids, student_labels), _turns(teacher_ids, teacher_labels), strict=False
        )
        pairs: NumberedPairs = []
        spelt: NumberedPairs = []
        for (student_start, student_turn), (teacher_start, teacher_turn) in turns:
            both = self._of_a_turn(student_turn, teacher_turn)
            for found, own in zip((pairs, spelt), both, strict=True):
                found += [(student_start + i, teacher_start + j, number) for i, j, number in own]
        return pairs, spelt

    def common_ends(
        self,
        student_ids: Sequence[int],
        student_labels: Sequence[int],
        teacher_ids: Sequence[int],
        teacher_labels: Sequence[int],
    ) -> Pairs:
        """(tokens of the student's side, tokens of the teacher's), in order: how many begin a row
        on either side so that the last of them is predicted and both have said the same text."""
        places = [
            [place for place in range(1, len(labels)) if labels[place] != -100]
            for labels in (student_labels, teacher_labels)
        ]
        turns = zip(
            _turns(student_ids, student_labels), _turns(teacher_ids, teacher_labels), strict=False
        )
        return [
            (places[0][student_start + i] + 1, places[1][teacher_start + j] + 1)
            for (student_start, student_turn), (teacher_start, teacher_turn) in turns
            for text in self._texts(student_turn, teacher_turn)
            for i, j in text.common_ends()
        ]

    def _texts(self, student_turn: list[int], teacher_turn: list[int]) -> Iterator[_Text]:
        """A turn's texts between its special tokens, as far as those before them end alike."""
        student_at = teacher_at = 0
        segments = zip(
            self._student.segments(student_turn), self._teacher.segments(teacher_turn), strict=False
        )
        for (student, student_ended), (teacher, teacher_ended) in segments:
            student_text, teacher_text = b"".join(student), b"".join(teacher)
            runs = _runs(student_text, teacher_text)
            same = _end_alike(student_text, teacher_text, runs)
            ended = same and student_ended and teacher_ended
            yield _Text(student_at, student, teacher_at, teacher, runs, ended)
            if not ended:
                break
            student_at += len(student) + 1
            teacher_at += len(teacher) + 1

    def _of_a_turn(
        self, student_turn: list[int], teacher_turn: list[int]
    ) -> tuple[NumberedPairs, NumberedPairs]:
        """Special tokens (the end of the turn) pair with each other, in order, where the text
        before them ends alike; that text is compared byte by byte."""
        pairs: NumberedPairs = []
        spelt: NumberedPairs = []
        for text in self._texts(student_turn, teacher_turn):
            found, longer = text.pairs(self._whole)
            for i, j in found:
                pairs.append((i, j, 0))
                if self._continuations is not None:
                    inside = self._continuations.inside(teacher_turn[j], student_turn, i)
                    pairs += [(i + depth, j, number) for depth, number in inside]
            if self._spellings is not None:
                for i, j in longer:
                    nodes = self._spellings.nodes(student_turn[i], teacher_turn, j)
                    spelt += [(i, j + depth, number) for depth, number in nodes]
            pairs += [(i, j, 0) for i, j in text.ends()]
        return pairs, spelt


class _Text(NamedTuple):
    """A text of a turn on both sides: where its tokens begin in the turn, their pieces, what is the
    same of them, and whether a special token ends it on both."""

    student_at: int
    student: list[bytes]
    teacher_at: int
    teacher: list[bytes]
    runs: list[Run]
    ended: bool

    def ends(self) -> Pairs:
        """The two special tokens behind it, if they are there."""
        places = self.student_at + len(self.student), self.teacher_at + len(self.teacher)
        return [places] if self.ended else []

    def pairs(self, whole: bool) -> tuple[Pairs, Pairs]:
        """Tokens of the same bytes at the same place of the text (unless `whole`, of the same first
        byte and the teacher's no shorter); and those where the teacher's is shorter.

        Places are the same within each run of bytes that both texts have; where they differ (see
        `common_runs`) nothing pairs, and behind it pairing goes on.
        """
        teacher_spans = {
            begin: (j, end)
            for j, (begin, end) in enumerate(_spans(self.teacher), self.teacher_at)
            if begin < end
        }
        pairs: Pairs = []
        longer: Pairs = []
        at = 0
        for i, (begin, end) in enumerate(_spans(self.student), self.student_at):
            while at < len(self.runs) and self.runs[at][0] + self.runs[at][2] < end:
                at += 1
            if at == len(self.runs) or begin == end or begin < self.runs[at][0]:
                continue
            shift = self.runs[at][1] - self.runs[at][0]
            j, other_end = teacher_spans.get(begin + shift, (0, -1))
            if end + shift == other_end or (not whole and end + shift < other_end):
                pairs.append((i, j))
            elif 0 <= other_end < end + shift:
                longer.append((i, j))
        return pairs, longer

    def common_ends(self) -> Pairs:
        """Tokens that end at the same place of the text, whatever each of them begins with."""
        teacher_ends = {end: j for j, (_, end) in enumerate(_spans(self.teacher), self.teacher_at)}
        pairs, at = [], 0
        for i, (_, end) in enumerate(_spans(self.student), self.student_at):
            while at < len(self.runs) and self.runs[at][0] + self.runs[at][2] < end:
                at += 1
            if at < len(self.runs) and self.runs[at][0] <= end:
                j = teacher_ends.get(end + self.runs[at][1] - self.runs[at][0])
                if j is not None:
                    pairs.append((i, j))
        return pairs + self.ends()


class _Spelling:
    """A tokenizer's tokens as bytes, and which of them are special and so no text."""

    def __init__(self, tokenizer: Any, role: str, ends: Iterable[int]) -> None:
        self._pieces = ByteCutter(tokenizer, role).pieces
        self._special = {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        } | {*ends}

    def segments(self, ids: list[int]) -> list[tuple[list[bytes], bool]]:
        """The text's pieces up to each special token, and whether one ends them."""
        segments: list[tuple[list[bytes], bool]] = []
        pieces: list[bytes] = []
        for index in ids:
            if index in self._special:
                segments.append((pieces, True))
                pieces = []
            else:
                pieces.append(self._pieces.get(index, b""))
        return [*segments, (pieces, False)]


def _turns(ids: Sequence[int], labels: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Runs of predicted tokens, each with the number of response positions before it."""
    turns: list[tuple[int, list[int]]] = []
    count, inside = 0, False
    for token, label in zip(ids[1:], labels[1:], strict=True):
        if label == -100:
            inside = False
            continue
        if not inside:
            turns.append((count, []))
        turns[-1][1].append(token)
        count, inside = count + 1, True
    return turns


def _runs(student: bytes, teacher: bytes) -> list[Run]:
    """`common_runs`, where a space that SentencePiece put before one of the texts isn't the text's:
    of several spaces in a row the later ones are then the same."""
    for begin, other_begin in ((1, 0), (0, 1)):
        one, other = student[begin:], teacher[other_begin:]
        spaced = student[:begin] + teacher[:other_begin]
        if spaced == b" " and one == other and one:
            return [(begin, other_begin, len(one))]
    return common_runs(student, teacher)


def _spans(pieces: list[bytes]) -> list[tuple[int, int]]:
    """First and last byte (exclusive) of each piece in the text."""
    return list(pairwise(accumulate(map(len, pieces), initial=0)))


def _end_alike(student: bytes, teacher: bytes, runs: list[Run]) -> bool:
    """Whether what follows the last run on either side is white space, or written otherwise."""
    begin, other_begin, count = runs[-1] if runs else (0, 0, 0)
    rests = student[begin + count :], teacher[other_begin + count :]
    one, other = (spelling(rest.decode(errors="replace")).strip() for rest in rests)
    return one == other


def token_map(
    teacher_tokenizer: Any, student_tokenizer: Any, rows: int, ends: Mapping[int, int] = NO_ENDS
) -> list[int]:
    """For each row of the teacher's head the student's token of the same bytes, −1 where none.

    Added tokens go by their text, the end of a sequence is the end of a sequence, and what `ends`
    an answer (`paired_ends`) does so on the other side. A head may have fewer rows than its
    tokenizer has tokens: what lies beyond is never predicted.
    """
    found = dict(shared_vocabulary(teacher_tokenizer, student_tokenizer))
    added = student_tokenizer.get_added_vocab()
    for token, teacher_id in teacher_tokenizer.get_added_vocab().items():
        if token in added:
            found[teacher_id] = added[token]
    if teacher_tokenizer.eos_token_id is not None and student_tokenizer.eos_token_id is not None:
        found[teacher_tokenizer.eos_token_id] = student_tokenizer.eos_token_id
    found |= ends
    return [found.get(index, -1) for index in range(rows)]


def first_tokens(
    teacher_tokenizer: Any, student_tokenizer: Any, rows: int, ends: Mapping[int, int] = NO_ENDS
) -> list[int]:
    """For each row of the teacher's head the student's token that its bytes begin with, −1 where
    none is known: where the teacher predicts ` photosynthesis`, the student is to predict ` photo`.
    """
    return firsts(student_cuts(teacher_tokenizer, student_tokenizer, rows, ends))


def firsts(cuts: Sequence[Read]) -> list[int]:
    """The first token of each cut, −1 where it is empty."""
    return [cut[0] if cut else -1 for cut in cuts]


def student_cuts(
    teacher_tokenizer: Any, student_tokenizer: Any, rows: int, ends: Mapping[int, int] = NO_ENDS
) -> list[Read]:
    """For each row of the teacher's head the student's own cut of its bytes, empty where none is
    known.

    A token that is not cut off by itself is cut after something that no tokenizer joins it with.
    The student's own token of the same bytes is taken only where it comes back from a cut: a
    vocabulary has tokens that its own merges, or a normaliser before them, never arrive at, and no
    label ever names them. Where the bytes aren't text (a part of a character), only a token of the
    same bytes counts.
    """
    found = token_map(teacher_tokenizer, student_tokenizer, rows, ends)
    cuts: list[Read] = [(token,) if token >= 0 else () for token in found]
    cutter = ByteCutter(student_tokenizer, "student")
    added = teacher_tokenizer.added_tokens_decoder
    texts: dict[int, str] = {}  # of the teacher's tokens whose counterpart is still to be found
    for index, piece in ByteCutter(teacher_tokenizer, "teacher").pieces.items():
        taken = index in added and (added[index].special or found[index : index + 1] > [-1])
        if index < rows and not taken and (text := text_of(piece)):
            texts[index] = text
    for index, cut in cuts_of(cutter, texts, found).items():
        cuts[index] = cut
    return cuts


def cuts_of(
    cutter: ByteCutter, texts: Mapping[int, str], same: Mapping[int, int] | Sequence[int]
) -> dict[int, Read]:
    """The tokens of the cut of each text, empty where there is none; `same` has, under the same
    number, the token of the text's very bytes."""
    numbered = zip(texts, cutter.ids([*texts.values()]), strict=True)
    found = {index: (ids[0],) for index, ids in numbered if ids == [same[index]]}
    left = {index: text for index, text in texts.items() if index not in found}
    behind: dict[int, Read] = {}
    for before in ("", *BEFORE):
        cuts = zip(list(left), cutter.cut([before + text for text in left.values()]), strict=True)
        for index, cut in cuts:
            if not isinstance(cut, Cut):
                continue
            ids = ids_behind(cut, len(before))
            if ids == [same[index]]:
                found[index] = (same[index],)
                del left[index]
            elif ids and before:
                behind.setdefault(index, tuple(ids))
    return {index: found.get(index, behind.get(index, ())) for index in texts}


def ids_behind(cut: Cut, begin: int) -> list[int]:
    """The tokens from a byte on that one begins with; empty where none does, or holds no byte."""
    spans = list(pairwise([0, *cut.ends]))
    return next((cut.ids[i:] for i, (b, e) in enumerate(spans) if b == begin < e), [])
