"""Empty sides, single tokens, zero vectors, extreme logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dwakd_plugin.loss import dwakd_loss
from dwakd_plugin.loss.divergence import DIVERGENCES
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig
from tests.loss.cases import (
    FIGURES,
    TERMS,
    assert_finite,
    assert_same,
    collate,
    evaluate,
    gradients,
    make_case,
    single,
)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_extreme_logits_stay_finite(divergence: str) -> None:
    case = make_case([(4, 5), (2, 3)], dtype=torch.float32)
    with torch.no_grad():
        for head in (case.student_head, case.teacher_head):
            head.weight.mul_(1e4 / head.weight.abs().sum(-1).min())
    logits = case.student_head.logits(case.student[0].hidden)
    assert logits.abs().max() > 1e4
    loss = LossConfig(divergence=divergence)
    assert_finite(case, evaluate(case, loss), loss)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 4), (4, 1)])
def test_one_token(lengths: tuple[int, int]) -> None:
    case = make_case([lengths], width=(1, 1))
    loss = LossConfig()
    assert_finite(case, evaluate(case, loss), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors(dtype: torch.dtype) -> None:
    case = make_case([(3, 4)], dtype=dtype)
    with torch.no_grad():
        for sample in (*case.student, *case.teacher):
            for states in (sample.input_embeds, sample.target_embeds, sample.hidden):
                states.zero_()
        for parameter in case.projectors.parameters():
            parameter.zero_()
    loss = LossConfig()
    assert_finite(case, evaluate(case, loss), loss)


def test_a_zero_vector_costs_1_and_takes_no_gradient() -> None:
    """It has no direction, and dividing by a tiny norm instead would blow its gradient up."""
    case = make_case([(1, 1), (3, 4)])
    with torch.no_grad():
        for sample in case.student:
            sample.hidden.zero_()
    terms = evaluate(single(case, 0), soft_dtw=SoftDTWConfig(band=False))
    assert_same(terms.hidden_dtw, torch.tensor(1 - 0.5 * (1 + 0)).double(), "one cell")
    grads = gradients(case, evaluate(case).hidden_dtw)
    assert not grads["hidden.0"].any() and not grads["hidden.1"].any()


@pytest.mark.parametrize("pad", [(0, 0), (3, 2)])
@pytest.mark.parametrize("off", [(), ("ce_weight",), ("kd_weight",), ("kd_weight", "ce_weight")])
def test_a_batch_without_labels_is_0_with_a_graph(
    pad: tuple[int, int], off: tuple[str, ...]
) -> None:
    case = make_case([(0, 4), (0, 0)])
    loss = LossConfig(**dict.fromkeys(off, 0.0))
    terms = evaluate(case, loss, pad=pad, fill=math.nan)
    total = terms.total(loss)
    assert total == 0 and all(getattr(terms, name) == 0 for name in TERMS + FIGURES)
    total.backward()
    for name, leaf in case.leaves().items():
        assert leaf.grad is not None and not leaf.grad.any(), name


@pytest.mark.parametrize("pad", [(0, 0), (1, 2)])
def test_a_sample_without_a_teacher_side_contributes_its_cross_entropy(
    pad: tuple[int, int],
) -> None:
    case = make_case([(3, 0)])
    loss = LossConfig()
    terms = evaluate(case, loss, pad=pad, fill=math.nan)
    ce_only = LossConfig(kd_weight=0, dtw_weight=0)
    expected = evaluate(case, ce_only, pad=pad)
    assert terms.ce > 0 and torch.equal(terms.ce, expected.ce)
    assert all(getattr(terms, name) == 0 for name in TERMS if name != "ce")
    assert (terms.student_tokens, terms.distilled_tokens, terms.teacher_tokens) == (3, 0, 0)
    ours, theirs = gradients(case, terms.total(loss)), gradients(case, expected.total(ce_only))
    for name in ours:
        assert_same(ours[name], theirs[name], name)


def test_student_labels_are_required() -> None:
    case = make_case([(3, 4)])
    student = replace(collate(case.student, case.student_head), labels=None)
    with pytest.raises(ValueError, match=r"student\.labels is None"):
        dwakd_loss(student, collate(case.teacher, case.teacher_head), case.projectors)
