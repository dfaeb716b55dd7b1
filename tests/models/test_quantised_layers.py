"""4-bit layers on a CPU, of whatever kind the CPU is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dwakd_plugin.models.quantised_layers import keep_as_stored
from dwakd_plugin.plugin import DWAKDPlugin

bitsandbytes = pytest.importorskip("bitsandbytes")


def layer(outputs: int, inputs: int) -> nn.Module:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3)) / 8
    made = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.load_state_dict({"weight": weight})
    return made.to("cpu")


def output_and_gradient(module: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    states = states.clone().requires_grad_()
    output = module.train()(states)
    output.square().sum().backward()
    assert states.grad is not None
    return output.detach(), states.grad


@pytest.mark.parametrize("widths", [(64, 128), (40, 64), (24, 48)])
@pytest.mark.parametrize("kept", [keep_as_stored, lambda m: DWAKDPlugin().post_model_load({}, m)])
def test_an_evaluation_leaves_training_as_it_was(kept, widths: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(layer(*widths))
    kept(model)
    states = torch.randn(5, widths[1], generator=torch.Generator().manual_seed(4))
    before, gradient = output_and_gradient(model, states)
    with torch.no_grad():
        evaluated = model.eval()(states)
    torch.testing.assert_close(evaluated, before, rtol=1e-5, atol=1e-6)
    after, again = output_and_gradient(model, states)
    assert torch.equal(after, before) and torch.equal(again, gradient)
    assert gradient.abs().max() > 0.1
