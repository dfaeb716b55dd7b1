"""No logits beyond a chunk, none kept for backward, and no wait for the device."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dwakd_plugin.loss import ContinuationTable, Head, SpellingTable, dwakd_loss
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
from dwakd_plugin.loss.token_order import token_order
from dwakd_plugin.recipe.schema import LossConfig
from dwakd_plugin.tokenizers.spellings import spellings
from tests.loss.cases import NARROW, collate, evaluate, gradients, make_case
from tests.loss.test_matched import likeliest_alone, loss_of


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


def test_no_logits_beyond_a_chunk_from_the_likeliest_tokens() -> None:
    vocab, chunk = 2000, 4
    case = make_case([(30, 32)], width=(3, 3), vocab=(vocab, vocab), dtype=torch.float32)
    student = replace(collate(case.student, case.student_head), pairs=torch.arange(30))
    teacher = likeliest_alone(collate(case.teacher, case.teacher_head), 8)
    teacher = replace(teacher, pairs=torch.arange(30), token_map=torch.arange(vocab))
    loss = loss_of("mapped", chunk_size=chunk)
    with LargestTensor() as largest:
        gradients(case, dwakd_loss(student, teacher, None, loss=loss).total(loss))
    assert largest.numel == chunk * vocab


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
    """Fails on operations whose result the host must wait for.

    Below what Python sees of an operation it may do what waits: a mask as an index is a `nonzero`,
    other than where one value is put (torch's own `masked_fill` then).
    """

    WAITS = ("nonzero", "_local_scalar_dense", "item", "masked_select", "is_nonzero", "equal")
    WAITS_WITH_MASK = ("index", "index_put", "index_put_", "_index_put_impl_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in self.WAITS and not name.startswith("unique"), func
        if name in self.WAITS_WITH_MASK:
            masks = [each for each in args[1] if each is not None and each.dtype == torch.bool]
            assert not masks or (name != "index" and args[2].numel() == 1), func
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, func
        return func(*args, **(kwargs or {}))


def test_what_waits_is_seen() -> None:
    values, mask = torch.rand(4), torch.tensor([True, False, True, True])
    counts = torch.tensor([1, 2])
    for waits in (
        lambda: values[mask],
        lambda: values.masked_select(mask),
        lambda: values.index_put_((mask,), torch.zeros(3)),
        lambda: torch.repeat_interleave(counts),
        lambda: float(values.sum()),
        lambda: torch.where(mask),
    ):
        with pytest.raises(AssertionError), NoWaiting():
            waits()


@pytest.mark.parametrize(
    ("variant", "k"),
    [("paper", 0), ("mapped", 0), ("mapped", 5), ("uld", 0), ("dskdv2", 0), ("sft", 0)],
)
def test_the_loss_does_not_wait_for_the_device(
    variant: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the collator's indices given. (numba's kernels are left out: they run on the host.)"""
    case = make_case([(5, 7), (3, 2), (4, 0)])
    loss, pairs = loss_of(variant), torch.tensor([[0, 1, 3, 6], [0, 2, 4, 7]])
    student, teacher = (
        replace(
            states,
            index=valid_positions(states.lengths, size).flatten().nonzero()[:, 0],
            pairs=own,
        )
        for states, size, own in (
            (collate(case.student, case.student_head), 5, pairs[0]),
            (collate(case.teacher, case.teacher_head), 7, pairs[1]),
        )
    )
    behind = ContinuationTable(*map(torch.tensor, ([0, 0, 2, 3], [1, 4, 9], [2, 0, 5])))
    student = replace(student, read=torch.tensor([0, 1, 2, 0]))
    token_map = torch.arange(17) % 14 - 1
    teacher = replace(teacher, token_map=token_map, continuations=behind)
    assert behind.in_order[0] == 2 and token_order(token_map)  # waited for once
    if variant == "mapped" and not k:
        spelt = [(), *[(n % 3, n % 4)[: 1 + n % 2] for n in range(12)]]
        how = SpellingTable(*map(torch.tensor, spellings(spelt, [0] * 17).table()))
        assert how.longest > (1, 1) and all(map(token_order, how.by_first[1:]))
        student = replace(student, spelt=torch.tensor([2, 2]), spelt_read=torch.tensor([1]))
        teacher = replace(teacher, spelt=torch.tensor([3, 4]), spellings=how)
    projectors = case.projectors
    if k:
        teacher, projectors = likeliest_alone(teacher, k), None
    expected = dwakd_loss(student, teacher, projectors, loss=loss, soft_dtw=NARROW).total(loss)
    monkeypatch.setattr(warp, "alignments", partial(warp.alignments, backend="torch"))
    monkeypatch.setattr("dwakd_plugin.loss.batch.compiles_for", lambda states: False)
    # Lengths are checked where they lie on the CPU, and only there.
    checks = "dwakd_plugin.loss.soft_dtw._checked_lengths"
    monkeypatch.setattr(checks, lambda name, lengths, cost, dim: lengths)
    with NoWaiting():
        terms = dwakd_loss(student, teacher, projectors, loss=loss, soft_dtw=NARROW)
        total = terms.total(loss)
        total.backward()
    torch.testing.assert_close(total, expected)


def test_zero_tokens_pass_as_one_empty_chunk() -> None:
    states, none = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.long)
    heads = Head(torch.zeros(5, 3)), Head(torch.zeros(0, 0))
    (values,), _ = through_student_head(LABELS_ALONE, states, states[:, :0], none, none, *heads, 4)
    assert values.shape == (0,) and values.requires_grad
