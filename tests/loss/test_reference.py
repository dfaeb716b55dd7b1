"""The loss against a plain reference, term by term and by the variants of the paper's Table 3."""

from __future__ import annotations

import math

import pytest
import torch

from dwakd_plugin.recipe.schema import VARIANTS, LossConfig
from tests.loss.cases import NARROW, TERMS, assert_same, evaluate, gradients, make_case
from tests.loss.references import reference_terms

REFERENCE_CASES = [
    ({}, {}),
    ({"divergence": "reverse_kl", "temperature": 1.0}, {"band_center_blend": 0.0}),
    ({"divergence": "skewed_forward_kl", "student_weighting": "entropy"}, {"band": False}),
    ({"divergence": "skewed_reverse_kl", "teacher_weighting": "none"}, {"band_penalty": 3.0}),
    ({"divergence": "adaptive_kl", "chunk_size": 2}, {"gamma_start": 0.1}),
    ({"divergence": "js", "student_weighting": "none"}, {"band_entropy_coef": 0.0}),
    ({"student_weighting": "entropy_then_gate"}, {}),
    ({"attention_value": "hidden", "chunk_size": 3}, {}),
]


@pytest.mark.parametrize(("loss_settings", "dtw_settings"), REFERENCE_CASES)
def test_agrees_with_the_plain_reference(loss_settings: dict, dtw_settings: dict) -> None:
    seed = REFERENCE_CASES.index((loss_settings, dtw_settings))
    lengths = [(4, 6), (5, 2), (1, 3), (3, 1), (2, 0), (0, 4)]
    case = make_case(lengths, seed=seed, softcap=None if seed % 2 else 5.0)
    loss = LossConfig(**loss_settings)
    soft_dtw = NARROW.model_copy(update=dtw_settings)
    terms = evaluate(case, loss, soft_dtw, pad=(2, 1), fill=math.nan)
    expected = dict.fromkeys(TERMS, torch.zeros((), dtype=torch.float64))
    for student, teacher in zip(case.student, case.teacher, strict=True):
        for name, value in reference_terms(student, teacher, case, loss, soft_dtw).items():
            expected[name] = expected[name] + value
    for name in TERMS:
        assert_same(getattr(terms, name), expected[name], name)
        ours, theirs = gradients(case, getattr(terms, name)), gradients(case, expected[name])
        for leaf in ours:
            assert_same(ours[leaf], theirs[leaf], f"∂{name}/∂{leaf}")


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if "matching" not in VARIANTS[name].get("loss", {})]
)
def test_variants_of_table_3(variant: str) -> None:
    """Each row of the paper's Table 3 against the reference, as one total."""
    case = make_case([(4, 5)], seed=7)
    loss = LossConfig(**VARIANTS[variant].get("loss", {}))
    soft_dtw = NARROW.model_copy(update=VARIANTS[variant].get("soft_dtw", {}))
    terms = evaluate(case, loss, soft_dtw)
    t = reference_terms(case.student[0], case.teacher[0], case, loss, soft_dtw)
    expected = loss.ce_weight * t["ce"] + loss.dtw_weight * (t["hidden_dtw"] + t["embed_dtw"])
    expected = expected + loss.kd_weight * (t["student_kd"] + t["teacher_kd"] + t["t2s_ce"])
    assert_same(terms.total(loss), expected, variant)
