"""The six divergences: their definitions, bounds and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dwakd_plugin.loss.divergence import DIVERGENCES, SKEW, adaptive_kl, forward_kl, reverse_kl
from tests.loss.cases import assert_same
from tests.loss.references import reference_divergence


def log_probs(seed: int, rows: int = 4, vocab: int = 11, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_divergences_are_0_at_equality_and_positive_elsewhere(name: str, scale: float) -> None:
    # All six are sums of KL divergences with non-negative weights, so none may go below 0; the
    # slack is rounding, some ulp of log-probabilities of up to 100.
    target, student = log_probs(0, rows=200, scale=scale), log_probs(1, rows=200, scale=scale)
    assert (DIVERGENCES[name](target, student) > 0).all()
    assert DIVERGENCES[name](target, target).abs().max() < 1e-13


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergences_by_their_definitions(name: str) -> None:
    target, student = log_probs(2), log_probs(3)
    expected = [
        reference_divergence(name, p.exp(), q.exp()) for p, q in zip(target, student, strict=True)
    ]
    assert_same(DIVERGENCES[name](target, student), torch.stack(expected), name, 1e-12)


def test_bounded_divergences_stay_within_their_bounds() -> None:
    apart = torch.tensor([[0.0, -1e4], [-1e4, 0.0]], dtype=torch.float64).log_softmax(-1)
    opposite = apart.flip(-1)
    for name in ("skewed_forward_kl", "skewed_reverse_kl"):
        assert_same(
            DIVERGENCES[name](apart, opposite), torch.full((2,), -math.log(SKEW)).double(), name
        )
    assert_same(DIVERGENCES["js"](apart, opposite), torch.full((2,), math.log(2)).double(), "js")


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"adaptive_kl"}))
def test_gradients_of_divergences(name: str) -> None:
    target = log_probs(4)
    logits = log_probs(5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: DIVERGENCES[name](target, z.log_softmax(-1)), (logits,)
    )


def test_gradient_of_adaptive_kl() -> None:
    """Its mixing weights are constants, so finite differences of its value would be wrong."""
    target = log_probs(6)
    student = log_probs(7).requires_grad_()
    forward, reverse = forward_kl(target, student), reverse_kl(target, student)
    value = adaptive_kl(target, student)
    share = ((value - reverse) / (forward - reverse)).detach()
    (expected,) = torch.autograd.grad((share * forward + (1 - share) * reverse).sum(), student)
    (actual,) = torch.autograd.grad(value.sum(), student)
    assert ((share > 0) & (share < 1)).all()
    assert_same(actual, expected, "adaptive_kl")


def test_adaptive_kl_follows_the_gap() -> None:
    """All of the difference in the head: forward KL; all of it in the tail: reverse KL."""
    target = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).double().log()
    head = torch.tensor([[0.3, 0.4, 0.2, 0.1]]).double().log()
    tail = torch.tensor([[0.4, 0.3, 0.1, 0.2]]).double().log()
    assert_same(adaptive_kl(target, head), forward_kl(target, head), "head")
    assert_same(adaptive_kl(target, tail), reverse_kl(target, tail), "tail")
