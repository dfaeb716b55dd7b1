"""The cosine of hidden states beside `mapped`: by itself, and what it leaves as it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dwakd_plugin.loss import LossTerms, dwakd_loss, variant_of
from dwakd_plugin.loss.terms.cosine import cosine_distances
from dwakd_plugin.loss.variants import VARIANTS
from dwakd_plugin.recipe.schema import LossConfig
from tests.loss.cases import Case, assert_same, collate, gradients, make_case
from tests.loss.test_matched import (
    BAND,
    evaluate,
    loss_of,
    some_entries,
    some_inside,
    some_map,
    some_pairs,
)

LENGTHS = [(6, 7), (5, 4), (2, 0), (0, 4), (4, 4)]


def terms_of(loss: LossConfig, *, seed: int = 3) -> tuple[Case, LossTerms]:
    case, pairs = make_case(LENGTHS, seed=seed), some_pairs(LENGTHS, seed)
    inside = some_inside(LENGTHS, pairs, seed)
    further = {"inside": inside, "entries": some_entries(case, seed)}
    return case, evaluate(case, loss, pairs, some_map(case, pairs, seed), BAND, **further)


def test_distances_and_their_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    expected = [
        1 - math.fsum(a * b for a, b in zip(p, q, strict=True)) / math.dist(p, o) / math.dist(q, o)
        for p, q, o in zip(x.tolist(), y.tolist(), [[0.0] * 3] * 5, strict=True)
    ]
    assert_same(cosine_distances(x, y), torch.tensor(expected, dtype=torch.float64), "1 - cos")
    assert torch.autograd.gradcheck(cosine_distances, (x.requires_grad_(), y.requires_grad_()))


def test_neither_scale_nor_a_zero_vector_matters() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    y = torch.tensor([[6e10, 8e10], [1.0, 0.0], [-1e-10, 0.0]], requires_grad=True)
    distances = cosine_distances(x, y)
    torch.testing.assert_close(distances, torch.tensor([0.0, 1.0, 2.0]))
    distances.sum().backward()
    assert x.grad is not None and y.grad is not None
    assert x.grad.isfinite().all() and y.grad.isfinite().all()
    assert not x.grad[1].any() and not y.grad[1].any()


def test_without_a_weight_the_loss_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = loss_of("mapped", chunk_size=3)
    cases = [terms_of(loss)]
    mapped = VARIANTS["mapped"]
    before = replace(mapped, terms=mapped.terms[:2])
    assert [term.name for term in before.terms] == ["ce", "student_kd"]
    monkeypatch.setitem(VARIANTS, "mapped", before)
    cases.append(terms_of(loss))
    terms, expected = (one for _, one in cases)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(terms, name), value), name
    assert torch.equal(terms.total(loss), expected.total(loss))
    ours, theirs = (gradients(case, one.total(loss)) for case, one in cases)
    assert all(torch.equal(ours[leaf], theirs[leaf]) for leaf in ours)


def test_it_is_added_to_a_loss_that_stays_and_trains_body_and_t2s() -> None:
    loss, bare = loss_of("mapped", cosine_weight=3.0), loss_of("mapped")
    case, terms = terms_of(loss)
    _, without = terms_of(bare)
    assert 0 < terms.hidden_pairs < terms.paired_tokens  # those inside a token are left out
    assert 0 < terms.hidden_cosine < 2 * terms.hidden_pairs
    assert_same(terms.total(loss), without.total(bare) + 3 * terms.hidden_cosine, "total")
    found = gradients(case, terms.hidden_cosine)
    hidden = {name for name in found if name.startswith("hidden.")}
    trained = {name for name, grad in found.items() if grad.any()}
    assert {"t2s.weight", "t2s.bias"} < trained <= {"t2s.weight", "t2s.bias"} | hidden


def test_the_cosine_reads_no_embeddings_and_soft_dtw_does() -> None:
    case, loss = make_case([(4, 5)]), loss_of("mapped", cosine_weight=3.0)
    warped = loss_of("mapped", dtw_weight=3.0)
    assert not variant_of(loss).needs_embeds(loss) and variant_of(warped).needs_embeds(warped)
    teacher = collate(case.teacher, case.teacher_head)
    teacher = replace(teacher, pairs=torch.arange(3), token_map=torch.arange(17) % 13)
    student = replace(collate(case.student, case.student_head), pairs=torch.arange(3))
    none = student.hidden[..., :0].detach()
    without = replace(student, input_embeds=none, target_embeds=none)

    def grads(side: object) -> dict[str, Tensor]:
        terms = dwakd_loss(side, teacher, case.projectors, loss=loss)  # type: ignore[arg-type]
        return gradients(case, terms.total(loss))

    ours, theirs = grads(student), grads(without)
    assert ours["t2s.weight"].any()
    assert all(torch.equal(ours[leaf], theirs[leaf]) for leaf in ours)
