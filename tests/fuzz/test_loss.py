"""States and logits that no model would give: a finite loss, of each sample alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwakd_plugin.loss import Head, LossTerms, ResponseStates, dwakd_loss
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.recipe.schema import UNREAD, VARIANTS, Divergence, DWAKDConfig
from tests.fuzz.cases import cases


def _states(
    generator: torch.Generator, kind: str, lengths: list[int], width: int, vocabulary: int
) -> ResponseStates:
    """A batch of one side. `kind` says what is extreme about it."""
    size = (3, len(lengths), max(lengths), width)
    values = torch.randn(size, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    if kind == "large":  # logits of ±1e4 and more
        values, weight = values * 1e3, weight * 1e2
    elif kind == "tiny":
        values = values * 1e-20
    elif kind == "zero":
        values = torch.zeros_like(values)
    elif kind == "same":  # one token over and over
        values = values[:, :, :1].expand(size).clone()
    elif kind == "holes":  # zero vectors here and there
        values = values * (torch.rand(size[1:3], generator=generator) < 0.5)[None, ..., None]
    elif kind == "flat":  # a head that tells no tokens apart
        weight = torch.zeros_like(weight)
    elif kind == "outlier":  # one dimension far above the rest, as large models have
        values[..., 0] = 1e4
    labels = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=generator)
    for sample, length in enumerate(lengths):
        labels[sample, length:] = -100
    return ResponseStates(*values, torch.tensor(lengths), Head(weight), labels)


def _paired(
    generator: torch.Generator, student: ResponseStates, teacher: ResponseStates
) -> tuple[ResponseStates, ResponseStates]:
    """With pairs in order, as exact matching needs them, and a map between the vocabularies."""
    pairs: tuple[list[int], list[int]] = ([], [])
    for sample, (s, t) in enumerate(zip(student.lengths, teacher.lengths, strict=True)):
        count = int(torch.randint(int(min(s, t)) + 1, (1,), generator=generator))
        for side, length, states in ((0, s, student), (1, t, teacher)):
            chosen = torch.randperm(int(length), generator=generator)[:count].sort().values
            pairs[side].extend((chosen + sample * states.hidden.shape[1]).tolist())
    rows, mine = teacher.head.weight.shape[0], student.head.weight.shape[0]
    token_map = torch.randint(-1, mine, (rows,), generator=generator)
    return (
        replace(student, pairs=torch.tensor(pairs[0], dtype=torch.long)),
        replace(teacher, pairs=torch.tensor(pairs[1], dtype=torch.long), token_map=token_map),
    )


def _batch(samples: list[ResponseStates], padding: float, further: int) -> ResponseStates:
    """Single samples as one batch; `padding` fills what isn't a position."""
    longest = max(one.hidden.shape[1] for one in samples) + further

    def joined(tensors: list[torch.Tensor], value: float) -> torch.Tensor:
        whole = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[2:]), value)
        for row, tensor in zip(whole, tensors, strict=True):
            row[: tensor.shape[1]] = tensor[0]
        return whole

    pairs = None
    if all(one.pairs is not None for one in samples):
        pairs = torch.cat([one.pairs + i * longest for i, one in enumerate(samples)])
    return replace(
        samples[0],
        input_embeds=joined([one.input_embeds for one in samples], padding),
        target_embeds=joined([one.target_embeds for one in samples], padding),
        hidden=joined([one.hidden for one in samples], padding),
        lengths=torch.cat([one.lengths for one in samples]),
        labels=joined([one.labels for one in samples], -100),
        pairs=pairs,
    )


def _cast(states: ResponseStates, dtype: torch.dtype) -> ResponseStates:
    return replace(
        states,
        input_embeds=states.input_embeds.to(dtype),
        target_embeds=states.target_embeds.to(dtype),
        hidden=states.hidden.to(dtype),
        head=Head(states.head.weight.to(dtype)),
    )


def _loss_and_gradients(
    student: ResponseStates,
    teacher: ResponseStates,
    projectors: Projectors,
    config: DWAKDConfig,
    gamma: float,
) -> tuple[LossTerms, float, list[torch.Tensor]]:
    leaves = [student.hidden, student.target_embeds, student.head.weight]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    student = replace(student, hidden=leaves[0], target_embeds=leaves[1], head=Head(leaves[2]))
    projectors.zero_grad(set_to_none=True)
    terms = dwakd_loss(
        student, teacher, projectors, loss=config.loss, soft_dtw=config.soft_dtw, gamma=gamma
    )
    total = terms.total(config.loss)
    total.backward()
    gradients = [leaf.grad for leaf in [*leaves, *projectors.parameters()]]
    return terms, float(total.detach()), [each for each in gradients if each is not None]


