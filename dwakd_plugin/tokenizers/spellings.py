"""How the teacher spells the student's tokens: what it says of one that is several of its own.

A student that reads `123` where the teacher reads `1`, `2`, `3` is taught by all three positions.
The first says how likely each beginning is, and so what all of the student's tokens that the
teacher spells with it have together; the second the same given `1`; and the position behind the
last whether the student's token goes on, as `1234` would. In sum that is the divergence over what
the teacher reads, of a student that picks a token and spells it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dwakd_plugin.tokenizers.continuations import Read

NOTHING_MORE = -1


@dataclass(frozen=True)
class Spellings:
    """Of the student's tokens, by the teacher's cut of each, `spelt`, empty where there is none.

    groups   for each of the teacher's tokens the first token of a spelling that it stands for, its
             own or that of the student's token that it begins with; −1 where there is none
    numbers  of beginnings of spellings, from 1: those that more than one thing may follow
    entries  for each number, from 1, the student's tokens that are spelt so, and the teacher's
             token that comes next; NOTHING_MORE for the one that ends there
    """

    spelt: Sequence[Read]
    groups: list[int]
    numbers: dict[Read, int]
    entries: list[list[tuple[int, int]]]

    def nodes(
        self, student_token: int, teacher_tokens: Sequence[int], at: int
    ) -> list[tuple[int, int]]:
        """Which of the teacher's positions from `at` on say something of a student's token that
        begins there, from 0, and the number of the beginning before each, 0 for none.

        Empty unless the teacher has spelt it there as it spells it by itself, in several tokens.
        """
        cut = self.spelt[student_token] if student_token < len(self.spelt) else ()
        if len(cut) < 2 or tuple(teacher_tokens[at : at + len(cut)]) != cut:
            return []
        depths = range(1, min(len(cut) + 1, len(teacher_tokens) - at))
        further = [(n, self.numbers[cut[:n]]) for n in depths if cut[:n] in self.numbers]
        return [(0, 0), *further]

    def table(self) -> tuple[list[int], ...]:
        """The fields of `loss.states.SpellingTable`, in its order."""
        firsts = [cut[0] if cut else -1 for cut in self.spelt]
        starts, outcome_starts = [0, 0], [0, 0]  # number 0 has none
        students: list[int] = []
        places: list[int] = []
        outcomes: list[int] = []
        for own in self.entries:
            found = sorted({token for _, token in own} - {NOTHING_MORE})
            place = {NOTHING_MORE: 0} | {token: n for n, token in enumerate(found, start=1)}
            by_place = sorted((place[after], token) for token, after in own)
            students += [token for _, token in by_place]
            places += [number for number, _ in by_place]
            outcomes += found
            starts.append(len(students))
            outcome_starts.append(len(outcomes))
        return firsts, self.groups, starts, students, places, outcome_starts, outcomes


def spellings(spelt: Sequence[Read], first_of: Sequence[int]) -> Spellings:
    """From the teacher's cut of each row of the student's head, and for each of the teacher's
    tokens the student's that it begins with, −1 where none, which may be beyond the head."""
    firsts = {cut[0] for cut in spelt if cut}
    groups = [
        token if token in firsts else next(iter(spelt[own] if 0 <= own < len(spelt) else ()), -1)
        for token, own in enumerate(first_of)
    ]
    by_read: dict[Read, list[tuple[int, int]]] = defaultdict(list)
    for token, cut in enumerate(spelt):
        for depth in range(1, len(cut)):
            by_read[cut[:depth]].append((token, cut[depth]))
    for token, cut in enumerate(spelt):
        if cut in by_read:
            by_read[cut].append((token, NOTHING_MORE))
    open_ = {read: own for read, own in by_read.items() if len({after for _, after in own}) > 1}
    numbers = {read: number for number, read in enumerate(open_, start=1)}
    return Spellings(spelt, groups, numbers, [*open_.values()])
