"""The loss by several teachers, against its rows taken one by one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dwakd_plugin.loss import LossTerms, ResponseStates, dwakd_loss
from dwakd_plugin.recipe.schema import VARIANTS, DWAKDConfig, LossConfig
from dwakd_plugin.train.metrics import Sums, logged, means
from dwakd_plugin.train.parts import (
    Sides,
    label_tokens,
    mean_cross_entropy,
    objective,
    parts_of,
)
from tests.loss.cases import collate, make_case

S = (5, 3, 4, 6)  # the student's positions of each row
T = ((6, 4, 0, 0), (4, 0, 5, 0))  # each teacher's: of the last row, none has a side
TAUGHT_BY = [[0, 1], [0], [1], []]
WEIGHTS = (0.7, 0.1)


def settings(variant: str, **weights: float) -> DWAKDConfig:
    named = weights or dict(zip(("maths", "code"), WEIGHTS, strict=True))
    teachers = [
        {"name": name, "base_model": name, "weight": weight} for name, weight in named.items()
    ]
    return DWAKDConfig.model_validate({"teachers": teachers, "variant": variant})


def sides_of_two() -> list[Sides]:
    """A student of four rows and two teachers, of which each teaches two rows."""
    sides: list[Sides] = []
    student: ResponseStates | None = None
    for number, lengths in enumerate(T):
        case = make_case(list(zip(S, lengths, strict=True)), seed=number, vocab=(13, 17 + number))
        student = collate(case.student, case.student_head) if student is None else student
        teacher = collate(case.teacher, case.teacher_head)
        pairs = [
            (row * student.hidden.shape[1] + place, row * teacher.hidden.shape[1] + place)
            for row, length in enumerate(lengths)
            for place in range(min(length, S[row]) - 1)
        ]
        own, theirs = torch.tensor(pairs).T
        tokens = torch.arange(17 + number) % 14 - 1
        sides.append(
            (replace(student, pairs=own), replace(teacher, pairs=theirs, token_map=tokens))
        )
    return sides


def terms_of(
    student: ResponseStates, teacher: ResponseStates | None, loss: LossConfig
) -> LossTerms:
    return dwakd_loss(student, teacher, None, loss=loss)


def totals(sums: Sums) -> dict[str, float]:
    return sums.over_ranks(
        SimpleNamespace(device=torch.device("cpu"), reduce=lambda values, reduction: values)
    )


def gradients(value: Tensor, sides: list[Sides]) -> tuple[Tensor, ...]:
    student = sides[0][0]
    return torch.autograd.grad(value, (student.hidden, student.head.weight))


@pytest.mark.parametrize("variant", ["mapped", "uld"])
def test_the_objective_is_the_weighted_sum_over_each_rows_teachers(variant: str) -> None:
    config, sides = settings(variant), sides_of_two()
    parts = parts_of(config, sides, TAUGHT_BY, config.loss, terms_of)
    found = objective(parts, 1.0)

    expected: Any = 0.0
    for row, numbers in enumerate(TAUGHT_BY):
        alone = LossConfig(**VARIANTS[variant]["loss"] | {"kd_weight": 0.0})
        one = sides[0][0].sample(row)
        expected = expected + terms_of(one, None, alone).total(alone)
        for number in numbers:
            taught = LossConfig(**VARIANTS[variant]["loss"] | {"ce_weight": 0.0})
            student, teacher = sides[number]
            assert teacher is not None
            value = terms_of(student.sample(row), teacher.sample(row), taught).total(taught)
            share = WEIGHTS[number] / sum(WEIGHTS[each] for each in numbers)
            expected = expected + share * value
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for own, other in zip(gradients(found, sides), gradients(expected, sides), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    assert int(label_tokens(parts)) == sum(S)
    labels = terms_of(sides[0][0], None, config.loss.model_copy(update={"kd_weight": 0.0}))
    torch.testing.assert_close(mean_cross_entropy(parts), labels.ce.detach() / sum(S))


@pytest.mark.parametrize("variant", ["mapped", "uld"])
def test_two_copies_of_a_teacher_at_half_are_that_teacher(variant: str) -> None:
    sides = sides_of_two()
    one, two = settings(variant, maths=1.0), settings(variant, maths=0.5, code=0.5)
    taught_by = [[0, 1], [0, 1], [], []]
    alone = parts_of(one, sides[:1], None, one.loss, terms_of)
    copies = parts_of(two, [sides[0], sides[0]], taught_by, two.loss, terms_of)
    torch.testing.assert_close(objective(copies, 1.0), objective(alone, 1.0), rtol=1e-12, atol=0)
    sums, sums_of_one = Sums(("maths/", "code/")), Sums()
    sums.add(copies)
    sums_of_one.add(alone)
    # The log without a name is that of one; with a name, it is that of each.
    found, expected = (
        logged(means(totals(own), config, 1.0, ""), config, "")
        for own, config in ((sums, two), (sums_of_one, one))
    )
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found["maths/student_kd" if variant == "mapped" else "maths/uld"] == pytest.approx(
        expected["student_kd" if variant == "mapped" else "uld"], rel=1e-4
    )
    assert "maths/ce" not in found
    assert {name.removeprefix("code/") for name in found if "code/" in name} == set(expected) - {
        "ce"
    }


def test_sums_have_every_teacher_whichever_rows_came() -> None:
    # What is summed over ranks has the same order on each.
    config, sides = settings("mapped"), sides_of_two()
    orders = []
    for taught_by in (TAUGHT_BY, [[], [], [], []], [[1], [], [1], []]):
        sums = Sums(("maths/", "code/"))
        sums.add(parts_of(config, sides, taught_by, config.loss, terms_of))
        orders.append(list(totals(sums)))
    assert orders[0] == orders[1] == orders[2]
