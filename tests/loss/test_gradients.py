"""What each term trains, what is a constant, and what gets zeros."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from dwakd_plugin.loss import Head, LossTerms, ResponseStates, dwakd_loss
from dwakd_plugin.loss.alignment import valid_positions
from dwakd_plugin.recipe.schema import LossConfig
from tests.loss.cases import FIGURES, TERMS, collate, evaluate, gradients, make_case

WEIGHTS = ("ce_weight", "kd_weight", "dtw_weight")


def test_padding_takes_no_gradient() -> None:
    case = make_case([(3, 4), (2, 2)])
    student = collate(case.student, case.student_head, pad=2, fill=math.nan)
    teacher = collate(case.teacher, case.teacher_head, pad=2, fill=math.nan)
    hidden = student.hidden.detach().requires_grad_()
    embeds = student.target_embeds.detach().requires_grad_()
    student = replace(student, hidden=hidden, target_embeds=embeds)
    dwakd_loss(student, teacher, case.projectors).total(LossConfig()).backward()
    valid = valid_positions(student.lengths, hidden.shape[1])
    for grad in (hidden.grad, embeds.grad):
        assert (grad[~valid] == 0).all()
        assert (grad[valid] != 0).any(-1).all()


def test_constants_take_no_gradient() -> None:
    case = make_case([(3, 4)])
    student = collate(case.student, case.student_head)
    teacher = collate(case.teacher, case.teacher_head)
    constants = [student.input_embeds, teacher.input_embeds, teacher.target_embeds, teacher.hidden]
    constants += [teacher.head.weight, teacher.head.bias]
    constants = [tensor.detach().requires_grad_() for tensor in constants]
    student = replace(student, input_embeds=constants[0])
    teacher = ResponseStates(*constants[1:4], teacher.lengths, Head(*constants[4:]))
    total = dwakd_loss(student, teacher, case.projectors).total(LossConfig())
    assert torch.autograd.grad(total, constants, allow_unused=True) == (None,) * len(constants)


def test_target_and_projected_head_are_constants() -> None:
    """KD_student trains the student alone, CE_t2s the projectors alone."""
    case = make_case([(3, 4)])
    terms = evaluate(case)
    kd, t2s = gradients(case, terms.student_kd), gradients(case, terms.t2s_ce)
    trained_by_kd = {name for name, grad in kd.items() if grad.any()}
    trained_by_t2s = {name for name, grad in t2s.items() if grad.any()}
    assert trained_by_kd == {"head", "head.bias", "hidden.0"}
    assert trained_by_t2s == {"query.weight", "query.bias", "t2s.weight", "t2s.bias"}


def test_total_leaves_weightless_terms_out_of_the_graph() -> None:
    leaves = {name: torch.tensor(1.0, requires_grad=True) for name in TERMS}
    terms = LossTerms(**leaves, **dict.fromkeys(FIGURES, torch.tensor(0)))
    loss = LossConfig(ce_weight=0, dtw_weight=0)
    grads = torch.autograd.grad(terms.total(loss, 0.0), list(leaves.values()), allow_unused=True)
    reached = {name for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    assert reached == {"t2s_ce", "teacher_kd"}


@pytest.mark.parametrize(
    "off",
    [
        off
        for count in (1, 2)
        for off in combinations(("ce_weight", "kd_weight", "dtw_weight"), count)
    ],
)
def test_every_parameter_gets_a_gradient_in_every_ablation(off: tuple[str, ...]) -> None:
    """Zeros, not None: DDP waits for parameters that backward does not reach."""
    case = make_case([(3, 4)])
    loss = LossConfig(**dict.fromkeys(off, 0.0))
    total = evaluate(case, loss).total(loss, kd_ramp=0.0)
    for leaf in case.leaves().values():
        leaf.retain_grad()
    total.backward()
    assert [name for name, leaf in case.leaves().items() if leaf.grad is None] == []
