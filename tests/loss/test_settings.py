"""Each setting changes its own terms; what weighs nothing is not computed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dwakd_plugin.loss import LossTerms, dwakd_loss
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig
from tests.loss.cases import FIGURES, NARROW, TERMS, collate, evaluate, make_case

SWITCHES = [
    ({"divergence": "js"}, {}, {"student_kd"}),
    ({"student_weighting": "entropy"}, {}, {"student_kd"}),
    ({"student_weighting": "none"}, {}, {"student_kd"}),
    ({"teacher_weighting": "none"}, {}, {"teacher_kd"}),
    ({"temperature": 1.0}, {}, {"student_kd", "teacher_kd"}),
    ({"ce_weight": 0.0}, {}, {"ce"}),
    ({"kd_weight": 0.0}, {}, {"t2s_ce", "student_kd", "teacher_kd"}),
    ({"dtw_weight": 0.0}, {}, {"hidden_dtw", "embed_dtw"}),
    ({}, {"band": False}, {"hidden_dtw", "embed_dtw"}),
    ({}, {"band_width": 2.0}, {"hidden_dtw", "embed_dtw"}),
    ({}, {"band_entropy_coef": 2.0}, {"hidden_dtw", "embed_dtw"}),
    ({}, {"band_center_blend": 0.0}, {"hidden_dtw", "embed_dtw"}),
    ({}, {"band_penalty": 0.5}, {"hidden_dtw", "embed_dtw"}),
    ({}, {"gamma_start": 0.5}, {"hidden_dtw", "embed_dtw"}),
    ({"kd_warmup_steps": 10, "chunk_size": 3}, {"gamma_end": 0.1}, set()),  # the trainer's affair
]


@pytest.mark.parametrize(("loss_settings", "dtw_settings", "changed"), SWITCHES)
def test_a_switch_changes_its_terms_only(
    loss_settings: dict, dtw_settings: dict, changed: set[str]
) -> None:
    case = make_case([(6, 7), (4, 3)])
    before = evaluate(case)
    after = evaluate(case, LossConfig(**loss_settings), NARROW.model_copy(update=dtw_settings))
    different = {
        name
        for name in TERMS
        if not torch.isclose(getattr(before, name), getattr(after, name), rtol=1e-9)
    }
    assert different == changed
    if 0.0 in loss_settings.values():
        assert all(getattr(after, name) == 0 for name in changed)


def test_total_weighs_and_ramps() -> None:
    values = dict(zip(TERMS, torch.arange(1.0, 7.0), strict=True))
    figures = dict.fromkeys(FIGURES, torch.tensor(0)) | {"uld": torch.tensor(7.0)}
    terms = LossTerms(**values, **figures)
    loss = LossConfig(ce_weight=10, kd_weight=100, dtw_weight=1000)
    assert terms.total(loss) == 10 * 1 + 100 * (3 + 4 + 2 + 7) + 1000 * (5 + 6)
    assert terms.total(loss, kd_ramp=0.5) == 10 * 1 + 100 * (1.5 + 4 + 2 + 7) + 1000 * (5 + 6)


def test_gamma_defaults_to_the_start_of_its_schedule() -> None:
    case = make_case([(3, 4)])
    sides = (collate(case.student, case.student_head), collate(case.teacher, case.teacher_head))
    soft_dtw = SoftDTWConfig(gamma_start=1.5)
    default = dwakd_loss(*sides, case.projectors, soft_dtw=soft_dtw)
    given_ = dwakd_loss(*sides, case.projectors, soft_dtw=SoftDTWConfig(), gamma=1.5)
    assert torch.equal(default.hidden_dtw, given_.hidden_dtw)


def test_weightless_terms_are_not_computed() -> None:
    def refuse(states: Tensor) -> Tensor:
        assert states.numel() == 0, "a projector was called"  # on nothing, to have a gradient
        return states

    case = make_case([(3, 4)])
    sides = (collate(case.student, case.student_head), collate(case.teacher, case.teacher_head))
    none = SimpleNamespace(query=refuse, t2s=refuse, s2t=refuse, embed_t2s=refuse)
    terms = dwakd_loss(*sides, none, loss=LossConfig(kd_weight=0, dtw_weight=0))
    assert terms.ce > 0 and terms.attention_entropy == 0
    dtw_only = SimpleNamespace(
        query=refuse, t2s=case.projectors.t2s, s2t=refuse, embed_t2s=case.projectors.embed_t2s
    )
    loss = LossConfig(ce_weight=0, kd_weight=0)
    terms = dwakd_loss(*sides, dtw_only, loss=loss, soft_dtw=SoftDTWConfig(band=False))
    assert terms.hidden_dtw != 0 and terms.ce == 0
