"""Random batches of a tiny pair, as samples without padding and collated in any layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dwakd_plugin.loss import Head, LossTerms, ResponseStates, dwakd_loss
from dwakd_plugin.loss.variants import every_sum
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig

TERMS = ("ce", "t2s_ce", "student_kd", "teacher_kd", "hidden_dtw", "embed_dtw")
FIGURES = tuple(name for name in every_sum() if name not in TERMS)
# A band that cuts through the small cases here; the default of 5 tokens would hold all of them.
NARROW = SoftDTWConfig(band_width=0.4, band_entropy_coef=0.2)


def assert_same(actual: Tensor, expected: Tensor, name: str, tolerance: float = 1e-8) -> None:
    """Within `tolerance` of the tensor's own scale.

    Of 1e-3 at least: some gradients are exactly 0 on paper (that of the query's bias where there is
    one teacher position), and what is left of sums that cancel is their rounding.
    """
    scale = max(float(expected.detach().abs().max()), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.detach(),
        expected.detach(),
        rtol=tolerance,
        atol=tolerance * scale,
        msg=lambda text: f"{name}: {text}",
    )


@dataclass(frozen=True)
class Sample:
    input_embeds: Tensor
    target_embeds: Tensor
    hidden: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Case:
    student: list[Sample]
    teacher: list[Sample]
    student_head: Head
    teacher_head: Head
    projectors: Projectors

    def leaves(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {"head": self.student_head.weight}
        if self.student_head.bias is not None:
            found["head.bias"] = self.student_head.bias
        for i, sample in enumerate(self.student):
            found[f"hidden.{i}"] = sample.hidden
            found[f"target_embeds.{i}"] = sample.target_embeds
        return found | dict(self.projectors.named_parameters())


def make_case(
    lengths: list[tuple[int, int]],
    *,
    seed: int = 0,
    width: tuple[int, int] = (5, 7),
    vocab: tuple[int, int] = (13, 17),
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    softcap: float | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    sides = []
    for side in (0, 1):
        head = Head(
            randn(vocab[side], width[side]),
            randn(vocab[side]) if bias else None,
            scale=0.8,
            softcap=softcap,
        )
        samples = []
        for pair in lengths:
            states = [randn(pair[side], width[side]) * (1 + i) for i in range(3)]
            labels = torch.randint(vocab[side], (pair[side],), generator=generator)
            samples.append(Sample(*states, labels))
        sides.append((samples, head))
    projectors = Projectors(*width).to(dtype)
    for parameter in projectors.parameters():
        parameter.data = randn(*parameter.shape) / math.sqrt(parameter.shape[-1])
    case = Case(sides[0][0], sides[1][0], sides[0][1], sides[1][1], projectors)
    for leaf in case.leaves().values():
        leaf.requires_grad_()
    return case


def collate(
    samples: list[Sample], head: Head, *, pad: int = 0, fill: float = 0.0
) -> ResponseStates:
    """Right-pad with `fill`, to `pad` positions more than the longest sample has."""
    longest = max(len(sample.hidden) for sample in samples) + pad

    def padded(name: str) -> Tensor:
        rows = []
        for sample in samples:
            tensor = getattr(sample, name)
            rest = tensor.new_full((longest - len(tensor), *tensor.shape[1:]), fill)
            rows.append(torch.cat([tensor, rest]))
        return torch.stack(rows)

    return ResponseStates(
        padded("input_embeds"),
        padded("target_embeds"),
        padded("hidden"),
        torch.tensor([len(sample.hidden) for sample in samples]),
        head,
        torch.stack(
            [
                torch.cat([sample.labels, torch.full((longest - len(sample.labels),), -100)])
                for sample in samples
            ]
        ),
    )


def evaluate(
    case: Case,
    loss: LossConfig | None = None,
    soft_dtw: SoftDTWConfig = NARROW,
    *,
    order: list[int] | None = None,
    pad: tuple[int, int] = (0, 0),
    fill: float = 0.0,
) -> LossTerms:
    order = list(range(len(case.student))) if order is None else order
    return dwakd_loss(
        collate([case.student[i] for i in order], case.student_head, pad=pad[0], fill=fill),
        collate([case.teacher[i] for i in order], case.teacher_head, pad=pad[1], fill=fill),
        case.projectors,
        loss=LossConfig() if loss is None else loss,
        soft_dtw=soft_dtw,
    )


def gradients(case: Case, total: Tensor) -> dict[str, Tensor]:
    leaves = case.leaves()
    grads = torch.autograd.grad(
        total, list(leaves.values()), retain_graph=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))


def single(case: Case, i: int) -> Case:
    return replace(case, student=[case.student[i]], teacher=[case.teacher[i]])


def assert_finite(case: Case, terms: LossTerms, loss: LossConfig) -> None:
    for name in TERMS + FIGURES:
        assert getattr(terms, name).isfinite(), name
    for name, grad in gradients(case, terms.total(loss)).items():
        assert grad.isfinite().all(), name
