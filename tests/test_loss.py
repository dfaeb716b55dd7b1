"""The loss against golden values, a plain reference, and the properties that it promises."""

from __future__ import annotations

import itertools
import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dwakd_plugin.loss import Head, LossTerms, ResponseStates, dwakd_loss, sequence_level
from dwakd_plugin.loss.alignment import (
    attention_band,
    attention_entropy,
    band_penalty,
    cross_model_attention,
    standardise_scale,
    valid_positions,
)
from dwakd_plugin.loss.divergence import (
    AUTO_CHUNK_ELEMENTS,
    AUTO_CHUNK_TOKENS,
    DIVERGENCES,
    SKEW,
    adaptive_kl,
    forward_kl,
    map_token_chunks,
    reverse_kl,
    student_statistics,
    teacher_statistics_,
    tokens_per_chunk,
)
from dwakd_plugin.loss.token_weights import (
    normalise_per_sample,
    student_token_weights,
    teacher_token_weights,
)
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.recipe.schema import VARIANTS, LossConfig, SoftDTWConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers each: waking threads for them takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TERMS = ("ce", "t2s_ce", "student_kd", "teacher_kd", "hidden_dtw", "embed_dtw")
FIGURES = tuple(field.name for field in fields(LossTerms) if field.name not in TERMS)
# A band that cuts through the small cases here; the default of 5 tokens would hold all of them.
NARROW = SoftDTWConfig(band_width=0.4, band_entropy_coef=0.2)


# ---------------------------------------------------------------------------------------------
# Golden values: float64, computed outside this project


def golden_files() -> list[Path]:
    root = Path(__file__).parent
    folders = [root / "golden", root.parent.parent / "shared" / "golden"]
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


# ---------------------------------------------------------------------------------------------
# Random batches. The leaves are samples without padding, so that batches of any layout have
# comparable gradients.


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


# ---------------------------------------------------------------------------------------------
# The reference: one sample at a time, no padding, no chunks, probabilities instead of
# log-probabilities, and the recurrence of soft-DTW written out cell by cell.


def reference_divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * torch.log(a / b)).sum()

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "skewed_forward_kl":
        return kl(p, 0.1 * p + 0.9 * q)
    if name == "skewed_reverse_kl":
        return kl(q, 0.9 * p + 0.1 * q)
    if name == "js":
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    assert name == "adaptive_kl"
    # The tail: the least likely tokens, as many as fit into half of the mass.
    mass = head_gap = tail_gap = 0.0
    for v in sorted(range(len(p)), key=lambda v: float(p[v])):
        mass += float(p[v])
        gap = abs(float(p[v]) - float(q[v].detach()))
        if mass <= 0.5:
            tail_gap += gap
        else:
            head_gap += gap
    return (head_gap * kl(p, q) + tail_gap * kl(q, p)) / (head_gap + tail_gap)


def reference_soft_dtw(x: Tensor, y: Tensor, gamma: float, penalty: Tensor | None = None) -> Tensor:
    infinity = x.new_tensor(math.inf)
    R = {(0, 0): x.new_zeros(())}
    for i, j in itertools.product(range(1, len(x) + 1), range(1, len(y) + 1)):
        cost = 1 - torch.nn.functional.cosine_similarity(x[i - 1], y[j - 1], dim=0)
        if penalty is not None:
            cost = cost + penalty[i - 1, j - 1]
        before = torch.stack([R.get(c, infinity) for c in ((i - 1, j - 1), (i - 1, j), (i, j - 1))])
        before = before[before.isfinite()]
        R[i, j] = cost - gamma * torch.logsumexp(-before / gamma, 0)
    return R[len(x), len(y)]


