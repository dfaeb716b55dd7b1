"""`mapped` from the teacher's likeliest tokens alone, against a reference and against the whole."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dwakd_plugin.loss import ContinuationTable, Head, LossTerms, dwakd_loss
from dwakd_plugin.loss.divergence import DIVERGENCES
from dwakd_plugin.loss.terms.mapped import mapped_statistics
from dwakd_plugin.loss.terms.mapped_top import TopStatistics, top_statistics
from dwakd_plugin.loss.variants import VARIANTS
from dwakd_plugin.models.teacher.top_tokens import top_of_states
from tests.loss.cases import assert_same, collate, gradients, make_case
from tests.loss.matched_references import reference_top
from tests.loss.test_matched import (
    BAND,
    LENGTHS,
    evaluate,
    likeliest_alone,
    loss_of,
    some_entries,
    some_inside,
    some_map,
    some_pairs,
)

STUDENT, TEACHER = 13, 17
# The adaptive one is a mixture by shares, which merging outcomes changes.
MERGING_LOWERS = sorted(DIVERGENCES.keys() - {"adaptive_kl"})


@pytest.mark.parametrize(
    ("k", "further"),
    [
        (1, {}),
        (4, {"chunk_size": 3}),
        (4, {"student_weighting": "entropy_gate"}),
        (TEACHER, {}),
        *((6, {"divergence": name, "chunk_size": 2}) for name in sorted(DIVERGENCES)),
    ],
)
def test_agrees_with_the_plain_reference(k: int, further: dict[str, Any]) -> None:
    seed, loss = k + len(further), loss_of("mapped", **further)
    case = make_case(LENGTHS, seed=seed, vocab=(STUDENT, TEACHER))
    pairs = some_pairs(LENGTHS, seed)
    mapped, entries = some_map(case, pairs, seed), some_entries(case, seed)
    inside = some_inside(LENGTHS, pairs, seed)
    read: dict[str, Any] = {"inside": inside, "entries": entries}
    terms = evaluate(case, loss, pairs, mapped, BAND, **read, pad=(2, 1), fill=math.nan, k=k)
    expected: dict[str, Tensor] = {}
    for student, teacher, own, within in zip(
        case.student, case.teacher, pairs, inside, strict=True
    ):
        partners = [*((i, j, 0) for i, j in own), *within]
        found = reference_top(student, teacher, partners, mapped, case, loss, entries, k)
        for name, value in found.items():
            expected[name] = expected.get(name, 0) + value
    assert 0 < expected["top_labels"] < terms.paired_tokens or k == TEACHER
    assert terms.top_tokens == terms.paired_tokens
    if k == TEACHER:  # of a label that no token is, what is left of 1 is rounding
        del expected["teacher_ce"]
    for name, value in expected.items():
        assert_same(getattr(terms, name), value, name)
    for name in ("ce", "student_kd"):
        ours, theirs = gradients(case, getattr(terms, name)), gradients(case, expected[name])
        for leaf in ours:
            assert_same(ours[leaf], theirs[leaf], f"∂{name}/∂{leaf}")


def some_logits(rows: int = 6, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (
        torch.randn(rows, size, generator=generator, dtype=torch.float64) * spread
        for size in (STUDENT, TEACHER)
    )
    return student, teacher, torch.randint(STUDENT, (rows,), generator=generator)


def top_of(teacher: Tensor, k: int) -> Tensor:
    """(C, Vt) → (C, 2k), as the kernel takes it."""
    top = top_of_states(teacher, Head(torch.eye(teacher.shape[1], dtype=teacher.dtype)), k)
    return torch.cat([top.token_ids.to(teacher.dtype), top.log_probs], -1)


def both(
    k: int, token_map: Tensor, divergence: Any, read: Tensor | None = None, table: Any = None
) -> tuple[Any, TopStatistics]:
    """The columns of the whole, and those of the k likeliest."""
    student, teacher, labels = some_logits()
    read = torch.zeros(len(labels), dtype=torch.long) if read is None else read
    rest = labels, read, token_map, table, divergence
    return mapped_statistics(student, teacher, *rest, 1.0), top_statistics(
        student, top_of(teacher, k), *rest
    )


READ = torch.tensor([0, 1, 2, 0, 2, 1])
BEHIND = ContinuationTable(
    torch.tensor([0, 0, 3, 7]),
    torch.tensor([2, 9, 16, 1, 0, 5, 8]),  # in no order
    torch.tensor([4, 1, 4, 2, 2, 0, 12]),
)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_of_the_whole_vocabulary_it_is_mapped(divergence: str) -> None:
    """Every token of the student is the teacher's too: what none is gets the smallest float there,
    which a reversed divergence takes by the token."""
    onto = torch.arange(TEACHER) % STUDENT
    whole, top = both(TEACHER, onto, divergence)
    for name in whole._fields:
        assert_same(getattr(top, name).double(), getattr(whole, name).double(), name, 1e-10)
    assert top.label_kept.all()


def test_and_where_the_student_has_tokens_of_its_own() -> None:
    some = torch.arange(TEACHER) % 7 - 1
    for divergence in ("forward_kl", "skewed_forward_kl", "skewed_reverse_kl", "js"):
        whole, top = both(TEACHER, some, divergence, READ, BEHIND)
        assert_same(top.divergence, whole.divergence, divergence, 1e-10)
        assert_same(top.gate, whole.gate, divergence, 1e-10)


@pytest.mark.parametrize("divergence", MERGING_LOWERS)
def test_a_lower_bound_that_grows_to_the_whole(divergence: str) -> None:
    """Where no two of the teacher's tokens are one of the student's."""
    student, teacher, labels = some_logits(200)
    teacher, none = teacher[:, :STUDENT], torch.zeros_like(labels)
    mapped = torch.randperm(STUDENT, generator=torch.manual_seed(3))
    rest = labels, none, mapped, None, divergence
    whole = mapped_statistics(student, teacher, *rest, 1.0).divergence  # type: ignore[arg-type]
    before = torch.zeros_like(whole)
    for k in range(1, STUDENT + 1):
        value = top_statistics(student, top_of(teacher, k), *rest).divergence  # type: ignore[arg-type]
        assert (value >= before - 1e-12).all() and (value <= whole + 1e-10).all()
        before = value
    assert_same(before, whole, divergence, 1e-10)


@pytest.mark.parametrize(
    ("divergence", "behind"),
    [
        *((name, False) for name in sorted(DIVERGENCES)),
        *((name, True) for name in ("forward_kl", "skewed_forward_kl", "skewed_reverse_kl", "js")),
    ],
)
def test_the_error_falls_with_k(divergence: str, behind: bool) -> None:
    """Of a map of several to one, and of what goes on with what was read."""
    student, teacher, labels = some_logits(400, spread=3.0)
    read = labels % 3 if behind else torch.zeros_like(labels)
    rest = labels, read, torch.arange(TEACHER) % STUDENT, BEHIND if behind else None, divergence
    whole = mapped_statistics(student, teacher, *rest, 1.0)  # type: ignore[arg-type]
    errors = []
    for k in (1, 2, 4, 8, 12, TEACHER):
        top = top_statistics(student, top_of(teacher, k), *rest)  # type: ignore[arg-type]
        known = (read == 0) | (whole.divergence != whole.ce)
        errors.append(float((top.divergence - whole.divergence)[known].abs().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-2] < errors[0] / 4, errors


@pytest.mark.parametrize("divergence", MERGING_LOWERS)  # whose shares take no gradient
def test_gradient(divergence: str) -> None:
    """Rows whose tokens the student has none for learn the label, as do those not foreseen."""
    student, teacher, labels = some_logits()
    token_map = torch.arange(TEACHER) % STUDENT
    token_map[teacher[3].topk(4).indices] = -1
    top = top_of(teacher, 4)
    top[0, 2:4], top[0, 6:] = -1, -math.inf  # two tokens only
    leaf = student.requires_grad_()

    def columns(logits: Tensor) -> TopStatistics:
        return top_statistics(logits, top, labels, READ, token_map, BEHIND, divergence)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(lambda z: (columns(z).divergence, columns(z).ce), leaf)
    found = columns(leaf)
    assert found.divergence[3] == found.ce[3] and found.divergence[0] != found.ce[0]
    assert torch.stack(list(found[:4])).isfinite().all()


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_finite_in_float32_where_one_side_is_sure(divergence: str) -> None:
    """Of what another says, of the same and of the rest; and all of the student's tokens kept."""
    student = torch.full((4, 5), -200.0)
    student[torch.arange(4), torch.tensor([0, 1, 4, 0])] = 0.0
    log_probs = torch.tensor([[0.0, -100.0], [0.0, -100.0], [-0.1, -3.0], [-0.7, -0.7]])
    top = torch.cat([torch.tensor([0.0, 1.0]).expand(4, 2), log_probs], -1)
    none, labels = torch.zeros(4, dtype=torch.long), torch.arange(4)
    for token_map in (torch.arange(5), torch.zeros(5, dtype=torch.long)):
        leaf = student.clone().requires_grad_()
        found = top_statistics(leaf, top, labels, none, token_map, None, divergence)  # type: ignore[arg-type]
        found.divergence.sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        assert found.divergence.isfinite().all() and (found.divergence > -1e-5).all()
    alone = top_statistics(student[:, :1], top, none, none, token_map, None, divergence)  # type: ignore[arg-type]
    assert alone.divergence.isfinite().all()


