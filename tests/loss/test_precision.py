"""bfloat16, autocast, CUDA: the same loss as in float64 on the CPU, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dwakd_plugin.loss import Head, ResponseStates, dwakd_loss
from dwakd_plugin.loss.products import product
from dwakd_plugin.recipe.schema import VARIANTS, LossConfig
from tests.loss.cases import (
    FIGURES,
    TERMS,
    Case,
    Sample,
    assert_finite,
    assert_same,
    collate,
    evaluate,
    make_case,
)


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


class Products(TorchDispatchMode):
    """Collects how float32 products were to be computed, and the largest dimension of each."""

    NAMES = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[bool, str, str]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ in self.NAMES:
            largest = max(size for each in args if isinstance(each, Tensor) for size in each.shape)
            backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            self.seen.add((largest >= VOCABULARY, *(each.fp32_precision for each in backends)))
        return func(*args, **(kwargs or {}))


VOCABULARY, SCALE = 1000, 1024.0


@pytest.fixture
def rounding_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")  # as `tf32: true` does, and on a CPU too
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="before torch 2.9")
@pytest.mark.parametrize("matching", ["attention", "exact"])
def test_rounded_products_are_the_models_own(rounding_products: None, matching: str) -> None:
    """Scores, costs and alignments stay in float32 where the process rounds products (D3)."""
    case = make_case([(6, 5), (2, 4)], vocab=(VOCABULARY, VOCABULARY), dtype=torch.float32)
    student = collate(case.student, case.student_head)
    teacher = collate(case.teacher, case.teacher_head)
    if matching == "exact":
        pairs = torch.tensor([0, 1, 6])
        student = replace(student, pairs=pairs)
        teacher = replace(teacher, pairs=pairs, token_map=torch.arange(VOCABULARY))
    loss = LossConfig.model_validate({"matching": matching})
    with Products() as forward:
        total = dwakd_loss(student, teacher, case.projectors, loss=loss).total(loss)
    assert forward.seen == {(True, "tf32", "bf16"), (False, "ieee", "ieee")}
    with Products() as backward:
        torch.autograd.grad(total, [*case.leaves().values()], allow_unused=True)
    assert (False, "tf32", "bf16") in backward.seen  # the projectors, as the process has it
    assert torch.get_float32_matmul_precision() == "medium"  # as it was


def test_products_in_full_precision_have_the_gradients_of_products() -> None:
    a, b = (torch.randn(2, *s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4, 5)))
    assert torch.equal(product(a, b), a @ b)
    assert torch.autograd.gradcheck(product, (a, b))
    (alone,) = torch.autograd.grad(product(a, b.detach()).sum(), a)
    assert torch.equal(alone, torch.autograd.grad((a @ b).sum(), a)[0])


def test_float16_with_a_scaled_loss_has_the_gradients_of_float32() -> None:
    """Two steps as `fp16: true` takes them: autocast, and a loss of SCALE times its size."""
    for name in ("paper", "mapped"):
        loss = LossConfig.model_validate(VARIANTS[name].get("loss", {}))
        case = make_case([(6, 5), (2, 4)], dtype=torch.float32)
        pairs = torch.tensor([0, 1, 6])
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        optimizer = torch.optim.SGD([*case.leaves().values()], lr=1e-3)
        for _ in range(2):
            grads = []
            for half in (False, True):
                student = collate(case.student, case.student_head)
                teacher = collate(case.teacher, case.teacher_head)
                student = replace(student, pairs=pairs)
                teacher = replace(teacher, pairs=pairs, token_map=torch.arange(17) % 13)
                with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                    terms = dwakd_loss(student, teacher, case.projectors, loss=loss)
                optimizer.zero_grad()
                total = terms.total(loss) / 8
                if half:
                    scaler.scale(total).backward()
                    scaler.unscale_(optimizer)
                else:
                    total.backward()
                grads.append([leaf.grad.clone() for leaf in optimizer.param_groups[0]["params"]])
            for ours, theirs in zip(*reversed(grads), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.005)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == SCALE  # no step was skipped


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
