"""Student tokens inside a teacher's: which they are, and what the teacher then says of them."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.digits import taught_figures
from dwakd_plugin.data.collator import DualCollator
from dwakd_plugin.loss import ContinuationTable
from dwakd_plugin.loss.terms.mapped import mapped_statistics
from dwakd_plugin.tokenizers.alignment import TokenAligner, firsts, student_cuts
from dwakd_plugin.tokenizers.continuations import continuations
from dwakd_plugin.tokenizers.pair import ByteCutter
from tests.tokenizers.small_tokenizers import LOSSLESS, TEXT, byte_level

DIGITS = "0123456789"


def of_digits(most: int) -> Any:
    """A byte-level tokenizer that reads so many digits at once, from the left, and else bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    groups = ["".join(each) for n in range(2, most + 1) for each in product(DIGITS, repeat=n)]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *groups, "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, [(group[:-1], group[-1]) for group in groups]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\d{{1,{most}}}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def row(tokenizer: Any, text: str) -> list[int]:
    """Ids behind one that nothing predicts, for labels too."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [0, *ids]


def test_the_teacher_says_which_digit_comes_next_given_those_read() -> None:
    """Against the sums over all of the teacher's tokens that begin with the digits read."""
    teacher, student = of_digits(3), of_digits(1)
    cuts = student_cuts(teacher, student, len(teacher) + 2)
    inside = continuations(cuts)
    aligner = TokenAligner(student, teacher, whole=False, continuations=inside)
    ours, theirs = row(student, "is 12345, 67"), row(teacher, "is 12345, 67")
    assert teacher.convert_ids_to_tokens(theirs)[1:] == ["i", "s", "Ġ", "123", "45", ",", "Ġ", "67"]
    number = {tuple(student.convert_ids_to_tokens(r)): n for r, n in inside.numbers.items()}
    read = {3: (), 4: ("1",), 5: ("1", "2"), 6: (), 7: ("4",), 10: (), 11: ("6",)}
    expected = [(3, 3), (4, 3), (5, 3), (6, 4), (7, 4), (10, 7), (11, 7)]
    found = aligner.aligned(ours, ours, theirs, theirs)[0]
    assert [each for each in found if each[0] in read] == [
        (i, j, number.get(read[i], 0)) for i, j in expected
    ]
    assert len(found) == len(ours) - 1 and aligner.pairs(ours, ours, theirs, theirs) == [
        (i, j) for i, j, n in found if n == 0
    ]

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(found), len(cuts), generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    said = {}  # −log of what the teacher says of each of the student's tokens, by position
    for token in range(len(student)):
        said[token] = mapped_statistics(
            torch.zeros(len(found), len(student), dtype=torch.float64),
            logits,
            torch.full((len(found),), token),
            torch.tensor([n for _, _, n in found]),
            torch.tensor(firsts(cuts)),
            ContinuationTable(*map(torch.tensor, inside.table())),
            "forward_kl",
            1.0,
        ).t2s_ce
    groups = {
        index: token for token, index in teacher.get_vocab().items() if token.strip(DIGITS) == ""
    }
    for i in read:
        before = "".join(read[i])
        begun = {
            v: text for v, text in groups.items() if text.startswith(before) and text != before
        }
        total = p[i, list(begun)].sum() if before else p[i, : len(teacher)].sum()
        for digit in DIGITS:
            goes_on = [v for v, text in begun.items() if text.startswith(before + digit)]
            expected_nats = -float((p[i, goes_on].sum() / total).log())
            token = student.convert_tokens_to_ids(digit)
            assert float(said[token][i]) == pytest.approx(expected_nats, rel=1e-9), (i, digit)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=TEXT)
