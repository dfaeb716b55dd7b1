"""The heads' products by oneDNN against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwakd_plugin.loss import linear as module
from dwakd_plugin.loss.linear import linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 5, 300), (64, 33, 1001), (0, 4, 6), (3, 0, 6)])
def test_is_a_linear_map(sizes: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    rows, width, vocab = sizes
    states, weight = torch.randn(rows, width, dtype=dtype), torch.randn(vocab, width, dtype=dtype)
    added = torch.randn(vocab, dtype=dtype) if bias else None
    with torch.no_grad():
        found, expected = linear(states, weight, added), F.linear(states, weight, added)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        assert found.dtype == dtype and found.is_contiguous()
        back = linear(found, weight.T)
        torch.testing.assert_close(back, found @ weight, rtol=2e-4, atol=2e-3)


def test_where_a_graph_is_wanted_there_is_one() -> None:
    states, weight = torch.randn(3, 4), nn.Parameter(torch.randn(5, 4))
    linear(states, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, states.sum(0).expand(5, 4))


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="before torch 2.9")
def test_rounded_products_are_left_to_torch() -> None:
    states, weight = torch.randn(3, 4), torch.randn(5, 4)
    kept = torch.backends.mkldnn.matmul.fp32_precision
    assert module._by_onednn(states, weight)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert not module._by_onednn(states, weight)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = kept
