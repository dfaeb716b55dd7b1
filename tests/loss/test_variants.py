"""The record of variants: what follows from it, and what a new one takes."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dwakd_plugin.loss import LossTerms, dwakd_loss, projects_labels, trained_projectors
from dwakd_plugin.loss.head_pass import Kernel
from dwakd_plugin.loss.matches.partners import InOrder
from dwakd_plugin.loss.record import HeadPasses, Term, Variant
from dwakd_plugin.loss.terms.labels import LABELS
from dwakd_plugin.loss.variants import VARIANTS
from dwakd_plugin.recipe.schema import DWAKDConfig, LossConfig, TeacherConfig
from dwakd_plugin.train.metrics import logged, means
from tests.loss.cases import assert_same, collate, gradients, make_case

# A variant in one file: as sure as the teacher is at the position of the same number.


def _statistics(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    own = student_logits.log_softmax(-1)
    apart = own.max(-1).values.exp() - teacher_logits.softmax(-1).max(-1).values
    return -own.gather(-1, labels[:, None])[:, 0], apart.square()


def _sureness(passes: HeadPasses) -> dict[str, Tensor]:
    return {"sureness": passes.student[1].where(passes.match.compared, 0.0).sum()}


SURENESS = Term("sureness", "teach", _sureness, kernel=lambda batch: Kernel(_statistics, 2))


@pytest.fixture
def loss(monkeypatch: pytest.MonkeyPatch) -> LossConfig:
    # The line.
    monkeypatch.setitem(VARIANTS, "sure", Variant(InOrder, (LABELS, SURENESS), "sureness ("))
    settings = LossConfig(dtw_weight=0, kd_weight=3, chunk_size=2)
    return settings.model_copy(update={"matching": "sure"})


def test_a_new_variant_is_computed_weighed_logged_and_judged(loss: LossConfig) -> None:
    case = make_case([(4, 3), (2, 5), (2, 0)])
    student = collate(case.student, case.student_head, pad=1, fill=float("nan"))
    teacher = collate(case.teacher, case.teacher_head, fill=float("nan"))
    terms = dwakd_loss(student, teacher, case.projectors, loss=loss)
    expected, ce = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(case.student, case.teacher, strict=True):
        p = case.student_head.logits(ours.hidden).softmax(-1)
        q = case.teacher_head.logits(theirs.hidden).softmax(-1).detach()
        ce = ce - p[range(len(p)), ours.labels].log().sum()
        for i in range(min(len(p), len(q))):
            expected = expected + (p[i].max() - q[i].max()) ** 2
    assert_same(terms.sureness, expected, "sureness")
    assert LossTerms.weights(loss)["sureness"] == 3
    assert_same(terms.total(loss), loss.ce_weight * ce + 3 * expected, "total")
    found = gradients(case, terms.total(loss))
    for name, wanted in gradients(case, loss.ce_weight * ce + 3 * expected).items():
        assert_same(found[name], wanted, name)
    assert trained_projectors(loss) == frozenset()

    config = DWAKDConfig(teacher=TeacherConfig(base_model="any"))
    config = config.model_copy(update={"loss": loss})
    totals = {name: value.item() for name, value in vars(terms).items()}
    figures = means(totals, config, 1.0, "")
    assert set(logged(figures, config, "")) == {"ce", "sureness"}
    assert figures["sureness"] == pytest.approx(float(expected) / 6)
    assert 0 < figures["kd_share"] < 1


@pytest.mark.parametrize("matching", VARIANTS)
def test_the_schema_has_soft_dtw_where_the_record_has(matching: str) -> None:
    warps = any(term.role == "warp" for term in VARIANTS[matching].terms)
    if warps:
        assert LossConfig(matching=matching).dtw_weight > 0
    else:
        with pytest.raises(ValidationError, match="soft-DTW needs"):
            LossConfig(matching=matching)
    LossConfig(matching=matching, dtw_weight=0)


@pytest.mark.parametrize(
    ("matching", "kd", "dtw", "trained"),
    [
        ("attention", 1, 1, {"query", "t2s", "s2t", "embed_t2s"}),
        ("attention", 1, 0, {"query", "t2s", "s2t", "embed_t2s"}),
        ("attention", 0, 1, {"query", "t2s", "s2t", "embed_t2s"}),
        ("attention", 0, 0, set()),
        ("exact", 1, 1, {"t2s", "embed_t2s"}),
        ("exact", 1, 0, {"t2s"}),
        ("exact", 0, 1, {"t2s", "embed_t2s"}),
        ("mapped", 1, 0, set()),
        ("mapped", 1, 1, {"t2s", "embed_t2s"}),
        ("mapped", 0, 1, {"t2s", "embed_t2s"}),
        ("order", 1, 0, set()),
    ],
)
def test_which_projectors_train(matching: str, kd: float, dtw: float, trained: set[str]) -> None:
    loss = LossConfig(matching=matching, kd_weight=kd, dtw_weight=dtw)
    assert trained_projectors(loss) == trained
    assert loss.needs_projectors == bool(trained)


@pytest.mark.parametrize("kd", [0, 1])
def test_the_cosine_trains_what_it_goes_through_and_is_for_mapped(kd: float) -> None:
    loss = LossConfig(matching="mapped", kd_weight=kd, dtw_weight=0, cosine_weight=0.5)
    assert trained_projectors(loss) == {"t2s"} and loss.needs_projectors and loss.needs_teacher
    assert not projects_labels(loss) and projects_labels(LossConfig())
    for matching in set(VARIANTS) - {"mapped"}:
        with pytest.raises(ValidationError, match="it is for variant `mapped`"):
            LossConfig(matching=matching, dtw_weight=0, cosine_weight=0.5)