def reference_terms(
    student: Sample,
    teacher: Sample,
    case: Case,
    loss: LossConfig,
    soft_dtw: SoftDTWConfig,
) -> dict[str, Tensor]:
    def logits(head: Head, states: Tensor) -> Tensor:
        out = states @ head.weight.T + (0 if head.bias is None else head.bias)
        out = out * head.scale
        return out if head.softcap is None else head.softcap * torch.tanh(out / head.softcap)

    def N(x: Tensor) -> Tensor:
        return x / x.std()

    S, T = len(student.hidden), len(teacher.hidden)
    zero = case.student_head.weight.new_zeros(())
    terms = dict.fromkeys(TERMS, zero)
    if S == 0:
        return terms
    z_s = logits(case.student_head, student.hidden)
    p_s = z_s.softmax(-1)
    terms["ce"] = -sum((p_s[i, student.labels[i]].log() for i in range(S)), zero)
    if T == 0:
        return terms

    P = case.projectors
    q = P.query(torch.cat([student.input_embeds, student.target_embeds], -1).detach())
    k = N(torch.cat([teacher.input_embeds, teacher.target_embeds], -1))
    scores = q @ k.T / math.sqrt(k.shape[1])
    A, B = scores.softmax(1), scores.softmax(0).T
    constant_head = case.student_head.detached()
    z_t2s = logits(constant_head, A @ P.t2s(N(teacher.target_embeds) + N(teacher.hidden)))
    z_t = logits(case.teacher_head, teacher.hidden)
    z_s2t = logits(case.teacher_head, B @ P.s2t(student.hidden))
    p_t2s, p_t = z_t2s.softmax(-1), z_t.softmax(-1)

    w_s, w_t = [], []  # plain numbers: weights and band are constants
    for i in range(S):
        weight = -float((p_s[i] * p_s[i].log()).detach().sum())
        if loss.student_weighting == "entropy_gate":
            weight *= float(p_t2s[i].detach().max())
        w_s.append(1.0 if loss.student_weighting == "none" else weight)
    for j in range(T):
        weight = 1 + float((p_t[j] * p_t[j].log()).detach().sum()) / math.log(z_t.shape[1])
        w_t.append(1.0 if loss.teacher_weighting == "none" else weight)
    tau = loss.temperature
    for i in range(S):
        target, own = (z_t2s[i].detach() / tau).softmax(-1), (z_s[i] / tau).softmax(-1)
        value = reference_divergence(loss.divergence, target, own)
        terms["student_kd"] = terms["student_kd"] + w_s[i] * S / sum(w_s) * value
        terms["t2s_ce"] = terms["t2s_ce"] - p_t2s[i, student.labels[i]].log()
    for j in range(T):
        target, own = (z_t[j] / tau).softmax(-1), (z_s2t[j] / tau).softmax(-1)
        value = reference_divergence("forward_kl", target, own)
        terms["teacher_kd"] = terms["teacher_kd"] + w_t[j] * T / sum(w_t) * value

    penalty, A = torch.zeros(S, T, dtype=A.dtype), A.detach()
    for i in range(S):
        mean = sum((j + 1) * float(A[i, j]) for j in range(T))
        alpha = soft_dtw.band_center_blend
        center = alpha * mean + (1 - alpha) * (i + 1) * T / S
        spread = -sum(float(a) * math.log(float(a)) for a in A[i])
        width = soft_dtw.band_width + soft_dtw.band_entropy_coef * spread
        for j in range(T):
            if soft_dtw.band and abs(j + 1 - center) > width:
                penalty[i, j] = soft_dtw.band_penalty
    gamma = soft_dtw.gamma_start
    pairs = {
        "hidden_dtw": (student.hidden, P.t2s(teacher.hidden)),
        "embed_dtw": (student.target_embeds, P.embed_t2s(teacher.target_embeds)),
    }
    for name, (x, y) in pairs.items():
        across = reference_soft_dtw(x, y, gamma, penalty)
        own = reference_soft_dtw(x, x, gamma) + reference_soft_dtw(y, y, gamma)
        terms[name] = across - own / 2
    return terms


