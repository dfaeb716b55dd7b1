"""Token weights sum to a sample's length, at any scale."""

from __future__ import annotations

import math

import pytest
import torch

from dwakd_plugin.loss.alignment import valid_positions
from dwakd_plugin.loss.token_weights import (
    normalise_per_sample,
    student_token_weights,
    teacher_token_weights,
)


def test_weights_of_a_sample_sum_to_its_length() -> None:
    generator = torch.Generator().manual_seed(0)
    valid = valid_positions(torch.tensor([4, 1, 0]), 6)
    entropy, gate = torch.rand(2, 3, 6, generator=generator)
    for weighting in ("entropy_gate", "entropy", "none"):
        weights = student_token_weights(entropy, gate, valid, weighting)
        torch.testing.assert_close(weights.sum(-1), torch.tensor([4.0, 1.0, 0.0]))
        assert (weights[~valid] == 0).all()
    for weighting in ("confidence", "none"):
        weights = teacher_token_weights(entropy, 10, valid, weighting)
        torch.testing.assert_close(weights.sum(-1), torch.tensor([4.0, 1.0, 0.0]))


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1.0, 1e38])
def test_weights_normalise_at_any_scale(scale: float) -> None:
    valid = valid_positions(torch.tensor([3]), 4)
    weights = normalise_per_sample(torch.full((1, 4), scale), valid)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))


def test_an_entropy_that_rounding_puts_above_its_limit_weighs_nothing() -> None:
    limit = math.log(10)
    entropy = torch.tensor([[limit * (1 + 1e-6), limit / 2]])
    weights = teacher_token_weights(entropy, 10, torch.ones(1, 2, dtype=torch.bool), "confidence")
    assert weights.tolist() == [[0, 2]]


def test_a_gate_after_the_normalisation_shrinks_what_an_unsure_teacher_says() -> None:
    valid = valid_positions(torch.tensor([3]), 4)
    entropy = torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    sure, unsure = torch.full((1, 4), 0.8), torch.full((1, 4), 0.1)
    for gate in (sure, unsure):
        outside = student_token_weights(entropy, gate, valid, "entropy_then_gate")
        torch.testing.assert_close(outside.sum(), 3 * gate[0, 0])
        inside = student_token_weights(entropy, gate, valid, "entropy_gate")
        torch.testing.assert_close(inside.sum(), torch.tensor(3.0))
