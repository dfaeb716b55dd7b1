"""The losses of the baselines that match tokens, against references and alone."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwakd_plugin.loss import (
    ContinuationTable,
    Head,
    LossTerms,
    ResponseStates,
    SpellingTable,
    alignment_of,
    dwakd_loss,
)
from dwakd_plugin.loss.terms.mapped import mapped_statistics
from dwakd_plugin.loss.terms.sorted import sorted_distance
from dwakd_plugin.loss.terms.student_space import StudentStatistics
from dwakd_plugin.models.teacher.top_tokens import top_of_states
from dwakd_plugin.recipe.schema import VARIANTS, LossConfig, SoftDTWConfig
from dwakd_plugin.tokenizers import continuations as tokenizers
from dwakd_plugin.tokenizers.spellings import Spellings, spellings
from tests.loss.cases import FIGURES, Case, assert_same, collate, gradients, make_case, single
from tests.loss.matched_references import (
    ALL_TERMS,
    COMPARED,
    Inside,
    Pairs,
    reference_exact,
    reference_mapped,
    reference_uld,
)


def loss_of(variant: str, **settings_: Any) -> LossConfig:
    return LossConfig(**VARIANTS[variant].get("loss", {}) | settings_)


def some_pairs(lengths: list[tuple[int, int]], seed: int) -> list[Pairs]:
    """Ascending, unique, of some of the positions; none of every fourth sample."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, (S, T) in enumerate(lengths):
        most = 0 if index % 4 == 3 else min(S, T)
        count = int(torch.randint(most + 1, (), generator=generator)) if most > 2 else most
        chosen = [
            torch.randperm(size, generator=generator)[:count].sort().values for size in (S, T)
        ]
        found.append(list(zip(*(side.tolist() for side in chosen), strict=True)))
    return found


