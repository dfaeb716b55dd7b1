"""The figures beside the loss count what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dwakd_plugin.loss import dwakd_loss
from dwakd_plugin.recipe.schema import LossConfig
from tests.loss.cases import FIGURES, collate, evaluate, make_case


def test_figures_count_what_they_say() -> None:
    case = make_case([(3, 4), (2, 0), (0, 5), (4, 2)])
    terms = evaluate(case)
    assert (terms.student_tokens, terms.teacher_tokens, terms.distilled_tokens) == (9, 6, 7)
    assert terms.band_cells == 3 * 4 + 4 * 2
    assert 0 < terms.band_cells_inside < terms.band_cells
    assert 0 < terms.gate < 7 and 0 <= terms.t2s_correct <= 7
    assert 0 < terms.attention_entropy < 7 * math.log(4)
    figures = set(FIGURES) - {"uld", "hidden_cosine"}  # terms, which are 0 here
    assert not any(getattr(terms, name).requires_grad for name in figures)


def test_what_tells_a_teacher_and_an_attention_of_use_from_one_of_none() -> None:
    case = make_case([(3, 4), (2, 0), (0, 5), (4, 2)])
    terms = evaluate(case, LossConfig(chunk_size=3), pad=(1, 2), fill=math.nan)
    teacher_ce = paired_ce = teacher_end_ce = end_ce = spread = limit = 0.0
    for i in (0, 3):  # those with both sides
        student, teacher = case.student[i], case.teacher[i]
        for sample, head in ((student, case.student_head), (teacher, case.teacher_head)):
            probabilities = head.logits(sample.hidden).softmax(-1).detach()
            chosen = [float(p[y]) for p, y in zip(probabilities, sample.labels, strict=True)]
            nats = -sum(map(math.log, chosen))
            teacher_ce += nats if sample is teacher else 0
            paired_ce += nats if sample is student else 0
            teacher_end_ce -= math.log(chosen[-1]) if sample is teacher else 0
            end_ce -= math.log(chosen[-1]) if sample is student else 0
        read = torch.cat([student.input_embeds, student.target_embeds], -1)
        key = torch.cat([teacher.input_embeds, teacher.target_embeds], -1)
        scores = case.projectors.query(read).detach() @ (key / key.std()).T / key.shape[1] ** 0.5
        mean = scores.softmax(-1).mean(0).tolist()
        spread -= len(student.hidden) * sum(p * math.log(p) for p in mean)
        limit += len(student.hidden) * math.log(len(teacher.hidden))
    assert terms.teacher_ce.item() == pytest.approx(teacher_ce, rel=1e-9)
    assert terms.paired_ce.item() == pytest.approx(paired_ce, rel=1e-9)
    assert terms.teacher_end_ce.item() == pytest.approx(teacher_end_ce, rel=1e-9)
    assert terms.end_ce.item() == pytest.approx(end_ce, rel=1e-9) and terms.end_tokens == 2
    assert terms.attention_spread.item() == pytest.approx(spread, rel=1e-9)
    assert terms.attention_limit.item() == pytest.approx(limit, rel=1e-9)
    assert terms.attention_entropy <= terms.attention_spread <= terms.attention_limit

    unlabelled = replace(collate(case.teacher, case.teacher_head), labels=None)
    without = dwakd_loss(collate(case.student, case.student_head), unlabelled, case.projectors)
    assert without.teacher_ce == 0 and without.teacher_kd > 0
