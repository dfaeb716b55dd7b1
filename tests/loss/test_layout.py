"""Padding, batching, order and chunks change nothing."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwakd_plugin.loss import Head, ResponseStates
from dwakd_plugin.loss.divergence import DIVERGENCES
from dwakd_plugin.recipe.schema import LossConfig
from tests.loss.cases import FIGURES, TERMS, assert_same, evaluate, gradients, make_case, single


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=4),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    fill=st.sampled_from([0.0, 1e30, math.nan, math.inf]),
    chunk_size=st.sampled_from([1, 2, 5, "auto"]),
    divergence=st.sampled_from(sorted(DIVERGENCES)),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_padding_batching_order_and_chunks_change_nothing(
    lengths: list[tuple[int, int]],
    pad: tuple[int, int],
    fill: float,
    chunk_size: int | str,
    divergence: str,
    seed: int,
    data: st.DataObject,
) -> None:
    """The padded, shuffled, chunked batch equals the sum of its samples, each alone and bare."""
    case = make_case(lengths, seed=seed)
    loss = LossConfig(divergence=divergence)
    order = data.draw(st.permutations(range(len(lengths))))
    batch = evaluate(
        case,
        loss.model_copy(update={"chunk_size": chunk_size}),
        order=list(order),
        pad=pad,
        fill=fill,
    )
    alone = [evaluate(single(case, i), loss) for i in range(len(lengths))]
    for name in TERMS + FIGURES:
        expected = torch.stack([getattr(terms, name) for terms in alone]).sum()
        assert_same(getattr(batch, name), expected, name, tolerance=1e-10)
    total = torch.stack([terms.total(loss) for terms in alone]).sum()
    ours, theirs = gradients(case, batch.total(loss)), gradients(case, total)
    for leaf in ours:
        assert_same(ours[leaf], theirs[leaf], leaf, tolerance=1e-10)


def test_some_samples_of_a_batch_keep_their_pairs() -> None:
    hidden = torch.arange(4 * 3 * 2.0).view(4, 3, 2)
    pairs = torch.tensor([0, 2, 4, 9, 11])  # of the samples 0, 0, 1, 3, 3
    labels = torch.arange(12).view(4, 3)
    lengths = torch.tensor([3, 2, 0, 3])
    states = ResponseStates(
        hidden, hidden, hidden, lengths, Head(hidden[0]), labels, torch.arange(12), pairs
    )
    some = states.samples(torch.tensor([3, 0]))
    assert some.lengths.tolist() == [3, 3] and some.index is None
    assert some.pairs is not None and some.labels is not None
    assert some.labels.flatten()[some.pairs].tolist() == [0, 2, 9, 11]
    assert torch.equal(some.hidden, hidden[[3, 0]])
    one = states.sample(1)
    assert one.pairs is not None
    assert one.pairs.tolist() == [1] and one.lengths.tolist() == [2]
    assert states.samples(torch.tensor([], dtype=torch.long)).hidden.shape == (0, 3, 2)