def test_gradients_are_formed_in_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    case, loss = make_case(LENGTHS, seed=1), loss_of("mapped", chunk_size=3)
    pairs = some_pairs(LENGTHS, 1)

    def terms() -> LossTerms:
        return evaluate(case, loss, pairs, some_map(case, pairs, 2), BAND, k=5)

    whole, found = terms(), terms()
    weights = LossTerms.weights(loss)
    by_terms = torch.stack([weight * getattr(found, name) for name, weight in weights.items()])
    expected = gradients(case, by_terms.sum())

    def none(*_: Any) -> Tensor:
        raise AssertionError("backward goes through a head")

    monkeypatch.setattr(Head, "logits", none)
    for leaf, grad in gradients(case, whole.total(loss)).items():
        assert_same(grad, expected[leaf], leaf)


def test_only_what_needs_no_states_takes_them() -> None:
    mapped = VARIANTS["mapped"]
    assert not mapped.needs_states(loss_of("mapped"))
    assert mapped.needs_states(loss_of("mapped", cosine_weight=0.1))
    assert mapped.needs_states(loss_of("mapped", dtw_weight=0.1))
    case = make_case([(3, 3)])
    student = replace(collate(case.student, case.student_head), pairs=torch.arange(3))
    teacher = likeliest_alone(collate(case.teacher, case.teacher_head), 4)
    teacher = replace(teacher, pairs=torch.arange(3), token_map=torch.zeros(17, dtype=torch.long))
    others = loss_of("uld"), loss_of("dskdv2"), loss_of("paper"), loss_of("mapped", cosine_weight=1)
    for loss in others:
        with pytest.raises(ValueError, match="needs the teacher's states"):
            dwakd_loss(student, teacher, case.projectors, loss=loss)
    with pytest.raises(ValueError, match="temperature 2"):
        dwakd_loss(student, teacher, None, loss=loss_of("mapped", temperature=2.0))