def some_map(case: Case, pairs: list[Pairs], seed: int) -> Tensor:
    """A third of the teacher's tokens have no counterpart; of the pairs, every other agrees."""
    generator = torch.Generator().manual_seed(seed)
    student_rows, teacher_rows = (
        head.weight.shape[0] for head in (case.student_head, case.teacher_head)
    )
    found = torch.randint(student_rows, (teacher_rows,), generator=generator)
    found[torch.randperm(teacher_rows, generator=generator)[: teacher_rows // 3]] = -1
    for teacher, own in zip(case.teacher, pairs, strict=True):
        for _, j in own[::2]:
            best = case.teacher_head.logits(teacher.hidden[j : j + 1]).argmax()
            projected = case.projectors.t2s(teacher.hidden[j : j + 1])
            found[best] = case.student_head.logits(projected).argmax()
    return found


def some_inside(lengths: list[tuple[int, int]], pairs: list[Pairs], seed: int) -> list[Inside]:
    """Half of the student's positions that are not paired, each inside some teacher's token."""
    random = Random(seed)
    found: list[Inside] = []
    for (S, T), own in zip(lengths, pairs, strict=True):
        free = [i for i in range(S) if T and i not in dict(own)]
        chosen = random.sample(free, (len(free) + 1) // 2)
        found.append([(i, random.randrange(T), random.randint(1, READ)) for i in chosen])
    return found


def in_order(inside: list[Inside], pairs: list[Pairs]) -> list[Inside]:
    """The same positions of the student's, each inside what the pair before it predicts: as a path
    goes, and so that the cells of a band are those of a path."""
    return [
        [(i, max((j for own, j in paired if own < i), default=0), read) for i, _, read in each]
        for each, paired in zip(inside, pairs, strict=True)
    ]


READ = 4  # how many beginnings there are to be read


def some_entries(case: Case, seed: int) -> list[list[tuple[int, int]]]:
    """For each beginning, tokens of the teacher's and what they go on with."""
    random = Random(seed)
    rows, own = (head.weight.shape[0] for head in (case.teacher_head, case.student_head))
    return [
        [(token, random.randrange(own)) for token in random.sample(range(rows), rows // (1 + read))]
        for read in range(READ)
    ]


def some_spellings(case: Case, seed: int) -> Spellings:
    """Of most of the student's tokens two to four of the teacher's."""
    random = Random(seed)
    theirs, own = (head.weight.shape[0] for head in (case.teacher_head, case.student_head))
    few = random.sample(range(theirs), 4)  # so that many begin alike
    spelt = [
        tuple(random.choice(few) for _ in range(random.choice([0, 1, 2, 3, 4]))) for _ in range(own)
    ]
    return spellings(spelt, [random.randrange(-1, own) for _ in range(theirs)])


def some_spelt(
    case: Case, pairs: list[Pairs], inside: list[Inside], found: Spellings, seed: int
) -> list[Inside]:
    """The positions that are left and whose label has a spelling, with any place of the other
    side's for each of its beginnings."""
    random = Random(seed)
    places: list[Inside] = []
    for student, teacher, *taken in zip(case.student, case.teacher, pairs, inside, strict=True):
        own: Inside = []
        for i, label in enumerate(student.labels.tolist()):
            cut = found.spelt[label]
            known = any(i == first for one in taken for first, *_ in one)
            if known or len(cut) < 2 or not len(teacher.hidden):
                continue
            numbers = [0, *(found.numbers.get(cut[:n], 0) for n in range(1, len(cut) + 1))]
            own += [
                (i, random.randrange(len(teacher.hidden)), number)
                for depth, number in enumerate(numbers)
                if number or depth == 0
            ]
        places.append(own)
    return places


def evaluate(
    case: Case,
    loss: LossConfig,
    pairs: list[Pairs],
    mapped: Tensor,
    soft_dtw: SoftDTWConfig,
    *,
    inside: list[Inside] | None = None,
    entries: list[list[tuple[int, int]]] | None = None,
    spelt: list[Inside] | None = None,
    spellings: Spellings | None = None,
    order: list[int] | None = None,
    pad: tuple[int, int] = (0, 0),
    fill: float = 0.0,
    k: int | None = None,
) -> LossTerms:
    """k: the teacher gives so many of its likeliest tokens, and no states."""
    order = list(range(len(case.student))) if order is None else order
    student = collate([case.student[i] for i in order], case.student_head, pad=pad[0], fill=fill)
    teacher = collate([case.teacher[i] for i in order], case.teacher_head, pad=pad[1], fill=fill)
    if k is not None:
        teacher = likeliest_alone(teacher, k)
    S, T = student.hidden.shape[1], teacher.hidden.shape[1]
    flat = [(k * S + i, k * T + j, 0) for k, own in enumerate(order) for i, j in pairs[own]]
    if inside is not None:
        flat += [
            (k * S + i, k * T + j, read)
            for k, own in enumerate(order)
            for i, j, read in inside[own]
        ]
    ours, theirs, read = torch.tensor(flat, dtype=torch.long).view(-1, 3).T
    if spelt is not None and spellings is not None:
        flat = [
            (k * S + i, k * T + j, number)
            for k, own in enumerate(order)
            for i, j, number in spelt[own]
        ]
        flat.sort(key=lambda place: place[2] > 0)
        places = torch.tensor(flat, dtype=torch.long).view(-1, 3).T
        student = replace(student, spelt=places[0], spelt_read=places[2][places[2] > 0])
        how = SpellingTable(*map(torch.tensor, spellings.table()))
        teacher = replace(teacher, spelt=places[1], spellings=how)
    table = None
    if entries is not None:
        columns = tokenizers.Continuations({}, {}, entries).table()
        table = ContinuationTable(*map(torch.tensor, columns))
    return dwakd_loss(
        replace(student, pairs=ours, read=None if inside is None else read),
        replace(teacher, pairs=theirs, token_map=mapped, continuations=table),
        case.projectors if k is None else None,
        loss=loss,
        soft_dtw=soft_dtw,
    )


def likeliest_alone(teacher: ResponseStates, k: int) -> ResponseStates:
    top, nothing = top_of_states(teacher.hidden, teacher.head, k), teacher.hidden[..., :0]
    head = Head(teacher.head.weight[:, :0])
    return replace(
        teacher, input_embeds=nothing, target_embeds=nothing, hidden=nothing, head=head, top=top
    )


LENGTHS = [(6, 7), (5, 4), (1, 3), (4, 5), (3, 1), (2, 0), (0, 4), (4, 4)]
# No centre is a whole number of tenths away from a cell, so that rounding decides nothing.
BAND = SoftDTWConfig(band_width=0.937, band_penalty=0.7)


@pytest.mark.parametrize(
    ("variant", "further", "soft_dtw"),
    [
        ("dskdv2", {}, {}),
        ("dskdv2", {"divergence": "reverse_kl", "chunk_size": 2}, {}),
        ("dwakdv2", {}, {}),
        ("dwakdv2", {"divergence": "js", "student_weighting": "entropy", "chunk_size": 3}, {}),
        ("dwakdv2", {"temperature": 1.0, "kd_weight": 0.7}, {"band": False}),
        ("uld", {}, {}),
        ("uld", {"temperature": 1.7, "chunk_size": 3}, {}),
        ("mapped", {}, {}),
        ("mapped", {"student_weighting": "entropy_gate", "temperature": 1.7, "chunk_size": 3}, {}),
        ("mapped", {"student_weighting": "entropy", "divergence": "reverse_kl"}, {}),
        ("mapped", {"student_weighting": "entropy_then_gate", "chunk_size": 3}, {}),
        ("mapped", {"cosine_weight": 3.0, "chunk_size": 2}, {}),
        ("mapped", {"dtw_weight": 0.3}, {}),
        ("mapped", {"cosine_weight": 3.0, "dtw_weight": 0.3, "kd_weight": 0.0}, {"band": False}),
    ],
)
def test_agrees_with_the_plain_reference(
    variant: str, further: dict[str, Any], soft_dtw: dict[str, Any]
) -> None:
    seed = len(variant) + len(further)
    softcap = 5.0 if further else None
    # ULD's vocabularies: the student's is the smaller one in one case, the larger in the other.
    vocab = (17, 13) if further else (13, 17)
    case = make_case(LENGTHS, seed=seed, vocab=vocab, softcap=softcap)
    pairs = some_pairs(LENGTHS, seed)
    mapped = some_map(case, pairs, seed)
    loss, band = loss_of(variant, **further), BAND.model_copy(update=soft_dtw)
    read: dict[str, Any] = {}
    if variant == "mapped":
        inside = in_order(some_inside(LENGTHS, pairs, seed), pairs)
        read = {"inside": inside, "entries": some_entries(case, seed)}
        found = some_spellings(case, seed)
        read |= {"spelt": some_spelt(case, pairs, read["inside"], found, seed), "spellings": found}
        assert sum(map(len, read["spelt"])) > 3
    terms = evaluate(case, loss, pairs, mapped, band, **read, pad=(2, 1), fill=math.nan)
    if variant == "mapped" and loss.kd_weight > 0:
        both = [S for S, T in LENGTHS if S and T]
        assert int(terms.tokens_to_spell) == sum(both)
        assert int(terms.spelt_tokens) == sum(len({i for i, *_ in own}) for own in read["spelt"])
    expected = dict.fromkeys((*ALL_TERMS, *COMPARED), torch.zeros((), dtype=torch.float64))
    for index, (student, teacher) in enumerate(zip(case.student, case.teacher, strict=True)):
        found = (
            reference_uld(student, teacher, case, loss)
            if variant == "uld"
            else reference_mapped(
                student,
                teacher,
                pairs[index],
                mapped,
                case,
                loss,
                read["inside"][index],
                read["entries"],
                read["spelt"][index],
                read["spellings"],
                band,
            )
            if variant == "mapped"
            else reference_exact(student, teacher, pairs[index], mapped, case, loss, band)
        )
        for name, value in found.items():
            expected[name] = expected[name] + value
    if variant != "uld":
        assert expected["student_kd"] > 0  # some agree
    if loss.kd_weight == 0:
        expected |= dict.fromkeys(("student_kd", *COMPARED), 0 * expected["ce"].detach())
    for name in COMPARED:
        assert_same(getattr(terms, name), expected[name].detach(), name)
    for name in ALL_TERMS:
        assert_same(getattr(terms, name), expected[name], name)
        if not expected[name].requires_grad:
            assert expected[name] == 0
            continue
        ours, theirs = gradients(case, getattr(terms, name)), gradients(case, expected[name])
        for leaf in ours:
            assert_same(ours[leaf], theirs[leaf], f"∂{name}/∂{leaf}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=4),
    variant=st.sampled_from(["uld", "dskdv2", "dwakdv2", "mapped"]),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    fill=st.sampled_from([0.0, 1e30, math.nan]),
    chunk_size=st.sampled_from([1, 3, "auto"]),
    likeliest=st.sampled_from([None, 1, 4]),
    hidden=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_padding_batching_order_and_chunks_change_nothing(
    lengths: list[tuple[int, int]],
    variant: str,
    pad: tuple[int, int],
    fill: float,
    chunk_size: int | str,
    likeliest: int | None,
    hidden: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    case, pairs = make_case(lengths, seed=seed), some_pairs(lengths, seed)
    hidden = hidden and variant == "mapped"
    loss = loss_of(variant, **({"cosine_weight": 3.0, "dtw_weight": 0.3} if hidden else {}))
    mapped = some_map(case, pairs, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    chunked = loss.model_copy(update={"chunk_size": chunk_size})
    inside = some_inside(lengths, pairs, seed) if variant == "mapped" else None
    entries = None if inside is None else some_entries(case, seed)
    k = None if inside is None or hidden else likeliest
    found = None if inside is None or k is not None else some_spellings(case, seed)
    spelt = None if found is None else some_spelt(case, pairs, inside, found, seed)
    batch = evaluate(
        case,
        chunked,
        pairs,
        mapped,
        BAND,
        inside=inside,
        entries=entries,
        spelt=spelt,
        spellings=found,
        order=list(order),
        pad=pad,
        fill=fill,
        k=k,
    )
    alone = [
        evaluate(
            single(case, i),
            loss,
            [pairs[i]],
            mapped,
            BAND,
            inside=None if inside is None else [inside[i]],
            entries=entries,
            k=k,
            spelt=None if spelt is None else [spelt[i]],
            spellings=found,
        )
        for i in range(len(lengths))
    ]
    for name in ALL_TERMS + FIGURES:
        expected = torch.stack([getattr(terms, name) for terms in alone]).sum()
        assert_same(getattr(batch, name), expected, name, tolerance=1e-10)
    total = torch.stack([terms.total(loss) for terms in alone]).sum()
    ours, theirs = gradients(case, batch.total(loss)), gradients(case, total)
    for leaf in ours:
        assert_same(ours[leaf], theirs[leaf], leaf, tolerance=1e-10)


def test_each_term_trains_its_own() -> None:
    lengths = [(6, 6)]
    case = make_case(lengths, seed=2)
    pairs = [[(i, i) for i in range(6)]]
    mapped = some_map(case, pairs, 2)
    terms = evaluate(case, loss_of("dskdv2"), pairs, mapped, BAND)

    def trained(term: Tensor) -> set[str]:
        return {name for name, grad in gradients(case, term).items() if grad.any()}

    assert trained(terms.student_kd) == {"head", "head.bias", "hidden.0"}
    assert trained(terms.t2s_ce) == {"t2s.weight", "t2s.bias"}
    assert trained(terms.teacher_kd) == {"hidden.0", "s2t.weight", "s2t.bias"}
    others = evaluate(case, loss_of("mapped"), pairs, mapped, BAND)
    assert trained(others.student_kd) == {"head", "head.bias", "hidden.0"}
    uld = evaluate(case, loss_of("uld"), pairs, mapped, BAND)
    assert trained(uld.uld) == {"head", "head.bias", "hidden.0"}
    for leaf in case.leaves().values():
        leaf.retain_grad()
    uld.total(loss_of("uld")).backward()
    # Zeros, not None, for what nothing reaches.
    assert all(leaf.grad is not None for leaf in case.leaves().values())


def test_gradient_of_the_sorted_distance() -> None:
    generator = torch.Generator().manual_seed(4)
    student, larger, smaller = (
        torch.randn(3, size, generator=generator, dtype=torch.float64) for size in (7, 11, 5)
    )
    student.requires_grad_()
    for teacher in (larger, smaller):
        assert torch.autograd.gradcheck(lambda z, t=teacher: sorted_distance(z, t, 1.3), (student,))
    assert_same(sorted_distance(student, student.flip(-1), 1.0), torch.zeros(3).double(), "equal")
    apart = torch.tensor([[50.0, 0.0]]), torch.zeros(1, 1000)
    assert sorted_distance(*apart, 1.0) == pytest.approx(2 - 2 / 1000, rel=1e-5)


def test_gradient_where_the_teacher_is_given_what_was_read() -> None:
    """And what the teacher has not foreseen is learnt from its label."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        torch.randn(4, size, generator=generator, dtype=torch.float64) for size in (7, 11)
    )
    teacher[3, :2] = -30.0
    student.requires_grad_()
    labels, read = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 1])
    entries = [[(0, 3), (1, 4)], [(3, 2), (4, 2), (5, 0)]]
    table = ContinuationTable(*map(torch.tensor, tokenizers.Continuations({}, {}, entries).table()))
    token_map = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, -1, 1, 2])

    def columns(logits: Tensor, temperature: float) -> StudentStatistics:
        return mapped_statistics(
            logits, teacher, labels, read, token_map, table, "reverse_kl", temperature
        )

    for temperature in (1.0, 1.7):
        assert torch.autograd.gradcheck(lambda z, t=temperature: columns(z, t).divergence, student)
    found = columns(student, 1.0)
    assert found.divergence[3] == found.ce[3] and found.divergence[1] != found.ce[1]
    # 3 and 4 go on with 2, and 5 with 0.
    p = teacher[2].softmax(-1)
    assert found.t2s_ce[2] == pytest.approx(-float(((p[3] + p[4]) / p[3:6].sum()).log()))


def test_without_a_teacher_the_loss_is_the_labels_cross_entropy() -> None:
    case = make_case([(4, 3), (2, 2)])
    student = collate(case.student, case.student_head, pad=1, fill=math.nan)
    terms = dwakd_loss(student, None, None, loss=loss_of("sft"))
    expected = sum(
        torch.nn.functional.cross_entropy(
            case.student_head.logits(sample.hidden), sample.labels, reduction="sum"
        )
        for sample in case.student
    )
    assert isinstance(expected, Tensor)
    assert_same(terms.total(loss_of("sft")), expected, "ce")
    ours, theirs = gradients(case, terms.ce), gradients(case, expected)
    for leaf in ours:
        assert_same(ours[leaf], theirs[leaf], leaf)
    assert terms.distilled_tokens == 0
    with pytest.raises(ValueError, match="teacher is None"):
        dwakd_loss(student, None, None, loss=LossConfig())
    with pytest.raises(ValueError, match="needs"):
        teacher = collate(case.teacher, case.teacher_head)
        dwakd_loss(student, teacher, case.projectors, loss=loss_of("dskdv2"))


@pytest.mark.parametrize(("last", "ends"), [((2, 3), 1), ((2, 1), 0), ((1, 3), 0)])
def test_an_end_is_compared_where_both_sides_have_it(last: tuple[int, int], ends: int) -> None:
    case = make_case([(3, 4)])
    mapped = torch.zeros(case.teacher_head.weight.shape[0], dtype=torch.long)
    terms = evaluate(case, loss_of("dskdv2"), [[(0, 0), last]], mapped, BAND)
    assert terms.paired_tokens == 2 and terms.end_tokens == ends
    assert (terms.end_ce > 0) == (terms.teacher_end_ce > 0) == bool(ends)


def test_an_alignment_of_pairs_is_their_matrix() -> None:
    case = make_case([(3, 4)])
    student = replace(collate(case.student, case.student_head), pairs=torch.tensor([0, 2]))
    teacher = replace(collate(case.teacher, case.teacher_head), pairs=torch.tensor([1, 3]))
    found = alignment_of(student, teacher, case.projectors, soft_dtw=SoftDTWConfig(band_width=0.2))
    expected = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert torch.equal(found.attention[0].long(), expected)
    assert found.inside is not None
    # Half way between the pairs lies the third position.
    assert found.inside[0].long().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
