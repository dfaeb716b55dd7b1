"""Attention between the models, the band around it, and the scale of states."""

from __future__ import annotations

import math

import torch

from dwakd_plugin.loss.alignment import (
    attention_band,
    attention_entropy,
    band_penalty,
    cross_model_attention,
    standardise_scale,
    valid_positions,
)
from dwakd_plugin.recipe.schema import SoftDTWConfig
from tests.loss.cases import assert_same


def test_band_by_hand() -> None:
    """Attention to the diagonal alone, entropy 0: the band is |j − i| ≤ b."""
    config = SoftDTWConfig(band_width=1.0, band_penalty=2.5)
    attention = torch.zeros(1, 5, 6)
    attention[0, :4, :4] = torch.eye(4)
    lengths = torch.tensor([4])
    inside = attention_band(attention, lengths, lengths, config)
    near = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1
    assert torch.equal(inside[0, :4, :4], near)
    assert not inside[0, 4:].any() and not inside[0, :, 4:].any()
    assert torch.equal(
        band_penalty(inside, config, torch.float64)[0, :4, :4], 2.5 * (~near).double()
    )


def test_attention_rows_sum_to_1_and_padding_is_0() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 5, 4, generator=generator)
    valid_s = valid_positions(torch.tensor([5, 2, 0]), 5)
    valid_t = valid_positions(torch.tensor([3, 5, 0]), 5)
    A, B = cross_model_attention(query, key, valid_s, valid_t)
    torch.testing.assert_close(A.sum(-1), valid_s.float())
    torch.testing.assert_close(B.sum(-1), valid_t.float())
    outside = ~(valid_s[:, :, None] & valid_t[:, None, :])
    assert (A[outside] == 0).all() and (B.transpose(1, 2)[outside] == 0).all()
    uniform, _ = cross_model_attention(torch.zeros_like(query), key, valid_s, valid_t)
    expected = torch.tensor([[math.log(3)] * 5, [math.log(5)] * 2 + [0.0] * 3, [0.0] * 5])
    torch.testing.assert_close(attention_entropy(uniform), expected)


def test_scale_is_of_the_sample_and_survives_degenerate_states() -> None:
    generator = torch.Generator().manual_seed(0)
    states = 1e3 + torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    states[1:3] = torch.tensor([0.0, 7.0]).double()[:, None, None]
    lengths = torch.tensor([2, 3, 3, 0])
    scaled = standardise_scale(states, valid_positions(lengths, 3))
    assert_same(scaled[0, :2], states[0, :2] / states[0, :2].std(), "scaled")
    assert torch.equal(scaled[1:3], states[1:3])  # no spread: left as they are
    assert not scaled[0, 2:].any() and not scaled[3].any()
    number = torch.tensor([[[3.0]]])
    assert torch.equal(standardise_scale(number, torch.tensor([[True]])), number)
