"""Where the student's token begins inside a teacher's: what the teacher's tokens go on with there.

A teacher that reads `1234` as `123`, `4` has predicted `123` where the student, of single digits,
reads `1`, `2`, `3`. Before `2` the student has read `1` of a token: the teacher's probabilities,
given that, are those of its tokens that the student cuts into `1` and more, renormalised, each for
what comes next in that cut. Tokens that end with what was read are left out, as the text goes on:
where it does not, the teacher's own next position says what follows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

Read = tuple[int, ...]  # the student's tokens that a token of the teacher's begins with


@dataclass(frozen=True)
class Continuations:
    """Of the teacher's tokens that the student cuts in several: after what another one may follow.

    cuts     the student's tokens of each such token of the teacher's
    numbers  of what may be read of them, from 1; only where more than one token may follow, as a
             single one is the label
    entries  for each number, from 1, the teacher's tokens that begin so, and the student's next
    """

    cuts: dict[int, Read]
    numbers: dict[Read, int]
    entries: list[list[tuple[int, int]]]

    def inside(
        self, teacher_token: int, student_tokens: Sequence[int], at: int
    ) -> list[tuple[int, int]]:
        """Of a teacher's token that begins where the student's token `at` does: which of the
        student's behind that, from 1, begin inside it, and the number of what was read before.

        Only as far as the student has cut the text as it cuts the token by itself.
        """
        cut = self.cuts.get(teacher_token, ())
        here = zip(cut, student_tokens[at : at + len(cut)], strict=False)
        common = takewhile(lambda two: two[0] == two[1], here)
        depths = range(1, sum(1 for _ in common))
        return [(n, self.numbers[cut[:n]]) for n in depths if cut[:n] in self.numbers]

    def table(self) -> tuple[list[int], list[int], list[int]]:
        """The entries of all numbers in a row: where those of each begin, number 0 having none, and
        where the last ends; the teacher's tokens; the student's."""
        starts = [0, 0]
        for own in self.entries:
            starts.append(starts[-1] + len(own))
        flat = [entry for own in self.entries for entry in own]
        return starts, [teacher for teacher, _ in flat], [student for _, student in flat]


def continuations(cuts: Sequence[Read]) -> Continuations:
    """From the student's cut of each of the teacher's tokens, empty where there is none."""
    several = {token: cut for token, cut in enumerate(cuts) if len(cut) > 1}
    by_read: dict[Read, list[tuple[int, int]]] = defaultdict(list)
    for token, cut in several.items():
        for depth in range(1, len(cut)):
            by_read[cut[:depth]].append((token, cut[depth]))
    open_ = {read: own for read, own in by_read.items() if len({after for _, after in own}) > 1}
    numbers = {read: number for number, read in enumerate(open_, start=1)}
    return Continuations(several, numbers, list(open_.values()))
