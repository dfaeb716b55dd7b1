"""The compiled kernels of both spaces against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwakd_plugin.loss.terms import student_space, teacher_space
from dwakd_plugin.loss.terms.rows_cpu import BLOCK
from dwakd_plugin.recipe.schema import LossConfig
from tests.loss.cases import assert_same, evaluate, gradients, make_case

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def some(rows: int, vocab: int, dtype: torch.dtype, spread: float = 3.0) -> list[Tensor]:
    """Two matrices of logits, labels, targets (every other one the argmax), three gradients."""
    generator = torch.Generator().manual_seed(rows * vocab)
    own, other, grads = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, vocab), (rows, vocab), (3, rows))
    )
    labels, targets = torch.randint(vocab, (2, rows), generator=generator)
    other = other * spread
    targets[::2] = other[::2].argmax(-1)
    return [own * spread, other, labels, targets, *grads]


def compare(case: list[Tensor], temperature: float, tolerance: float) -> None:
    own, other, labels, targets, *grads = case
    how = {"divergence": "forward_kl", "temperature": temperature}
    close = {"rtol": tolerance, "atol": tolerance}
    expected = student_space.student_statistics(own, other, labels, targets, **how)
    found = student_space.compiled_statistics(own, other, labels, targets, temperature)
    for name in student_space.StudentStatistics._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)
    both = student_space.student_gradients(own, other, labels, targets, *grads, **how)
    inputs = own.clone(), other.clone(), labels, targets
    in_place = student_space.compiled_gradients(*inputs, *grads, temperature)
    for a, b in zip(in_place, both, strict=True):
        torch.testing.assert_close(a, b, **close)
    results = [
        said(own.clone(), other.clone(), labels, temperature)
        for said in (teacher_space.compiled_statistics_, teacher_space.teacher_statistics_)
    ]
    for a, b in zip((*results[0][0], results[0][1]), (*results[1][0], results[1][1]), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("sizes", [(9, BLOCK - 1), (4, 1), (5, 2 * BLOCK + 1), (40, 9000), (0, 5)])
def test_equal_torch(sizes: tuple[int, int], temperature: float, dtype: torch.dtype) -> None:
    compare(some(*sizes, dtype), temperature, TOLERANCE[dtype])


def test_what_is_almost_certain_or_almost_never() -> None:
    compare(some(30, 400, torch.float32, spread=40.0), 2.0, 1e-4)


def test_the_first_of_equal_logits_is_the_argmax() -> None:
    logits, labels = torch.zeros(3, 700), torch.tensor([0, 1, 600])
    found = student_space.compiled_statistics(logits, logits, labels, labels, 2.0)
    assert found.t2s_correct.tolist() == [True, False, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_seen_in_its_row_alone(value: float) -> None:
    own, other, labels, *_ = some(6, 500, torch.float32)
    own[2, 7] = value
    tokens, grad = teacher_space.compiled_statistics_(own, other, labels, 2.0)
    assert not tokens.divergence[2].isfinite() and not grad[2].isfinite().all()
    assert tokens.divergence[[0, 1, 3, 4, 5]].isfinite().all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=4),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    chunk_size=st.sampled_from([1, 2, 5, "auto"]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_the_loss_is_that_of_torch_in_any_layout(
    lengths: list[tuple[int, int]],
    pad: tuple[int, int],
    chunk_size: int | str,
    seed: int,
    data: st.DataObject,
) -> None:
    """Padded, shuffled and in chunks by the kernels; bare, in order and at once by torch."""
    case = make_case(lengths, seed=seed)
    loss = LossConfig(chunk_size=chunk_size)
    order = list(data.draw(st.permutations(range(len(lengths)))))
    found = evaluate(case, loss, order=order, pad=pad, fill=math.nan).total(loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dwakd_plugin.loss.batch.compiles_for", lambda states: False)
        expected = evaluate(case, LossConfig()).total(loss)
    assert_same(found, expected, "total", tolerance=1e-10)
    ours, theirs = gradients(case, found), gradients(case, expected)
    for leaf in ours:
        assert_same(ours[leaf], theirs[leaf], leaf, tolerance=1e-10)
