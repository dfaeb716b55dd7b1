"""Of the digits in sums: how many tokens of the student's a `mapped` teacher teaches.

    python -m benchmarks.digits TEACHER STUDENT

Two tokenizers (folders or hub ids) on word problems with their worked answers, made here from a
seed in the manner of GSM8K. No model is needed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dwakd_plugin.tokenizers.alignment import TokenAligner, firsts, student_cuts
from dwakd_plugin.tokenizers.continuations import Read, continuations
from dwakd_plugin.tokenizers.pair import ByteCutter
from dwakd_plugin.tokenizers.side import load_side
from dwakd_plugin.tokenizers.spellings import spellings

PROBLEMS = 300
DIGIT = re.compile(rb"[0-9]")
NAMES = ("Ada", "Ben", "Carla", "Dmitri", "Elif", "Farid", "Grace", "Hana")
THINGS = ("pencils", "apples", "stickers", "tickets", "bricks", "cups", "shells", "stamps")


def answers(count: int = PROBLEMS, seed: int = 0) -> list[str]:
    """Worked answers with numbers of one to six digits, prices and thousands."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        who, thing = rng.choice(NAMES), rng.choice(THINGS)
        boxes, each = rng.randint(3, 60), rng.choice((12, 24, rng.randint(5, 400)))
        total, sold = boxes * each, rng.randint(2, boxes * each - 1)
        price = rng.choice((0.25, 0.5, 1.75, 2, 3.4, 12))
        earned = sold * price
        money = f"{earned:,.2f}" if rng.random() < 0.5 else f"{earned:g}"
        year = rng.randint(1950, 2030)
        found.append(
            f"{who} has {boxes} boxes of {each} {thing}, so {boxes} * {each} = "
            f"<<{boxes}*{each}={total}>>{total} {thing} in all.\n"
            f"Of those, {sold:,} are sold in {year} and {total - sold} are left.\n"
            f"At ${price:g} each that makes {sold} x {price:g} = ${money}.\n"
            f"#### {total - sold}"
        )
    return found


def taught_figures(
    teacher_tokenizer: Any, student_tokenizer: Any, cuts: Sequence[Read], texts: Sequence[str]
) -> dict[str, int]:
    """Counts of the student's tokens in texts, `digit_…` of those with a digit among them.

    tokens; taught_alike, where they begin as a token of the teacher's does that is no shorter;
    taught_inside, where they begin inside one (`continuations`, of the student's `cuts` of the
    teacher's tokens); and taught_spelt, where the teacher spells them with several. The rest is
    left to the labels.
    """
    sides = student_tokenizer, teacher_tokenizer
    spelt = spellings(student_cuts(*sides, rows_of(student_tokenizer)), firsts(cuts))
    aligner = TokenAligner(*sides, whole=False, continuations=continuations(cuts), spellings=spelt)
    pieces = ByteCutter(student_tokenizer, "student").pieces
    names = ("tokens", "taught_alike", "taught_inside", "taught_spelt")
    counts = {kind + name: 0 for kind in ("", "digit_") for name in names}
    for text in texts:
        # Nothing predicts a row's first token.
        ours, theirs = (
            [0, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
            for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        pairs, longer = aligner.aligned(ours, ours, theirs, theirs)
        how = {i: "taught_inside" if number else "taught_alike" for i, _, number in pairs}
        how |= {i: "taught_spelt" for i, _, _ in longer}
        for place, token in enumerate(ours[1:]):
            for kind in ("", "digit_") if DIGIT.search(pieces[token]) else ("",):
                counts[f"{kind}tokens"] += 1
                if place in how:
                    counts[kind + how[place]] += 1
    return counts


def rows_of(tokenizer: Any) -> int:
    """What a head needs for all of its tokens."""
    return 1 + max(tokenizer.get_vocab().values())


def main(
    teacher: Annotated[str, typer.Argument(help="Folder or hub id.")],
    student: Annotated[str, typer.Argument(help="Folder or hub id.")],
) -> None:
    theirs, own = load_side("teacher", teacher, False), load_side("student", student, False)
    sides = theirs.tokenizer, own.tokenizer
    cuts = student_cuts(*sides, rows_of(sides[0]))
    figures = taught_figures(*sides, cuts, answers())
    for kind, name in (("digit_", "with a digit"), ("", "in all")):
        count, alike, inside, spelt = (
            figures[kind + each]
            for each in ("tokens", "taught_alike", "taught_inside", "taught_spelt")
        )
        typer.echo(
            f"{count:,} of the student's tokens {name}; taught by the teacher: "
            f"{alike / count:.1%}, {(alike + inside) / count:.1%} with those inside its "
            f"tokens, and {(alike + inside + spelt) / count:.1%} with those that it spells"
        )
    entries = [len(each) for each in continuations(cuts).entries]
    typer.echo(
        f"Inside the teacher's tokens: {len(entries):,} beginnings, {sum(entries):,} entries"
    )


if __name__ == "__main__":
    typer.run(main)
