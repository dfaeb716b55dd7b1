"""The teacher's likeliest tokens, from its head to the loss and to a disk and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dwakd_plugin.data.collator import DISTILLATION_KEYS, said_of_rows
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import Head
from dwakd_plugin.models.batches import teacher_batch
from dwakd_plugin.models.teacher.cached import teacher_of_probabilities
from dwakd_plugin.models.teacher.top_tokens import (
    BYTES_A_TOKEN,
    TopTokens,
    from_bits,
    pack,
    to_bits,
    top_of_states,
    unpack,
)
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.train.preflight import check_variant

VOCABULARY = 300


@pytest.mark.parametrize(
    ("block", "teacher", "says"),
    [
        *(
            (
                {"variant": name},
                {"top_k": 64},
                rf"top_k: 64 — variant `{name}` .* use variant `mapped`",
            )
            for name in ("paper", "uld", "dskdv2")
        ),
        ({"loss": {"temperature": 2}}, {"top_k": 64}, "temperature: 2 — .* set it to 1, or remove"),
        (
            {},
            {"top_k": 64, "cache_dtype": "float16"},
            "dwakd.teacher.cache_dtype: it is of hidden states",
        ),
        ({}, {"top_k": 0}, "top_k.*greater than or equal to 1"),
        (
            {"loss": {"cosine_weight": 3}},
            {"top_k": 64},
            r"top_k: 64 — .*\(dtw_weight: 0, cosine_weight: 3\) learns from the teacher's hidden.*"
            "set both weights to 0, or remove top_k",
        ),
        (
            {"variant": "mapped", "loss": {"dtw_weight": 0.2}},
            {"server": "http://localhost:1"},
            "top_k: 64 — .* learns from the teacher's hidden",
        ),
        ({"own_answers": {}}, {"top_k": 64}, "dwakd.own_answers: they are judged by all"),
        ({}, {"top_k": 64}, None),
        ({"variant": "sft"}, {"top_k": 64}, None),
    ],
)
def test_what_does_not_go_with_likeliest_tokens(
    block: dict[str, Any], teacher: dict[str, Any], says: str | None
) -> None:
    keys = {"base_model": "small", "distillation": "dwakd"}
    recipe = Recipe(keys | {"dwakd": {"teacher": {"base_model": "big"} | teacher} | block})
    if says is None:
        check_variant(recipe)
        return
    with pytest.raises(UserError, match=says):
        check_variant(recipe)


def some(positions: int, k: int) -> TopTokens:
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 8, generator=generator)
    return top_of_states(hidden, Head(torch.randn(VOCABULARY, 8, generator=generator)), k)


@pytest.mark.parametrize("k", [1, 20, VOCABULARY + 7])
def test_the_likeliest_tokens_are_those_of_the_whole_head(k: int) -> None:
    hidden = torch.randn(2, 3, 8, generator=torch.manual_seed(1)).double()
    head = Head(torch.randn(VOCABULARY, 8).double(), softcap=5.0)
    found = top_of_states(hidden, head, k)
    log_probs = head.logits(hidden).log_softmax(-1).sort(-1, descending=True).values
    assert torch.allclose(found.log_probs, log_probs[..., :k])
    own = head.logits(hidden).log_softmax(-1).gather(-1, found.token_ids.long())
    assert torch.equal(own, found.log_probs)


def test_a_batch_and_a_disk_give_back_what_they_got() -> None:
    top = some(5, 20)
    top.token_ids[2, 3:], top.log_probs[2, 3:] = -1, -torch.inf
    top.token_ids[0, 0] = 2**24 - 2
    for one, other in zip(from_bits(to_bits(top)), top, strict=True):
        assert torch.equal(one, other)
    packed = pack(top)
    assert packed.shape == (5, 20, BYTES_A_TOKEN) and packed.dtype == torch.uint8
    again = unpack(packed)
    assert torch.equal(again.token_ids, top.token_ids)
    assert torch.allclose(again.log_probs, top.log_probs, rtol=0, atol=2e-6)
    far = TopTokens(torch.tensor([7, 8]), torch.tensor([0.0, -90.0]))
    assert unpack(pack(far)).log_probs.tolist() == pytest.approx([0.0, -64.0], abs=1e-5)


def test_rows_reach_the_loss_in_their_places() -> None:
    ids = [torch.arange(1, length) for length in (9, 5, 7)]
    labels = [own.clone() for own in ids]
    for own, begin in zip(labels, (2, 3, 6), strict=True):
        own[:begin] = -100
    rows = [some(int(own[1:].ne(-100).sum()), 20) for own in labels]
    batch = teacher_batch(ids, labels) | said_of_rows(rows)
    assert batch.keys() <= set(DISTILLATION_KEYS)
    teacher = teacher_of_probabilities(VOCABULARY, "cpu", "from a server", None)
    states = teacher.states(batch)
    assert states.top is not None and states.labels is not None
    assert states.hidden.shape == (3, 6, 0) and states.labels.shape == (3, 6)
    for n, row in enumerate(rows):
        positions = len(row.token_ids)
        assert torch.equal(states.top.token_ids[n, :positions], row.token_ids)
        assert torch.equal(states.top.log_probs[n, :positions], row.log_probs)
    alone = states.sample(1)
    assert alone.top is not None
    assert torch.equal(alone.top.token_ids, states.top.token_ids[1:2])
