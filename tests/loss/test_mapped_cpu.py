"""The compiled kernels of `mapped` against torch and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dwakd_plugin.loss import ContinuationTable, Head
from dwakd_plugin.loss.terms import mapped_cpu
from dwakd_plugin.loss.terms.mapped import (
    COMPILED,
    StudentStatistics,
    compiled_gradients,
    compiled_statistics,
    compiled_target,
    mapped_statistics,
)
from dwakd_plugin.loss.terms.rows_cpu import BLOCK
from dwakd_plugin.recipe.schema import Divergence

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def some(
    rows: int,
    student: int,
    teacher: int,
    dtype: torch.dtype,
    spread: float = 3.0,
    divergence: Divergence = "forward_kl",
    sampled: bool = False,
) -> dict[str, Any]:
    """Logits, labels and a map; what some rows have read goes on with one to four tokens."""
    generator = torch.Generator().manual_seed(rows * student + teacher)
    logits = [
        (torch.randn(rows, size, generator=generator, dtype=torch.float64) * spread).to(dtype)
        for size in (student, teacher)
    ]
    labels = torch.randint(student, (rows,), generator=generator)
    counts = torch.tensor([0, 3, 1, 4])  # of what has the number 0, which is nothing, to 3
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    entries = [torch.randint(size, (8,), generator=generator) for size in (teacher, student)]
    token_map = torch.randint(-1, student, (teacher,), generator=generator)
    read = torch.randint(4, (rows,), generator=generator)
    grads = torch.randn(3, rows, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "arguments": (*logits, labels, read),
        "grads": grads.unbind(),
        "mapping": (token_map, ContinuationTable(starts, *entries), divergence, sampled),
    }


class Given(Head):
    """A head (V, C) of which the logits are given, whatever the states are."""

    def logits(self, hidden: Tensor) -> Tensor:
        return self.weight.T


def compiled(
    arguments: Sequence[Tensor], grads: Sequence[Tensor] | None, mapping: Sequence[Any]
) -> Any:
    """Both passes of the kernels; without `grads` the statistics alone."""
    student_logits, teacher_logits, labels, read = arguments
    token_map, continuations, *comparing = mapping
    head = Head(student_logits.new_empty(student_logits.shape[1], 1))
    states = teacher_logits[:, :0]
    target = compiled_target(states, Given(teacher_logits.T), read, head, token_map, continuations)
    if grads is None:
        return compiled_statistics(student_logits, target, labels, read, *comparing)
    return compiled_gradients(student_logits, target, labels, read, *grads, *comparing)


def by_autograd(
    arguments: tuple[Tensor, ...], grads: tuple[Tensor, ...], mapping: Sequence[Any]
) -> tuple[StudentStatistics, Tensor]:
    leaf = arguments[0].clone().requires_grad_()
    *mapping, sampled = mapping
    tokens = mapped_statistics(leaf, *arguments[1:], *mapping, 1.0, sampled)
    total = (tokens.ce * grads[0] + tokens.divergence * grads[2]).sum()
    return tokens, torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [(9, 11, BLOCK - 1), (4, 1, BLOCK), (5, 300, 2 * BLOCK + 1), (40, 700, 9000), (0, 5, 7)],
)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("divergence", COMPILED)
def test_equal_torch_and_autograd(
    sizes: tuple[int, int, int], dtype: torch.dtype, divergence: Divergence, sampled: bool
) -> None:
    case = some(*sizes, dtype, divergence=divergence, sampled=sampled)
    expected, expected_grad = by_autograd(**case)
    alone = compiled(case["arguments"], None, case["mapping"])
    tokens, grad = compiled(**case)
    tolerance = TOLERANCE[dtype]
    for name in StudentStatistics._fields:
        found, wanted = getattr(tokens, name), getattr(expected, name).detach()
        assert torch.equal(found, getattr(alone, name)), name
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("divergence", COMPILED)
def test_what_is_almost_certain_or_almost_never(divergence: Divergence) -> None:
    """Probabilities down to the smallest float, and rows of which the teacher says nothing."""
    case = some(30, 50, 400, torch.float32, spread=15.0, divergence=divergence)
    token_map = case["mapping"][0]
    expected, expected_grad = by_autograd(**case)
    tokens, grad = compiled(**case)
    for found, wanted in zip(tokens, expected, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    nothing = torch.full_like(token_map, -1)
    arguments = *case["arguments"][:3], torch.zeros(30, dtype=torch.long)
    silent = dict(case, arguments=arguments, mapping=(nothing, None, *case["mapping"][2:]))
    expected, expected_grad = by_autograd(**silent)
    tokens, grad = compiled(**silent)
    if divergence == "forward_kl":
        assert (tokens.divergence == 0).all() and grad.isfinite().all()
    else:  # that of even, smallest probabilities
        torch.testing.assert_close(tokens.divergence, expected.divergence.detach())
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_seen_in_its_row_alone(value: float, side: int) -> None:
    case = some(6, 30, 500, torch.float32)
    case["arguments"][3].zero_()
    case["arguments"][side][2, 7] = value
    tokens, grad = compiled(**case)
    assert not tokens.divergence[2].isfinite() and not grad[2].isfinite().all()
    assert tokens.divergence[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("at_once", [5 * 2000, 5 * 50, 1])
@pytest.mark.parametrize("divergence", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_that_the_teacher_leaves_out(
    dtype: torch.dtype, divergence: Divergence, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logit of −∞ is a probability of 0, in whole parts of the vocabulary, too."""
    monkeypatch.setattr(mapped_cpu, "LOGITS_AT_ONCE", at_once)
    case = some(5, 300, 2000, dtype, divergence=divergence)
    case["arguments"][3].fill_(0)
    teacher_logits = case["arguments"][1]
    teacher_logits[:, 30:500] = -math.inf
    teacher_logits[1, :900] = -math.inf
    teacher_logits[2, 60:] = -math.inf
    expected, expected_grad = by_autograd(**case)
    tokens, grad = compiled(**case)
    assert grad.isfinite().all()
    for found, wanted in zip(tokens, expected, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=TOLERANCE[dtype])
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=TOLERANCE[dtype])


