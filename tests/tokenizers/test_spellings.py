"""Student tokens that the teacher cuts in several: where they are, and what the teacher says."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dwakd_plugin.data.collator import DualCollator
from dwakd_plugin.loss import Head, ResponseStates, SpellingTable
from dwakd_plugin.loss.terms.spelt import first_divergences, further_divergences
from dwakd_plugin.tokenizers.alignment import TokenAligner, firsts, student_cuts
from dwakd_plugin.tokenizers.spellings import NOTHING_MORE, Spellings, spellings
from tests.tokenizers.small_tokenizers import TEXT, byte_level
from tests.tokenizers.test_continuations import of_digits, row


def spelt_by(teacher: Any, student: Any) -> Spellings:
    cuts = student_cuts(student, teacher, len(student) + 2)
    return spellings(cuts, firsts(student_cuts(teacher, student, len(teacher) + 3)))


def table_of(found: Spellings) -> SpellingTable:
    return SpellingTable(*map(torch.tensor, found.table()))


def test_each_digit_of_the_teachers_says_something_of_the_students_group() -> None:
    teacher, student = of_digits(1), of_digits(3)
    found = spelt_by(teacher, student)
    aligner = TokenAligner(student, teacher, whole=False, spellings=found)
    ours, theirs = row(student, "is 12345, 6"), row(teacher, "is 12345, 6")
    assert student.convert_ids_to_tokens(ours)[4:6] == ["123", "45"]
    read = {number: teacher.convert_ids_to_tokens(r) for r, number in found.numbers.items()}
    pairs, spelt = aligner.aligned(ours, ours, theirs, theirs)
    # "123" by three positions; "45" by two, and the third, of "," says that it goes no further.
    assert [(i, j, read.get(number, [])) for i, j, number in spelt] == [
        (3, 3, []),
        (3, 4, ["1"]),
        (3, 5, ["1", "2"]),
        (4, 6, []),
        (4, 7, ["4"]),
        (4, 8, ["4", "5"]),
    ]
    assert {i for i, _, _ in pairs} | {i for i, _, _ in spelt} == set(range(len(ours) - 1))
    alone = TokenAligner(student, teacher, whole=False).aligned(ours, ours, theirs, theirs)
    assert alone == (pairs, [])


@cache
def pair() -> tuple[Any, Any, Spellings]:
    teacher, student = byte_level(300), byte_level(900)
    return teacher, student, spelt_by(teacher, student)


@given(text=TEXT)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_nothing_is_both_paired_and_spelt(text: str) -> None:
    teacher, student, found = pair()
    aligner = TokenAligner(student, teacher, whole=False, spellings=found)
    ours, theirs = row(student, text), row(teacher, text)
    pairs, spelt = aligner.aligned(ours, ours, theirs, theirs)
    assert not {i for i, _, _ in pairs} & {i for i, _, _ in spelt}
    for i, j, number in spelt:
        read = next((r for r, n in found.numbers.items() if n == number), ())
        first = j - len(read)
        assert theirs[1 + first : 1 + j] == [*read]
        assert found.spelt[ours[1 + i]][: len(read)] == read
        assert (i, first, 0) in spelt


# --- what the teacher says, against a student that picks a token and spells it -------------------

# Of six tokens: the spellings of two end within others, two begin with what no token is.
SPELT = [(0,), (0, 1), (0, 1, 2), (3, 3), (3, 4), (5,)]
FIRST_OF = [0, 5, 3, 3, -1, 5, 4]  # of the teacher's seven tokens the student's that it begins with


def nodes_of(token: int, found: Spellings) -> list[tuple[int, int]]:
    """(depth, number) of all beginnings of a token's spelling that something else may follow."""
    cut = SPELT[token]
    further = [(n, found.numbers.get(cut[:n], 0)) for n in range(1, len(cut) + 1)]
    return [(0, 0), *((n, number) for n, number in further if number)]


def divergences(student: Tensor, teacher: Tensor, token: int, number: int, **how: Any) -> Tensor:
    found = spellings(SPELT, FIRST_OF)
    return (further_divergences if number else first_divergences)(
        student.log()[None],
        teacher.log()[None],
        torch.tensor([token]),
        torch.tensor([number]),
        table_of(found),
        how.get("divergence", "forward_kl"),
        how.get("temperature", 1.0),
    )[0][0]


def random_distribution(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).softmax(-1)