def test_what_was_read_is_what_the_student_read(text: str) -> None:
    text = "".join(part for part in text if part not in "<>▁")
    for teacher, student, aligner, plain, _ in PAIRS:
        ours, theirs = row(student, text), row(teacher, text)
        found = aligner.aligned(ours, ours, theirs, theirs)[0]
        assert plain.pairs(ours, ours, theirs, theirs) == [(i, j) for i, j, n in found if n == 0]
        inside = aligner._continuations
        assert inside is not None
        begins = {j: i for i, j, n in found if n == 0}
        read = {n: r for r, n in inside.numbers.items()}
        for i, j, n in found:
            if n:
                assert read[n] == tuple(ours[1:][begins[j] : i])
                assert (theirs[1:][j], ours[1:][i]) in inside.entries[n - 1]
        for before, after in pairwise(found):
            assert before[0] < after[0] and before[1] <= after[1]


@pytest.mark.parametrize("which", range(3))
def test_entries_are_all_of_the_teachers_tokens_that_begin_so(which: int) -> None:
    *_, aligner, _, cuts = PAIRS[which]
    inside = aligner._continuations
    assert inside is not None and len(inside.numbers) > 5
    starts, of_teacher, of_student = inside.table()
    for read, n in inside.numbers.items():
        expected = [
            (v, cut[len(read)])
            for v, cut in enumerate(cuts)
            if cut[: len(read)] == read and len(cut) > len(read)
        ]
        places = slice(starts[n], starts[n + 1])
        assert list(zip(of_teacher[places], of_student[places], strict=True)) == expected
        assert len({after for _, after in expected}) > 1  # a single one is the label


def pair_of(teacher: Any, student: Any) -> tuple[Any, ...]:
    cuts = student_cuts(teacher, student, len(teacher))
    aligner = TokenAligner(student, teacher, whole=False, continuations=continuations(cuts))
    return teacher, student, aligner, TokenAligner(student, teacher, whole=False), cuts


PAIRS = [
    pair_of(teacher, student)
    for teacher, student in (
        (byte_level(900), byte_level(300)),
        (byte_level(900), LOSSLESS["SentencePiece, space before every run"]()),
        (LOSSLESS["SentencePiece, as a normaliser"](), byte_level(300)),
    )
]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_batches_say_what_was_read_however_they_are_laid_out(padding_side: str) -> None:
    teacher, student, aligner, *_ = pair_of(of_digits(3), of_digits(1))
    student.pad_token = student.eos_token
    student.padding_side = padding_side
    rows = []
    for index, text in enumerate(["12345", "7 and 89", "0.123"]):
        ours, theirs = row(student, text), row(teacher, text)
        sides = {"input_ids": ours, "teacher_input_ids": theirs, "attention_mask": [1] * len(ours)}
        rows.append(sides | {"labels": ours, "teacher_labels": theirs, "source_row": index})
    collator = DualCollator(student, aligner=aligner)
    batch, packed = collator(rows), collator([rows])
    for name in ("student_pairs", "teacher_pairs", "student_read"):
        assert torch.equal(packed[name], batch[name])
    alone = torch.cat([collator([each])["student_read"] for each in rows])
    assert torch.equal(alone, batch["student_read"])
    assert (alone > 0).sum() == 3 + 1 + 2


def test_figures_count_digits_by_how_they_are_taught() -> None:
    teacher, student, *_, cuts = pair_of(of_digits(3), of_digits(1))
    found = taught_figures(teacher, student, cuts, ["a 12345"])
    assert found == {
        "tokens": 7,
        "taught_alike": 4,
        "taught_inside": 3,
        "taught_spelt": 0,
        "digit_tokens": 5,
        "digit_taught_alike": 2,
        "digit_taught_inside": 3,
        "digit_taught_spelt": 0,
    }
    pieces = ByteCutter(teacher, "teacher").pieces
    assert pieces[teacher.convert_tokens_to_ids("123")] == b"123"
    # The other way round the teacher spells what the student reads at once.
    back = taught_figures(
        student, teacher, student_cuts(student, teacher, len(student)), ["a 12345"]
    )
    assert back["digit_tokens"] == back["digit_taught_spelt"] == 2