REFERENCE_CASES = [
    ({}, {}),
    ({"divergence": "reverse_kl", "temperature": 1.0}, {"band_center_blend": 0.0}),
    ({"divergence": "skewed_forward_kl", "student_weighting": "entropy"}, {"band": False}),
    ({"divergence": "skewed_reverse_kl", "teacher_weighting": "none"}, {"band_penalty": 3.0}),
    ({"divergence": "adaptive_kl", "chunk_size": 2}, {"gamma_start": 0.1}),
    ({"divergence": "js", "student_weighting": "none"}, {"band_entropy_coef": 0.0}),
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


# ---------------------------------------------------------------------------------------------
# Invariants


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=4),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    fill=st.sampled_from([0.0, 1e30, math.nan, math.inf]),
    chunk_size=st.sampled_from([1, 2, 5, "auto"]),
    divergence=st.sampled_from(sorted(DIVERGENCES)),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_padding_batching_order_and_chunks_change_nothing(
    lengths: list[tuple[int, int]],
    pad: tuple[int, int],
    fill: float,
    chunk_size: int | str,
    divergence: str,
    seed: int,
    data: st.DataObject,
) -> None:
    """The padded, shuffled, chunked batch equals the sum of its samples, each alone and bare."""
    case = make_case(lengths, seed=seed)
    loss = LossConfig(divergence=divergence)
    order = data.draw(st.permutations(range(len(lengths))))
    batch = evaluate(
        case,
        loss.model_copy(update={"chunk_size": chunk_size}),
        order=list(order),
        pad=pad,
        fill=fill,
    )
    alone = [evaluate(single(case, i), loss) for i in range(len(lengths))]
    for name in TERMS + FIGURES:
        expected = torch.stack([getattr(terms, name) for terms in alone]).sum()
        assert_same(getattr(batch, name), expected, name, tolerance=1e-10)
    total = torch.stack([terms.total(loss) for terms in alone]).sum()
    ours, theirs = gradients(case, batch.total(loss)), gradients(case, total)
    for leaf in ours:
        assert_same(ours[leaf], theirs[leaf], leaf, tolerance=1e-10)


def test_padding_takes_no_gradient() -> None:
    case = make_case([(3, 4), (2, 2)])
    student = collate(case.student, case.student_head, pad=2, fill=math.nan)
    teacher = collate(case.teacher, case.teacher_head, pad=2, fill=math.nan)
    hidden = student.hidden.detach().requires_grad_()
    embeds = student.target_embeds.detach().requires_grad_()
    student = replace(student, hidden=hidden, target_embeds=embeds)
    dwakd_loss(student, teacher, case.projectors).total(LossConfig()).backward()
    valid = valid_positions(student.lengths, hidden.shape[1])
    for grad in (hidden.grad, embeds.grad):
        assert (grad[~valid] == 0).all()
        assert (grad[valid] != 0).any(-1).all()


def test_constants_take_no_gradient() -> None:
    case = make_case([(3, 4)])
    student = collate(case.student, case.student_head)
    teacher = collate(case.teacher, case.teacher_head)
    constants = [student.input_embeds, teacher.input_embeds, teacher.target_embeds, teacher.hidden]
    constants += [teacher.head.weight, teacher.head.bias]
    constants = [tensor.detach().requires_grad_() for tensor in constants]
    student = replace(student, input_embeds=constants[0])
    teacher = ResponseStates(*constants[1:4], teacher.lengths, Head(*constants[4:]))
    total = dwakd_loss(student, teacher, case.projectors).total(LossConfig())
    assert torch.autograd.grad(total, constants, allow_unused=True) == (None,) * len(constants)


def test_target_and_projected_head_are_constants() -> None:
    """KD_student trains the student alone, CE_t2s the projectors alone."""
    case = make_case([(3, 4)])
    terms = evaluate(case)
    kd, t2s = gradients(case, terms.student_kd), gradients(case, terms.t2s_ce)
    trained_by_kd = {name for name, grad in kd.items() if grad.any()}
    trained_by_t2s = {name for name, grad in t2s.items() if grad.any()}
    assert trained_by_kd == {"head", "head.bias", "hidden.0"}
    assert trained_by_t2s == {"query.weight", "query.bias", "t2s.weight", "t2s.bias"}


# ---------------------------------------------------------------------------------------------
# Switches

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


