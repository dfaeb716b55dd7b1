"""No logits beyond a chunk, none kept for backward, and no wait for the device."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dwakd_plugin.loss import Head, dwakd_loss
from dwakd_plugin.loss.alignment import valid_positions
from dwakd_plugin.loss.divergence import DIVERGENCES
from dwakd_plugin.loss.head_pass import (
    AUTO_CHUNK_ELEMENTS,
    AUTO_CHUNK_TOKENS,
    through_student_head,
    tokens_per_chunk,
)
from dwakd_plugin.loss.terms import warp
from dwakd_plugin.loss.terms.labels import LABELS_ALONE
from dwakd_plugin.recipe.schema import LossConfig
from tests.loss.cases import NARROW, collate, evaluate, gradients, make_case


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_no_logits_beyond_a_chunk(divergence: str) -> None:
    vocab, chunk = 2000, 4
    case = make_case([(30, 32), (28, 20)], width=(3, 3), vocab=(vocab, vocab), dtype=torch.float32)
    loss = LossConfig(divergence=divergence, chunk_size=chunk)
    with LargestTensor() as largest:
        total = evaluate(case, loss).total(loss)
        gradients(case, total)
    assert largest.numel == chunk * vocab  # 58 tokens · 2000 rows would be 116000


def test_no_logits_are_kept_for_backward() -> None:
    """What is saved in forward and still alive after it: states, attention and costs, no logits."""
    vocab, chunk = 2000, 4
    case = make_case([(30, 32)], width=(3, 3), vocab=(vocab, vocab), dtype=torch.float32)
    for kd_weight in (0.0, 0.5):
        saved: list[weakref.ref[Tensor]] = []

        def pack(tensor: Tensor, saved: list[weakref.ref[Tensor]] = saved) -> Tensor:
            saved.append(weakref.ref(tensor))
            return tensor

        loss = LossConfig(chunk_size=chunk, kd_weight=kd_weight)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            terms = evaluate(case, loss)
        alive = [tensor.numel() for ref in saved if (tensor := ref()) is not None]
        assert 0 < max(alive) < chunk * vocab
        del terms


def test_no_logits_beyond_a_chunk_without_a_teacher() -> None:
    vocab, chunk = 2000, 4
    case = make_case([(30, 2)], width=(3, 3), vocab=(vocab, 5), dtype=torch.float32)
    loss = LossConfig(chunk_size=chunk, kd_weight=0, dtw_weight=0)
    with LargestTensor() as largest:
        gradients(case, evaluate(case, loss).total(loss))
    assert largest.numel == chunk * vocab


def test_auto_chunks() -> None:
    cpu = torch.device("cpu")
    assert 1 <= tokens_per_chunk("auto", 151936, cpu) <= AUTO_CHUNK_TOKENS
    assert tokens_per_chunk("auto", 1000, cpu) == AUTO_CHUNK_ELEMENTS["cpu"] // 1000
    assert tokens_per_chunk("auto", 2**40, cpu) == 1
    assert tokens_per_chunk(7, 151936, cpu) == 7


class NoWaiting(TorchDispatchMode):
    """Fails on operations whose result the host must wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = ("aten.nonzero.default", "aten._local_scalar_dense.default", "aten.item.default")
        assert str(func) not in waits, func
        return func(*args, **(kwargs or {}))


def test_the_loss_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the collator's indices given. (numba's kernel is left out: it runs on the host.)"""
    case = make_case([(5, 7), (3, 2), (4, 0)])
    expected = evaluate(case).total(LossConfig())
    student, teacher = (
        replace(states, index=valid_positions(states.lengths, size).flatten().nonzero()[:, 0])
        for states, size in (
            (collate(case.student, case.student_head), 5),
            (collate(case.teacher, case.teacher_head), 7),
        )
    )
    torch_only = partial(warp.soft_dtw_distance, backend="torch")
    monkeypatch.setattr(warp, "soft_dtw_distance", torch_only)
    # Lengths are checked where they lie on the CPU, and only there.
    checks = "dwakd_plugin.loss.soft_dtw._checked_lengths"
    monkeypatch.setattr(checks, lambda name, lengths, cost, dim: lengths)
    with NoWaiting():
        terms = dwakd_loss(student, teacher, case.projectors, soft_dtw=NARROW)
        total = terms.total(LossConfig())
        total.backward()
    torch.testing.assert_close(total, expected)


def test_zero_tokens_pass_as_one_empty_chunk() -> None:
    states, none = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.long)
    heads = Head(torch.zeros(5, 3)), Head(torch.zeros(0, 0))
    (values,), _ = through_student_head(LABELS_ALONE, states, states[:, :0], none, none, *heads, 4)
    assert values.shape == (0,) and values.requires_grad
