"""bfloat16, autocast, CUDA: the same loss as in float64 on the CPU, but for rounding."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from dwakd_plugin.loss import Head, ResponseStates, dwakd_loss
from dwakd_plugin.recipe.schema import LossConfig
from tests.loss.cases import (
    FIGURES,
    TERMS,
    Case,
    Sample,
    assert_finite,
    assert_same,
    collate,
    evaluate,
    make_case,
)


def test_bfloat16_states_with_float32_projectors() -> None:
    case = make_case([(6, 5), (2, 4)], dtype=torch.bfloat16, bias=False)
    case.projectors.float()
    loss = LossConfig()
    terms = evaluate(case, loss)
    assert {getattr(terms, name).dtype for name in TERMS} == {torch.float32}
    assert_finite(case, terms, loss)
    wide = make_case([(6, 5), (2, 4)], dtype=torch.bfloat16, bias=False)

    def widened(sample: Sample) -> Sample:
        return Sample(
            *(getattr(sample, f.name).double() for f in fields(Sample)[:3]), sample.labels
        )

    wide = Case(
        [widened(sample) for sample in wide.student],
        [widened(sample) for sample in wide.teacher],
        replace(wide.student_head, weight=wide.student_head.weight.double()),
        replace(wide.teacher_head, weight=wide.teacher_head.weight.double()),
        wide.projectors.double(),
    )
    expected = evaluate(wide, loss)
    for name in TERMS:
        # The same bfloat16 numbers in float64. What differs is the heads' product: logits of up
        # to 16 in steps of 2⁻⁴, on terms that sum 8 tokens; the DTW terms never see a head.
        tolerance = 1e-5 if "dtw" in name else 2e-2
        ours, theirs = getattr(terms, name).double(), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def test_autocast_leaves_alignment_in_float32() -> None:
    case = make_case([(6, 5)], dtype=torch.float32)
    plain = evaluate(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = evaluate(case)
    for name in ("hidden_dtw", "embed_dtw", "attention_entropy", "band_cells_inside"):
        assert torch.equal(getattr(terms, name), getattr(plain, name)), name
    assert terms.ce != plain.ce  # the head's product, as the model itself would compute it
    torch.testing.assert_close(terms.ce, plain.ce, rtol=2e-2, atol=0)


def test_head_applies_scale_then_softcap() -> None:
    hidden = torch.tensor([[2.0, -1.0]])
    head = Head(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([1.0, 0.0]), 0.5, softcap=2.0)
    expected = torch.tensor([[2 * math.tanh(3.5 / 2), 2 * math.tanh(-2 / 2)]])
    torch.testing.assert_close(head.logits(hidden), expected)
    low = Head(head.weight.bfloat16()).logits(hidden)
    assert low.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    case = make_case([(6, 5), (2, 4), (3, 0)])
    loss = LossConfig()

    def moved(states: ResponseStates) -> ResponseStates:
        tensors = {
            f.name: value.detach().cuda()
            for f in fields(states)
            if isinstance(value := getattr(states, f.name), Tensor)
        }
        head = replace(
            states.head,
            weight=states.head.weight.detach().cuda(),
            bias=states.head.bias.detach().cuda(),
        )
        return replace(states, **tensors, head=head)

    sides = (collate(case.student, case.student_head), collate(case.teacher, case.teacher_head))
    on_cpu = dwakd_loss(*sides, case.projectors, loss=loss)
    on_gpu = dwakd_loss(*map(moved, sides), case.projectors.cuda(), loss=loss)
    for name in TERMS + FIGURES:
        assert_same(getattr(on_gpu, name).cpu(), getattr(on_cpu, name), name)