def test_total_weighs_and_ramps() -> None:
    values = dict(zip(TERMS, torch.arange(1.0, 7.0), strict=True))
    terms = LossTerms(**values, **dict.fromkeys(FIGURES, torch.tensor(0)))
    loss = LossConfig(ce_weight=10, kd_weight=100, dtw_weight=1000)
    assert terms.total(loss) == 10 * 1 + 100 * (3 + 4 + 2) + 1000 * (5 + 6)
    assert terms.total(loss, kd_ramp=0.5) == 10 * 1 + 100 * (1.5 + 4 + 2) + 1000 * (5 + 6)


def test_total_leaves_weightless_terms_out_of_the_graph() -> None:
    leaves = {name: torch.tensor(1.0, requires_grad=True) for name in TERMS}
    terms = LossTerms(**leaves, **dict.fromkeys(FIGURES, torch.tensor(0)))
    loss = LossConfig(ce_weight=0, dtw_weight=0)
    grads = torch.autograd.grad(terms.total(loss, 0.0), list(leaves.values()), allow_unused=True)
    reached = {name for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    assert reached == {"t2s_ce", "teacher_kd"}


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


@pytest.mark.parametrize(
    "off", [("ce_weight",), ("kd_weight",), ("dtw_weight",), ("ce_weight",) * 2]
)
def test_every_parameter_gets_a_gradient_in_every_ablation(off: tuple[str, ...]) -> None:
    """Zeros, not None: DDP waits for parameters that backward does not reach."""
    case = make_case([(3, 4)])
    loss = LossConfig(**dict.fromkeys(off, 0.0))
    total = evaluate(case, loss).total(loss, kd_ramp=0.0)
    for leaf in case.leaves().values():
        leaf.retain_grad()
    total.backward()
    assert [name for name, leaf in case.leaves().items() if leaf.grad is None] == []


# ---------------------------------------------------------------------------------------------
# Divergences


def log_probs(seed: int, rows: int = 4, vocab: int = 11, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_divergences_are_0_at_equality_and_positive_elsewhere(name: str, scale: float) -> None:
    # All six are sums of KL divergences with non-negative weights, so none may go below 0; the
    # slack is rounding, some ulp of log-probabilities of up to 100.
    target, student = log_probs(0, rows=200, scale=scale), log_probs(1, rows=200, scale=scale)
    assert (DIVERGENCES[name](target, student) > 0).all()
    assert DIVERGENCES[name](target, target).abs().max() < 1e-13


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergences_by_their_definitions(name: str) -> None:
    target, student = log_probs(2), log_probs(3)
    expected = [
        reference_divergence(name, p.exp(), q.exp()) for p, q in zip(target, student, strict=True)
    ]
    assert_same(DIVERGENCES[name](target, student), torch.stack(expected), name, 1e-12)


def test_bounded_divergences_stay_within_their_bounds() -> None:
    apart = torch.tensor([[0.0, -1e4], [-1e4, 0.0]], dtype=torch.float64).log_softmax(-1)
    opposite = apart.flip(-1)
    for name in ("skewed_forward_kl", "skewed_reverse_kl"):
        assert_same(
            DIVERGENCES[name](apart, opposite), torch.full((2,), -math.log(SKEW)).double(), name
        )
    assert_same(DIVERGENCES["js"](apart, opposite), torch.full((2,), math.log(2)).double(), "js")


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"adaptive_kl"}))
def test_gradients_of_divergences(name: str) -> None:
    target = log_probs(4)
    logits = log_probs(5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: DIVERGENCES[name](target, z.log_softmax(-1)), (logits,)
    )


def test_gradient_of_adaptive_kl() -> None:
    """Its mixing weights are constants, so finite differences of its value would be wrong."""
    target = log_probs(6)
    student = log_probs(7).requires_grad_()
    forward, reverse = forward_kl(target, student), reverse_kl(target, student)
    value = adaptive_kl(target, student)
    share = ((value - reverse) / (forward - reverse)).detach()
    (expected,) = torch.autograd.grad((share * forward + (1 - share) * reverse).sum(), student)
    (actual,) = torch.autograd.grad(value.sum(), student)
    assert ((share > 0) & (share < 1)).all()
    assert_same(actual, expected, "adaptive_kl")


