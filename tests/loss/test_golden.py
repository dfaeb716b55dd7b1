"""The loss against golden values: float64, computed outside this project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dwakd_plugin.loss import Head, ResponseStates, dwakd_loss
from dwakd_plugin.loss.alignment import (
    attention_band,
    band_penalty,
    cross_model_attention,
    standardise_scale,
    valid_positions,
)
from dwakd_plugin.loss.terms.student_space import student_statistics
from dwakd_plugin.loss.terms.teacher_space import teacher_statistics_
from dwakd_plugin.loss.token_weights import student_token_weights, teacher_token_weights
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig
from tests.conftest import ROOT
from tests.loss.cases import TERMS, assert_same


def golden_files() -> list[Path]:
    folders = [ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden"]
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def load_golden(path: Path) -> tuple[dict[str, Tensor], LossConfig, SoftDTWConfig]:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weighted = config["token_weights"]
    loss = LossConfig(
        ce_weight=config["ce_weight"],
        kd_weight=config["kd_weight"],
        dtw_weight=config["dtw_weight"],
        temperature=config["temperature"],
        divergence=config["objective"],
        student_weighting=("entropy_gate" if config["gate"] else "entropy") if weighted else "none",
        teacher_weighting="confidence" if weighted else "none",
    )
    soft_dtw = SoftDTWConfig(
        gamma_start=config["gamma"],
        band=config["band"],
        band_width=config["base_width"],
        band_entropy_coef=config["entropy_coef"],
        band_center_blend=config["center_blend"],
        band_penalty=config["band_penalty"],
    )
    return tensors, loss, soft_dtw


def golden_states(tensors: dict[str, Tensor], side: str) -> ResponseStates:
    own = {name: tensors[f"{side}.{name}"].clone() for name in ("target_embeds", "hidden", "head")}
    if side == "student":
        for tensor in own.values():
            tensor.requires_grad_()
    return ResponseStates(
        input_embeds=tensors[f"{side}.input_embeds"][None],
        target_embeds=own["target_embeds"][None],
        hidden=own["hidden"][None],
        lengths=torch.tensor([len(own["hidden"])]),
        head=Head(own["head"]),
        labels=tensors[f"{side}.labels"][None],
    )


def golden_projectors(tensors: dict[str, Tensor]) -> Projectors:
    projectors = Projectors(tensors["student.hidden"].shape[1], tensors["teacher.hidden"].shape[1])
    prefix = "projector."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    projectors.double().load_state_dict(weights)
    return projectors


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: f"{p.parent.parent.name}-{p.stem}")
def test_golden_terms_and_gradients(path: Path) -> None:
    tensors, loss, soft_dtw = load_golden(path)
    student, teacher = golden_states(tensors, "student"), golden_states(tensors, "teacher")
    projectors = golden_projectors(tensors)
    terms = dwakd_loss(student, teacher, projectors, loss=loss, soft_dtw=soft_dtw)

    # The files hold the sequence terms also where their weight is 0 and they are left out here.
    every = loss.model_copy(update={"dtw_weight": loss.dtw_weight or 1.0})
    all_terms = dwakd_loss(student, teacher, projectors, loss=every, soft_dtw=soft_dtw)
    names = ("ce", "ce_t2s", "kd_student", "kd_teacher", "dtw_hidden", "dtw_embed")
    for name, term in zip(names, TERMS, strict=True):
        assert_same(getattr(all_terms, term), tensors[f"expected.{name}"], name)
        if loss.dtw_weight or "dtw" not in term:
            assert_same(getattr(terms, term), tensors[f"expected.{name}"], name)

    total = terms.total(loss)
    assert_same(total, tensors["expected.total"], "total")  # a sum: not divided by the tokens
    leaves = {
        "student.head": student.head.weight,
        "student.hidden": student.hidden,
        "student.target_embeds": student.target_embeds,
    }
    leaves |= {f"projector.{name}": p for name, p in projectors.named_parameters()}
    grads = torch.autograd.grad(total, list(leaves.values()))
    assert {f"grad.{name}" for name in leaves} == {k for k in tensors if k.startswith("grad.")}
    for name, grad in zip(leaves, grads, strict=True):
        assert_same(grad.view_as(tensors[f"grad.{name}"]), tensors[f"grad.{name}"], name)


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: f"{p.parent.parent.name}-{p.stem}")
def test_golden_parts(path: Path) -> None:
    """The matrices and per-token values inside, by the functions that the loss is made of."""
    tensors, loss, soft_dtw = load_golden(path)
    student, teacher = golden_states(tensors, "student"), golden_states(tensors, "teacher")
    projectors = golden_projectors(tensors)
    valid_s = valid_positions(student.lengths, student.hidden.shape[1])
    valid_t = valid_positions(teacher.lengths, teacher.hidden.shape[1])

    key = torch.cat([teacher.input_embeds, teacher.target_embeds], -1)
    query = projectors.query(torch.cat([student.input_embeds, student.target_embeds], -1))
    A, B = cross_model_attention(query, standardise_scale(key, valid_t), valid_s, valid_t)
    assert_same(A[0], tensors["expected.A"], "A")
    assert_same(B[0], tensors["expected.B"], "B")
    if soft_dtw.band:
        inside = attention_band(A, student.lengths, teacher.lengths, soft_dtw)
        penalty = band_penalty(inside, soft_dtw, A.dtype)
        assert_same(penalty[0], tensors["expected.penalty"], "penalty")
    else:
        assert not tensors["expected.penalty"].any()

    value = projectors.t2s(
        standardise_scale(teacher.target_embeds, valid_t)
        + standardise_scale(teacher.hidden, valid_t)
    )
    tokens = student_statistics(
        student.head.logits(student.hidden[0]),
        student.head.logits((A @ value)[0]),
        student.labels[0],
        student.labels[0],
        loss.divergence,
        loss.temperature,
    )
    w_s = student_token_weights(
        tokens.entropy[None], tokens.gate[None], valid_s, loss.student_weighting
    )
    assert_same(tokens.divergence, tensors["expected.kl_s"], "kl_s")
    assert_same(w_s[0], tensors["expected.w_s"], "w_s")
    tokens_t, _ = teacher_statistics_(
        teacher.head.logits(teacher.hidden[0]).detach(),
        teacher.head.logits((B @ projectors.s2t(student.hidden))[0]).detach(),
        teacher.labels[0],
        loss.temperature,
    )
    rows = teacher.head.weight.shape[0]
    w_t = teacher_token_weights(tokens_t.entropy[None], rows, valid_t, loss.teacher_weighting)
    assert_same(tokens_t.divergence, tensors["expected.kl_t"], "kl_t")
    assert_same(w_t[0], tensors["expected.w_t"], "w_t")