KINDS = ["usual", "large", "tiny", "zero", "same", "holes", "flat", "outlier"]
GAMMAS = [1e-3, 0.01, 0.8, 2.0, 100.0, 1000.0]
LOSSES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.01, 0.1, 1.0, 2.0, 100.0]),
        "divergence": st.sampled_from(get_args(Divergence)),
        "chunk_size": st.sampled_from([1, 2, 3, "auto"]),
        "teacher_weighting": st.sampled_from(["confidence", "none"]),
    },
)
BANDS = st.fixed_dictionaries(
    {},
    optional={
        "band_width": st.sampled_from([0.0, 1e-3, 5.0, 1e4]),
        "band_entropy_coef": st.sampled_from([0.0, 2.0, 1e4]),
        "band_center_blend": st.sampled_from([0.0, 0.7, 1.0]),
        "band_penalty": st.sampled_from([0.0, 1.0, 1e3]),
    },
)


@given(
    seed=st.integers(0, 2**31),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    lengths=st.lists(
        st.tuples(st.sampled_from([0, 1, 1, 2, 3, 30]), st.sampled_from([0, 1, 2, 5, 30])),
        min_size=1,
        max_size=3,
    ),
    variant=st.sampled_from(sorted(VARIANTS)),
    loss=LOSSES,
    soft_dtw=BANDS,
    gamma=st.sampled_from(GAMMAS),
)
@cases(40, 1500)
def test_the_loss_is_finite_and_of_each_sample_alone(
    seed: int,
    kinds: tuple[str, str],
    lengths: list[tuple[int, int]],
    variant: str,
    loss: dict[str, Any],
    soft_dtw: dict[str, Any],
    gamma: float,
) -> None:
    preset = VARIANTS[variant]
    block = {"teacher": "t", "variant": variant}
    unread = UNREAD[preset.get("loss", {}).get("matching", "attention")]
    taken = {*preset.get("loss", {}), *unread}
    block["loss"] = {key: value for key, value in loss.items() if key not in taken}
    block["soft_dtw"] = {k: v for k, v in soft_dtw.items() if k not in preset.get("soft_dtw", {})}
    config = DWAKDConfig.model_validate(block)
    generator = torch.Generator().manual_seed(seed)
    singles = []
    for s, t in lengths:
        student = _states(generator, kinds[0], [max(s, 1)], 4, 7)
        teacher = _states(generator, kinds[1], [max(t, 1)], 6, 11)
        student = replace(student, lengths=torch.tensor([s]))
        teacher = replace(teacher, lengths=torch.tensor([t]))
        if s == 0:
            student = replace(student, labels=torch.full_like(student.labels, -100))
        singles.append(_paired(generator, student, teacher))
    # One model has one head, and one map.
    first = singles[0]
    singles = [
        (
            replace(student, head=first[0].head),
            replace(teacher, head=first[1].head, token_map=first[1].token_map),
        )
        for student, teacher in singles
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed % 1000)
        projectors = Projectors(4, 6)

    def run(
        order: list[int], padding: float = 0.0, further: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[float, list[torch.Tensor]]:
        student = _batch([_cast(singles[i][0], dtype) for i in order], padding, further)
        teacher = _batch([_cast(singles[i][1], dtype) for i in order], padding, further)
        terms, total, gradients = _loss_and_gradients(
            student, teacher, projectors.to(dtype), config, gamma
        )
        for name, value in vars(terms).items():
            assert value.isfinite().all(), name
        for gradient in gradients:
            assert gradient.isfinite().all()
        for name in ("ce", "t2s_ce", "uld", "student_kd", "teacher_kd"):
            assert getattr(terms, name) >= -1e-4 * (1 + abs(total))
        return total, gradients[3:]

    order = list(range(len(singles)))
    run(order, dtype=torch.float32)
    # What must hold exactly is compared in float64, relative to what was added up.
    total, gradients = run(order)
    padded, padded_gradients = run(order[::-1], math.nan, 3)
    alone = [run([i]) for i in order]
    scale = 1e-7 * (1 + sum(abs(one) for one, _ in alone))
    assert padded == pytest.approx(total, abs=scale)
    assert sum(one for one, _ in alone) == pytest.approx(total, abs=scale)
    for whole, other in zip(gradients, padded_gradients, strict=True):
        assert (whole - other).abs().max() <= 1e-6 * (1 + whole.abs().max())