def test_adaptive_kl_follows_the_gap() -> None:
    """All of the difference in the head: forward KL; all of it in the tail: reverse KL."""
    target = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).double().log()
    head = torch.tensor([[0.3, 0.4, 0.2, 0.1]]).double().log()
    tail = torch.tensor([[0.4, 0.3, 0.1, 0.2]]).double().log()
    assert_same(adaptive_kl(target, head), forward_kl(target, head), "head")
    assert_same(adaptive_kl(target, tail), reverse_kl(target, tail), "tail")


# ---------------------------------------------------------------------------------------------
# Weights, band, scale


def test_weights_of_a_sample_sum_to_its_length() -> None:
    generator = torch.Generator().manual_seed(0)
    valid = valid_positions(torch.tensor([4, 1, 0]), 6)
    entropy, gate = torch.rand(2, 3, 6, generator=generator)
    for weighting in ("entropy_gate", "entropy", "none"):
        weights = student_token_weights(entropy, gate, valid, weighting)
        torch.testing.assert_close(weights.sum(-1), torch.tensor([4.0, 1.0, 0.0]))
        assert (weights[~valid] == 0).all()
    for weighting in ("confidence", "none"):
        weights = teacher_token_weights(entropy, 10, valid, weighting)
        torch.testing.assert_close(weights.sum(-1), torch.tensor([4.0, 1.0, 0.0]))


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1.0, 1e38])
def test_weights_normalise_at_any_scale(scale: float) -> None:
    valid = valid_positions(torch.tensor([3]), 4)
    weights = normalise_per_sample(torch.full((1, 4), scale), valid)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))


def test_band_by_hand() -> None:
    """Attention to the diagonal alone, entropy 0: the band is |j − i| ≤ b."""
    config = SoftDTWConfig(band_width=1.0, band_penalty=2.5)
    attention = torch.zeros(1, 5, 6)
    attention[0, :4, :4] = torch.eye(4)
    lengths = torch.tensor([4])
    inside = attention_band(attention, lengths, lengths, config)
    near = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1
    assert torch.equal(inside[0, :4, :4], near)
    assert not inside[0, 4:].any() and not inside[0, :, 4:].any()
    assert torch.equal(
        band_penalty(inside, config, torch.float64)[0, :4, :4], 2.5 * (~near).double()
    )


def test_attention_rows_sum_to_1_and_padding_is_0() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 5, 4, generator=generator)
    valid_s = valid_positions(torch.tensor([5, 2, 0]), 5)
    valid_t = valid_positions(torch.tensor([3, 5, 0]), 5)
    A, B = cross_model_attention(query, key, valid_s, valid_t)
    torch.testing.assert_close(A.sum(-1), valid_s.float())
    torch.testing.assert_close(B.sum(-1), valid_t.float())
    outside = ~(valid_s[:, :, None] & valid_t[:, None, :])
    assert (A[outside] == 0).all() and (B.transpose(1, 2)[outside] == 0).all()
    uniform, _ = cross_model_attention(torch.zeros_like(query), key, valid_s, valid_t)
    expected = torch.tensor([[math.log(3)] * 5, [math.log(5)] * 2 + [0.0] * 3, [0.0] * 5])
    torch.testing.assert_close(attention_entropy(uniform), expected)


def test_scale_is_of_the_sample_and_survives_degenerate_states() -> None:
    generator = torch.Generator().manual_seed(0)
    states = 1e3 + torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    states[1:3] = torch.tensor([0.0, 7.0]).double()[:, None, None]
    lengths = torch.tensor([2, 3, 3, 0])
    scaled = standardise_scale(states, valid_positions(lengths, 3))
    assert_same(scaled[0, :2], states[0, :2] / states[0, :2].std(), "scaled")
    assert torch.equal(scaled[1:3], states[1:3])  # no spread: left as they are
    assert not scaled[0, 2:].any() and not scaled[3].any()
    number = torch.tensor([[[3.0]]])
    assert torch.equal(standardise_scale(number, torch.tensor([[True]])), number)