def test_in_sum_it_is_the_divergence_of_what_picks_a_token_and_spells_it() -> None:
    """The chain rule: E over q of the sums along each token's spelling is KL(q ‖ p), where the
    teacher spells what q picks."""
    found = spellings(SPELT, FIRST_OF)
    p, q = random_distribution(6, seed=1), random_distribution(6, seed=2)
    expected = (q * (q / p).log()).sum()
    total = torch.zeros((), dtype=torch.float64)
    for token in range(6):
        for depth, number in nodes_of(token, found):
            read = SPELT[token][:depth]
            says = torch.full((7,), 1e-300, dtype=torch.float64)
            left = 0.0
            for other, cut in enumerate(SPELT):
                if cut[:depth] == read and len(cut) > depth:
                    says[cut[depth]] += q[other]
                elif cut == read:
                    left += float(q[other])
            says[6] += left  # the token that nothing is spelt with: the spelling is over
            total += q[token] * divergences(p, says / says.sum(), token, number)
    assert torch.allclose(total, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("token", range(6))
def test_a_sure_teacher_is_the_label(token: int) -> None:
    """Along a spelling, one-hot at each of its tokens and then elsewhere: −log p_s(y)."""
    found = spellings(SPELT, FIRST_OF)
    p = random_distribution(6, seed=3)
    total = torch.zeros((), dtype=torch.float64)
    for depth, number in nodes_of(token, found):
        next_token = (*SPELT[token], 6)[depth]
        sure = torch.full((7,), 1e-300, dtype=torch.float64)
        sure[next_token] = 1.0
        total += divergences(p, sure, token, number)
    assert torch.allclose(total, -p[token].log(), rtol=1e-12, atol=0)


def test_a_longer_token_of_the_teachers_stands_for_what_it_begins_with() -> None:
    """Its tokens 2 and 6 begin with the student's 3 and 4, which are spelt with 3 first."""
    found = spellings(SPELT, FIRST_OF)
    assert found.groups == [0, 5, 3, 3, -1, 5, 3]
    assert found.entries[found.numbers[(0,)] - 1] == [(1, 1), (2, 1), (0, NOTHING_MORE)]
    p, q = random_distribution(6, seed=4), random_distribution(7, seed=5)
    masses = torch.tensor([[q[0], q[2] + q[3] + q[6], q[1] + q[5]]]) / (1 - q[4])
    own = torch.stack([p[:3].sum(), p[3] + p[4], p[5]])
    expected = (masses[0] * (masses[0] / own).log()).sum()
    assert torch.allclose(divergences(p, q, 1, 0), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("number", range(4))
def test_gradients(divergence: str, number: int) -> None:
    found = spellings(SPELT, FIRST_OF)
    assert number <= len(found.entries)
    token = 2 if number < 3 else 3
    logits = random_distribution(6, seed=6).log()[None].requires_grad_()
    teacher = random_distribution(7, seed=7).log()[None].requires_grad_()

    def value(student: Tensor) -> Tensor:
        arguments = torch.tensor([token]), torch.tensor([number]), table_of(found)
        of = further_divergences if number else first_divergences
        return of(student, teacher, *arguments, divergence, 1.3)[0]

    assert torch.autograd.gradcheck(value, (logits,))
    value(logits).sum().backward()
    assert teacher.grad is None


def test_a_teacher_that_says_nothing_of_what_may_follow_leaves_the_label() -> None:
    """Behind (3,) only its tokens 3 and 4 may come, and nothing ends there."""
    found = spellings(SPELT, FIRST_OF)
    p = random_distribution(6, seed=8)
    silent = torch.full((7,), 1e-9, dtype=torch.float64)
    silent[0] = 1.0
    value = divergences(p, silent / silent.sum(), 4, found.numbers[(3,)])
    assert torch.allclose(value, -(p[4] / (p[3] + p[4])).log(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_batches_say_what_is_spelt_however_they_are_laid_out(padding_side: str) -> None:
    teacher, student = of_digits(1), of_digits(3)
    student.pad_token = student.eos_token
    student.padding_side = padding_side
    aligner = TokenAligner(student, teacher, whole=False, spellings=spelt_by(teacher, student))
    rows = []
    for index, text in enumerate(["12345", "no digits", "7 and 89", "0.123"]):
        ours, theirs = row(student, text), row(teacher, text)
        sides = {"input_ids": ours, "teacher_input_ids": theirs, "attention_mask": [1] * len(ours)}
        rows.append(sides | {"labels": ours, "teacher_labels": theirs, "source_row": index})
    collator = DualCollator(student, aligner=aligner)
    batch, packed = collator(rows), collator([rows])
    names = ("student_spelt", "teacher_spelt", "student_spelt_read")
    for name in names:
        assert torch.equal(packed[name], batch[name])
    for index, own in enumerate(rows):
        alone = collator([own])
        for side, name in zip(("student", "teacher"), names, strict=False):
            width = batch[f"{side}_positions"].shape[1]
            here = batch[name] // width == index
            assert torch.equal(batch[name][here] % width, alone[name])
            nothing = torch.zeros(len(rows), width, 1)
            states = ResponseStates(
                *[nothing] * 3,
                batch[f"{side}_lengths"],
                Head(nothing[0]),
                spelt=batch[name],
                spelt_read=batch[names[2]],
            )
            sample = states.sample(index)
            assert sample.spelt is not None and torch.equal(sample.spelt, alone[name])
            assert sample.spelt_read is not None
            assert torch.equal(sample.spelt_read, alone[names[2]])
    assert len(batch[names[2]]) == 3 + 1 + 2  # of "123" two, of "45", "89" one and two
    assert batch[names[2]].min() > 0 and len(batch[names[0]]) == 4 + len(batch[names[2]])