def test_threads_and_layout_change_nothing() -> None:
    case = some(64, 512, 20_000, torch.float32)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            arguments = [each.T.contiguous().T for each in case["arguments"][:2]]
            results.append(
                compiled(
                    [
                        *(arguments if count == 3 else case["arguments"][:2]),
                        *case["arguments"][2:],
                    ],
                    case["grads"],
                    case["mapping"],
                )
            )
    finally:
        torch.set_num_threads(threads)
    (tokens, grad), (other_tokens, other_grad) = results
    assert torch.equal(grad, other_grad)
    assert all(torch.equal(a, b) for a, b in zip(tokens, other_tokens, strict=True))


@pytest.mark.parametrize("at_once", [12 * 9000, 12 * 300, 12, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_of_a_vocabulary_are_scaled_to_its_largest(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each part has larger logits than those before, and where each has smaller ones."""
    monkeypatch.setattr(mapped_cpu, "LOGITS_AT_ONCE", at_once)
    case = some(12, 300, 600, dtype)
    slope = torch.linspace(-9, 9, 600, dtype=torch.float64).to(dtype)
    for shift in (slope, -slope, slope.roll(300)):
        student_logits, teacher_logits, *rest = case["arguments"]
        shifted = dict(case, arguments=(student_logits, teacher_logits + shift, *rest))
        expected, expected_grad = by_autograd(**shifted)
        tokens, grad = compiled(**shifted)
        for found, wanted in zip(tokens, expected, strict=True):
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=TOLERANCE[dtype])
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("at_once", "parts"), [(8001, 1), (4000, 2), (1000, 8), (3, 2000)])
def test_the_teachers_logits_are_made_in_parts_that_are_not_small(
    at_once: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Counted(Given):
        def logits(self, hidden: Tensor) -> Tensor:
            made.append(self.weight.numel())
            return super().logits(hidden)

    monkeypatch.setattr(mapped_cpu, "LOGITS_AT_ONCE", at_once)
    case = some(4, 300, 2000, torch.float32)
    own, theirs, _, read = case["arguments"]
    target = Counted(theirs.T), read, Head(own.T), *case["mapping"][:2]
    compiled_target(theirs[:, :0], *target)
    assert len(made) == parts and sum(made) == theirs.numel()
    assert parts == 1 or min(made) >= at_once