# ---------------------------------------------------------------------------------------------
# Chunks and memory


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_no_logits_beyond_a_chunk(divergence: str) -> None:
    vocab, chunk = 2000, 4
    case = make_case([(30, 32), (28, 20)], width=(3, 3), vocab=(vocab, vocab), dtype=torch.float32)
    loss = LossConfig(divergence=divergence, chunk_size=chunk)
    with LargestTensor() as largest:
        total = evaluate(case, loss).total(loss)
        gradients(case, total)
    assert largest.numel == chunk * vocab  # 58 tokens · 2000 rows would be 116000


def test_no_logits_are_kept_for_backward() -> None:
    """What is saved in forward and still alive after it: states, attention and costs, no logits."""
    vocab, chunk = 2000, 4
    case = make_case([(30, 32)], width=(3, 3), vocab=(vocab, vocab), dtype=torch.float32)
    for kd_weight in (0.0, 0.5):
        saved: list[weakref.ref[Tensor]] = []

        def pack(tensor: Tensor, saved: list[weakref.ref[Tensor]] = saved) -> Tensor:
            saved.append(weakref.ref(tensor))
            return tensor

        loss = LossConfig(chunk_size=chunk, kd_weight=kd_weight)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            terms = evaluate(case, loss)
        alive = [tensor.numel() for ref in saved if (tensor := ref()) is not None]
        assert 0 < max(alive) < chunk * vocab
        del terms


def test_no_logits_beyond_a_chunk_without_a_teacher() -> None:
    vocab, chunk = 2000, 4
    case = make_case([(30, 2)], width=(3, 3), vocab=(vocab, 5), dtype=torch.float32)
    loss = LossConfig(chunk_size=chunk, kd_weight=0, dtw_weight=0)
    with LargestTensor() as largest:
        gradients(case, evaluate(case, loss).total(loss))
    assert largest.numel == chunk * vocab


def test_auto_chunks() -> None:
    cpu = torch.device("cpu")
    assert 1 <= tokens_per_chunk("auto", 151936, cpu) <= AUTO_CHUNK_TOKENS
    assert tokens_per_chunk("auto", 1000, cpu) == AUTO_CHUNK_ELEMENTS["cpu"] // 1000
    assert tokens_per_chunk("auto", 2**40, cpu) == 1
    assert tokens_per_chunk(7, 151936, cpu) == 7


class NoWaiting(TorchDispatchMode):
    """Fails on operations whose result the host must wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = ("aten.nonzero.default", "aten._local_scalar_dense.default", "aten.item.default")
        assert str(func) not in waits, func
        return func(*args, **(kwargs or {}))


def test_the_loss_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the collator's indices given. (numba's kernel is left out: it runs on the host.)"""
    case = make_case([(5, 7), (3, 2), (4, 0)])
    expected = evaluate(case).total(LossConfig())
    student, teacher = (
        replace(states, index=valid_positions(states.lengths, size).flatten().nonzero()[:, 0])
        for states, size in (
            (collate(case.student, case.student_head), 5),
            (collate(case.teacher, case.teacher_head), 7),
        )
    )
    torch_only = partial(sequence_level.soft_dtw_distance, backend="torch")
    monkeypatch.setattr(sequence_level, "soft_dtw_distance", torch_only)
    # Lengths are checked where they lie on the CPU, and only there.
    checks = "dwakd_plugin.loss.soft_dtw._checked_lengths"
    monkeypatch.setattr(checks, lambda name, lengths, cost, dim: lengths)
    with NoWaiting():
        terms = dwakd_loss(student, teacher, case.projectors, soft_dtw=NARROW)
        total = terms.total(LossConfig())
        total.backward()
    torch.testing.assert_close(total, expected)


def test_zero_tokens_pass_as_one_empty_chunk() -> None:
    states = torch.zeros(0, 3, requires_grad=True)
    (values,) = map_token_chunks(lambda x: (x.sum(-1),), 4, states)
    assert values.shape == (0,) and values.requires_grad


