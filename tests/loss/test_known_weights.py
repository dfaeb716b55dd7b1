"""Where the weights of tokens are known beforehand, gradients are formed with the objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dwakd_plugin.loss import Head, LossTerms, dwakd_loss, variant_of
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig
from tests.loss.cases import assert_same, collate, gradients, make_case
from tests.loss.test_matched import (
    evaluate,
    loss_of,
    some_map,
    some_pairs,
    some_spellings,
    some_spelt,
)

LENGTHS = [(5, 4), (3, 6), (4, 0), (6, 7)]
KNOWN = {
    "mapped": loss_of("mapped", chunk_size=3),
    "softened": loss_of("mapped", chunk_size=3, temperature=2.0, divergence="reverse_kl"),
    "mapped with hidden states": loss_of("mapped", chunk_size=3, cosine_weight=0.7, dtw_weight=0.3),
    "sft": loss_of("sft", chunk_size=3),
    "uld": loss_of("uld", chunk_size=4),
}


def terms_of(
    loss: LossConfig, products: list[int] | None = None, *, longer: bool = True
) -> tuple[Any, LossTerms]:
    """`longer`: some of the student's tokens are spelt by the teacher, in a pass of their own."""
    case = make_case(LENGTHS, softcap=3.0)
    pairs = some_pairs(LENGTHS, 1)
    token_map = some_map(case, pairs, 2)
    if products is not None:
        products.clear()  # the map's own
    found = some_spellings(case, 3)
    spelt = None
    if loss.matching == "mapped" and longer:
        spelt = some_spelt(case, pairs, [[] for _ in pairs], found, 4)
        assert sum(map(len, spelt)) > 3
    how = {"spelt": spelt, "spellings": found}
    return case, evaluate(case, loss, pairs, token_map, SoftDTWConfig(), **how)


def term_by_term(terms: LossTerms, loss: LossConfig, ramp: float = 1.0) -> Tensor:
    weights = LossTerms.weights(loss, ramp)
    return torch.stack([weight * getattr(terms, name) for name, weight in weights.items()]).sum()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the head, for each of its products."""
    made: list[int] = []
    logits = Head.logits

    def counted(self: Head, hidden: Tensor) -> Tensor:
        made.append(len(self.weight))
        return logits(self, hidden)

    monkeypatch.setattr(Head, "logits", counted)
    return made


@pytest.mark.parametrize("name", KNOWN)
def test_formed_in_forward_they_are_those_of_the_terms(name: str, products: list[int]) -> None:
    case, terms = terms_of(KNOWN[name], products)
    forward = len(products)
    total, expected = terms.total(KNOWN[name]), term_by_term(terms, KNOWN[name])
    assert_same(total, expected, "total")
    found = gradients(case, total / 7)
    assert len(products) == forward, "backward goes through no head"
    wanted = gradients(case, expected / 7)
    assert len(products) == 2 * forward, "each term by itself does"
    for leaf, grad in found.items():
        assert_same(grad, wanted[leaf], leaf)
    # What was formed in forward is gone by now: once more, and beside a term of its own.
    for leaf, grad in gradients(case, total + terms.ce).items():
        assert_same(grad, 7 * wanted[leaf] + gradients(case, terms.ce)[leaf], leaf)


def test_with_a_term_of_its_own_in_one_backward() -> None:
    loss = KNOWN["mapped"]
    case, terms = terms_of(loss)
    found = gradients(case, terms.total(loss) - 2 * terms.student_kd)
    expected = gradients(case, term_by_term(terms, loss) - 2 * terms.student_kd)
    for leaf, grad in found.items():
        assert_same(grad, expected[leaf], leaf)


def test_a_ramp_that_the_loss_was_not_told_of(products: list[int]) -> None:
    loss = KNOWN["mapped"]
    case, terms = terms_of(loss, products, longer=False)
    forward = len(products)
    assert_same(terms.total(loss, 0.25), term_by_term(terms, loss, 0.25), "total")
    gradients(case, terms.total(loss, 0.25))
    assert len(products) == 2 * forward


def test_weights_that_hang_on_the_pass_are_left_to_backward(products: list[int]) -> None:
    loss = loss_of("mapped", chunk_size=3, student_weighting="entropy")
    case, terms = terms_of(loss, products, longer=False)
    forward = len(products)
    gradients(case, terms.total(loss))
    assert len(products) == 2 * forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_chunks_cost_a_half_precision_head_no_digits(dtype: torch.dtype) -> None:
    case = make_case([(128, 0)], width=(16, 7), vocab=(50, 17), dtype=torch.float32)
    head = replace(case.student_head, weight=case.student_head.weight.detach().to(dtype), bias=None)
    errors = {}
    for chunk, own in ((128, head.weight.float()), (128, head.weight), (1, head.weight)):
        leaf = own.clone().requires_grad_()
        loss = loss_of("sft", chunk_size=chunk)
        student = collate(case.student, replace(head, weight=leaf))
        (dwakd_loss(student, None, None, loss=loss).total(loss) / 128).backward()
        assert leaf.grad is not None and leaf.grad.dtype == own.dtype
        if own.dtype == torch.float32:
            exact = leaf.grad
        else:
            errors[chunk] = float((leaf.grad.float() - exact).norm() / exact.norm())
    assert errors[1] < 1.5 * errors[128], errors


@pytest.mark.parametrize("name", ["mapped", "uld", "sft"])
def test_what_reads_no_embeddings_needs_none(name: str) -> None:
    loss = KNOWN[name]
    assert not variant_of(loss).needs_embeds(loss)
    case = make_case(LENGTHS)
    pairs = torch.tensor([[0, 2, 7], [1, 2, 7]])
    teacher = collate(case.teacher, case.teacher_head)
    teacher = replace(teacher, pairs=pairs[1], token_map=torch.arange(17) % 13)
    student = replace(collate(case.student, case.student_head), pairs=pairs[0])
    none = student.hidden[..., :0].detach()
    without = replace(student, input_embeds=none, target_embeds=none)
    teacher_side = teacher if loss.needs_teacher else None
    results = [dwakd_loss(side, teacher_side, None, loss=loss) for side in (student, without)]
    assert vars(results[0]) == vars(results[1])
    ours, theirs = (gradients(case, terms.total(loss)) for terms in results)
    assert all(torch.equal(ours[leaf], theirs[leaf]) for leaf in ours)