# ---------------------------------------------------------------------------------------------
# Edges


def assert_finite(case: Case, terms: LossTerms, loss: LossConfig) -> None:
    for name in TERMS + FIGURES:
        assert getattr(terms, name).isfinite(), name
    for name, grad in gradients(case, terms.total(loss)).items():
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_extreme_logits_stay_finite(divergence: str) -> None:
    case = make_case([(4, 5), (2, 3)], dtype=torch.float32)
    with torch.no_grad():
        for head in (case.student_head, case.teacher_head):
            head.weight.mul_(1e4 / head.weight.abs().sum(-1).min())
    logits = case.student_head.logits(case.student[0].hidden)
    assert logits.abs().max() > 1e4
    loss = LossConfig(divergence=divergence)
    assert_finite(case, evaluate(case, loss), loss)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 4), (4, 1)])
def test_one_token(lengths: tuple[int, int]) -> None:
    case = make_case([lengths], width=(1, 1))
    loss = LossConfig()
    assert_finite(case, evaluate(case, loss), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors(dtype: torch.dtype) -> None:
    case = make_case([(3, 4)], dtype=dtype)
    with torch.no_grad():
        for sample in (*case.student, *case.teacher):
            for states in (sample.input_embeds, sample.target_embeds, sample.hidden):
                states.zero_()
        for parameter in case.projectors.parameters():
            parameter.zero_()
    loss = LossConfig()
    assert_finite(case, evaluate(case, loss), loss)


def test_a_zero_vector_costs_1_and_takes_no_gradient() -> None:
    """It has no direction, and dividing by a tiny norm instead would blow its gradient up."""
    case = make_case([(1, 1), (3, 4)])
    with torch.no_grad():
        for sample in case.student:
            sample.hidden.zero_()
    terms = evaluate(single(case, 0), soft_dtw=SoftDTWConfig(band=False))
    assert_same(terms.hidden_dtw, torch.tensor(1 - 0.5 * (1 + 0)).double(), "one cell")
    grads = gradients(case, evaluate(case).hidden_dtw)
    assert not grads["hidden.0"].any() and not grads["hidden.1"].any()


@pytest.mark.parametrize("pad", [(0, 0), (3, 2)])
@pytest.mark.parametrize("off", [(), ("ce_weight",), ("kd_weight",), ("kd_weight", "ce_weight")])
def test_a_batch_without_labels_is_0_with_a_graph(
    pad: tuple[int, int], off: tuple[str, ...]
) -> None:
    case = make_case([(0, 4), (0, 0)])
    loss = LossConfig(**dict.fromkeys(off, 0.0))
    terms = evaluate(case, loss, pad=pad, fill=math.nan)
    total = terms.total(loss)
    assert total == 0 and all(getattr(terms, name) == 0 for name in TERMS + FIGURES)
    total.backward()
    for name, leaf in case.leaves().items():
        assert leaf.grad is not None and not leaf.grad.any(), name


@pytest.mark.parametrize("pad", [(0, 0), (1, 2)])
def test_a_sample_without_a_teacher_side_contributes_its_cross_entropy(
    pad: tuple[int, int],
) -> None:
    case = make_case([(3, 0)])
    loss = LossConfig()
    terms = evaluate(case, loss, pad=pad, fill=math.nan)
    ce_only = LossConfig(kd_weight=0, dtw_weight=0)
    expected = evaluate(case, ce_only, pad=pad)
    assert terms.ce > 0 and torch.equal(terms.ce, expected.ce)
    assert all(getattr(terms, name) == 0 for name in TERMS if name != "ce")
    assert (terms.student_tokens, terms.distilled_tokens, terms.teacher_tokens) == (3, 0, 0)
    ours, theirs = gradients(case, terms.total(loss)), gradients(case, expected.total(ce_only))
    for name in ours:
        assert_same(ours[name], theirs[name], name)


def test_figures_count_what_they_say() -> None:
    case = make_case([(3, 4), (2, 0), (0, 5), (4, 2)])
    terms = evaluate(case)
    assert (terms.student_tokens, terms.teacher_tokens, terms.distilled_tokens) == (9, 6, 7)
    assert terms.band_cells == 3 * 4 + 4 * 2
    assert 0 < terms.band_cells_inside < terms.band_cells
    assert 0 < terms.gate < 7 and 0 <= terms.t2s_correct <= 7
    assert 0 < terms.attention_entropy < 7 * math.log(4)
    figures = set(FIGURES) - {"uld"}  # a term, which is 0 here
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


def test_student_labels_are_required() -> None:
    case = make_case([(3, 4)])
    student = replace(collate(case.student, case.student_head), labels=None)
    with pytest.raises(ValueError, match=r"student\.labels is None"):
        dwakd_loss(student, collate(case.teacher, case.teacher_head), case.projectors)


def test_bfloat16_states_with_float32_projectors() -> None:
    case = make_case([(6, 5), (2, 4)], dtype=torch.bfloat16, bias=False)
    case.projectors.float()
    loss = LossConfig()
    terms = evaluate(case, loss)
    assert {getattr(terms, name).dtype for name in TERMS} == {torch.float32}
    assert_finite(case, terms, loss)
    wide = make_case([(6, 5), (2, 4)], dtype=torch.bfloat16, bias=False)

    def widened(sample: Sample) -> Sample:
        return Sample(
            *(getattr(sample, f.name).double() for f in fields(Sample)[:3]), sample.labels
        )

    wide = Case(
        [widened(sample) for sample in wide.student],
        [widened(sample) for sample in wide.teacher],
        replace(wide.student_head, weight=wide.student_head.weight.double()),
        replace(wide.teacher_head, weight=wide.teacher_head.weight.double()),
        wide.projectors.double(),
    )
    expected = evaluate(wide, loss)
    for name in TERMS:
        # The same bfloat16 numbers in float64. What differs is the heads' product: logits of up
        # to 16 in steps of 2⁻⁴, on terms that sum 8 tokens; the DTW terms never see a head.
        tolerance = 1e-5 if "dtw" in name else 2e-2
        ours, theirs = getattr(terms, name).double(), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def test_autocast_leaves_alignment_in_float32() -> None:
    case = make_case([(6, 5)], dtype=torch.float32)
    plain = evaluate(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = evaluate(case)
    for name in ("hidden_dtw", "embed_dtw", "attention_entropy", "band_cells_inside"):
        assert torch.equal(getattr(terms, name), getattr(plain, name)), name
    assert terms.ce != plain.ce  # the head's product, as the model itself would compute it
    torch.testing.assert_close(terms.ce, plain.ce, rtol=2e-2, atol=0)


def test_head_applies_scale_then_softcap() -> None:
    hidden = torch.tensor([[2.0, -1.0]])
    head = Head(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([1.0, 0.0]), 0.5, softcap=2.0)
    expected = torch.tensor([[2 * math.tanh(3.5 / 2), 2 * math.tanh(-2 / 2)]])
    torch.testing.assert_close(head.logits(hidden), expected)
    low = Head(head.weight.bfloat16()).logits(hidden)
    assert low.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    case = make_case([(6, 5), (2, 4), (3, 0)])
    loss = LossConfig()

    def moved(states: ResponseStates) -> ResponseStates:
        tensors = {
            f.name: value.detach().cuda()
            for f in fields(states)
            if isinstance(value := getattr(states, f.name), Tensor)
        }
        head = replace(
            states.head,
            weight=states.head.weight.detach().cuda(),
            bias=states.head.bias.detach().cuda(),
        )
        return replace(states, **tensors, head=head)

    sides = (collate(case.student, case.student_head), collate(case.teacher, case.teacher_head))
    on_cpu = dwakd_loss(*sides, case.projectors, loss=loss)
    on_gpu = dwakd_loss(*map(moved, sides), case.projectors.cuda(), loss=loss)
    for name in TERMS + FIGURES:
        assert_same(getattr(on_gpu, name).cpu(), getattr(on_cpu, name), name)
