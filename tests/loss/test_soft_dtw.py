"""Soft-DTW: three backends against an enumeration of paths, a plain recursion and each other."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dwakd_plugin.loss.soft_dtw as package
from dwakd_plugin.loss.soft_dtw import Backend, soft_dtw
from dwakd_plugin.loss.soft_dtw.layout import (
    MOST_LANES,
    WARP,
    Skewed,
    lanes_for,
    serial_steps,
    steps_of_a_pass,
    together,
)

CPU: list[Backend] = ["torch", "numba"]
GAMMAS = [0.01, 0.1, 1.0, 2.0]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def with_gradient(
    cost: Tensor, n: list[int], m: list[int], gamma: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Values (B,) and their own gradients (B, S, T)."""
    leaf = cost.clone().requires_grad_()
    values = soft_dtw(leaf, lengths(n, cost), lengths(m, cost), gamma, backend=backend)
    values.sum().backward()
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def lengths(of: list[int], cost: Tensor) -> Tensor:
    return torch.tensor(of, device=cost.device)


def random_cost(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Uniform in [0, 2), the range of 1 − cos; the same numbers for both dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(shape, generator=generator)).to(dtype)


# ---- oracles: neither a recursion in vectors nor one on exp(−R/γ)


def paths(n: int, m: int) -> Iterator[list[tuple[int, int]]]:
    """Every monotone path from (0, 0) to (n − 1, m − 1)."""
    if n < 1 or m < 1:
        return
    if (n, m) == (1, 1):
        yield [(0, 0)]
    for before in ((n - 1, m - 1), (n - 1, m), (n, m - 1)):
        for path in paths(*before):
            yield [*path, (n - 1, m - 1)]


def enumerated(cost: Tensor, gamma: float) -> tuple[float, Tensor]:
    """Value and expected alignment (n, m) from all paths."""
    all_paths = list(paths(*cost.shape))
    energies = torch.stack([sum(cost[cell] for cell in path) for path in all_paths])  # type: ignore[misc]
    chance = torch.softmax(-energies / gamma, 0)
    expected = torch.zeros_like(cost)
    for path, p in zip(all_paths, chance, strict=True):
        for cell in path:
            expected[cell] += p
    return -gamma * float(torch.logsumexp(-energies / gamma, 0)), expected


def recursive(cost: Tensor, gamma: float) -> float:
    """The recursion as it is printed, cell by cell."""
    n, m = cost.shape
    r = [[math.inf] * (m + 1) for _ in range(n + 1)]
    r[0][0] = 0.0
    for i in range(n):
        for j in range(m):
            before = r[i][j], r[i][j + 1], r[i + 1][j]
            low = min(before)
            total = sum(math.exp((low - x) / gamma) for x in before)
            r[i + 1][j + 1] = float(cost[i, j]) + low - gamma * math.log(total)
    return r[n][m]


# ---- values and gradients


@pytest.mark.parametrize("gamma", [0.05, 1.0])
@pytest.mark.parametrize("n, m", [(1, 1), (1, 4), (4, 1), (2, 2), (3, 5), (5, 4)])
@pytest.mark.parametrize("backend", CPU)
def test_equals_the_sum_over_all_paths(backend: Backend, n: int, m: int, gamma: float) -> None:
    cost = random_cost(1, n, m)
    value, gradient = with_gradient(cost, [n], [m], gamma, backend)
    expected_value, expected_gradient = enumerated(cost[0], gamma)
    # float64 rounding over at most 8 steps
    assert float(value) == pytest.approx(expected_value, rel=1e-13, abs=1e-13)
    torch.testing.assert_close(gradient[0], expected_gradient, rtol=0, atol=1e-13)


# Strips have 32 rows: one less, one more, several; S ≫ T, T ≫ S
SIZES = [(1, 1), (1, 90), (90, 1), (31, 33), (33, 31), (32, 64), (65, 40), (200, 3), (3, 200)]


@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("backend", CPU)
def test_equals_the_printed_recursion(backend: Backend, n: int, m: int) -> None:
    cost = random_cost(1, n, m)
    for gamma in (0.01, 1.0):
        value = soft_dtw(cost, torch.tensor([n]), torch.tensor([m]), gamma, backend=backend)
        assert float(value) == pytest.approx(recursive(cost[0], gamma), rel=1e-12)


@pytest.mark.parametrize("backend", CPU)
def test_gradcheck(backend: Backend) -> None:
    cost = random_cost(3, 34, 3).requires_grad_()
    n, m = torch.tensor([34, 3, 0]), torch.tensor([3, 2, 2])
    # gradcheck also calls backward repeatedly on one graph, with one gradient per output.
    assert torch.autograd.gradcheck(lambda c: soft_dtw(c, n, m, 0.7, backend=backend), (cost,))


# float32: a gradient is a product of up to n + m weights, each with a few roundings of 6e-8, and
# the errors of the two sides of a cell do not cancel; 3e-6 is what the kernel promises for hundreds
# of steps. float64: the same in units of 1e-16, and the oracle's log-space has R/γ · 1e-16 of its
# own. Values: their last bits.
TOLERANCES = [(torch.float32, 3e-7, 3e-6), (torch.float64, 1e-13, 1e-10)]


@pytest.mark.parametrize("dtype, value_rtol, gradient_atol", TOLERANCES)
@pytest.mark.parametrize("gamma", [0.001, *GAMMAS])
def test_numba_equals_torch(
    gamma: float, dtype: torch.dtype, value_rtol: float, gradient_atol: float
) -> None:
    cost = random_cost(5, 150, 170, dtype=dtype)
    n, m = [150, 149, 64, 7, 33], [170, 80, 169, 150, 2]
    value, gradient = with_gradient(cost, n, m, gamma, "numba")
    exact_value, exact_gradient = with_gradient(cost.double(), n, m, gamma, "torch")
    assert value.dtype == gradient.dtype == dtype
    torch.testing.assert_close(value.double(), exact_value, rtol=value_rtol, atol=1e-6 * gamma)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=gradient_atol)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70),
    m=st.integers(1, 70),
    gamma=st.sampled_from(GAMMAS),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_gradient_is_a_distribution_over_paths(
    n: int, m: int, gamma: float, shift: float, seed: int
) -> None:
    """Also for negative costs."""
    cost = random_cost(1, n, m, seed=seed) + shift
    value, gradient = with_gradient(cost, [n], [m], gamma, "numba")
    expected = gradient[0]
    assert expected.min() >= -1e-12 and expected.max() <= 1 + 1e-12
    torch.testing.assert_close(expected[[0, -1], [0, -1]], torch.ones(2).double())
    # A path meets every row and every column, and steps max(n, m) .. n + m − 1 times.
    assert expected.sum(0).min() >= 1 - 1e-9 and expected.sum(1).min() >= 1 - 1e-9
    assert max(n, m) - 1e-9 <= expected.sum() <= n + m - 1 + 1e-9
    # The value is the mean cost of a path minus γ times the entropy: never above the mean.
    assert float(value) <= float((expected * cost[0]).sum()) + 1e-9
    # Exchanging the two sides exchanges rows and columns.
    turned, turned_gradient = with_gradient(cost.mT.contiguous(), [m], [n], gamma, "numba")
    torch.testing.assert_close(turned, value)
    torch.testing.assert_close(turned_gradient.mT, gradient, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(60, 140),
    m=st.integers(60, 140),
    gamma=st.sampled_from(GAMMAS),
    free=st.floats(0, 1),
    barred=st.floats(0, 0.3),
    seed=st.integers(0, 2**31),
)
def test_costs_of_all_sizes_side_by_side(
    n: int, m: int, gamma: float, free: float, barred: float, seed: int
) -> None:
    """Cells for nothing, where sums grow fastest, beside dear and barred ones."""
    generator = torch.Generator().manual_seed(seed)
    chance, size = torch.rand(2, 1, n, m, generator=generator)
    cost = 10 ** (6 * size - 4)  # up to 100, which is 10,000 γ
    cost[chance < free] = 0.0
    cost[chance > 1 - barred] = math.inf
    value, gradient = with_gradient(cost, [n], [m], gamma, "numba")
    exact_value, exact_gradient = with_gradient(cost.double(), [n], [m], gamma, "torch")
    torch.testing.assert_close(value.double(), exact_value, rtol=3e-7, atol=1e-6 * gamma)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_costs_beyond_all_bounds(dtype: torch.dtype) -> None:
    """numba bars a cell by a cost above 7e14 γ, and takes what is as far below 0 for −∞."""
    cost = random_cost(4, 40, 45, dtype=dtype)
    cost[0, 17] = 1e30
    cost[1, 17, 3] = 1e30
    cost[2, 17, 3] = -1e30
    cost[3] *= -1e6  # far, but not that far
    value, gradient = with_gradient(cost, [40] * 4, [45] * 4, 0.1, "numba")
    exact_value, exact_gradient = with_gradient(cost.double(), [40] * 4, [45] * 4, 0.1, "torch")
    assert value[0] == math.inf and (gradient[0] == 0).all()
    assert value[2].isnan() and gradient[2].isnan().all()
    torch.testing.assert_close(value[1::2].double(), exact_value[1::2], rtol=3e-7, atol=0)
    torch.testing.assert_close(gradient[1::2].double(), exact_gradient[1::2], rtol=0, atol=3e-6)


# ---- padding and batches


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, -1e30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", CPU)
def test_padding_changes_nothing(backend: Backend, dtype: torch.dtype, garbage: float) -> None:
    n, m = [40, 33, 2, 0, 5], [50, 7, 45, 9, 0]
    clean = random_cost(5, 40, 50, dtype=dtype)
    filled = torch.full((5, 47, 61), garbage, dtype=dtype)
    for b in range(5):
        filled[b, : n[b], : m[b]] = clean[b, : n[b], : m[b]]
    value, gradient = with_gradient(clean, n, m, 0.3, backend)
    padded_value, padded_gradient = with_gradient(filled, n, m, 0.3, backend)
    assert torch.equal(value, padded_value)
    assert torch.equal(gradient, padded_gradient[:, :40, :50])
    for b in range(5):
        assert (padded_gradient[b, n[b] :] == 0).all()
        assert (padded_gradient[b, :, m[b] :] == 0).all()


@pytest.mark.parametrize("backend", CPU)
def test_a_sample_does_not_depend_on_its_batch(backend: Backend) -> None:
    n, m = [40, 33, 2, 64], [50, 7, 45, 64]
    cost = random_cost(4, 64, 64, dtype=torch.float32)
    value, gradient = with_gradient(cost, n, m, 0.5, backend)
    order = [2, 0, 3, 1]
    shuffled, shuffled_gradient = with_gradient(
        cost[order], [n[b] for b in order], [m[b] for b in order], 0.5, backend
    )
    assert torch.equal(shuffled, value[order])
    assert torch.equal(shuffled_gradient, gradient[order])
    for b in range(4):
        alone, alone_gradient = with_gradient(cost[b : b + 1], [n[b]], [m[b]], 0.5, backend)
        assert torch.equal(alone, value[b : b + 1])
        assert torch.equal(alone_gradient, gradient[b : b + 1])


# ---- extremes


@pytest.mark.parametrize("gamma", [0.001, 1.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", CPU)
def test_nothing_over_or_underflows(
    backend: Backend, dtype: torch.dtype, scale: float, gamma: float
) -> None:
    """exp(−cost/γ) goes down to 10^(−8 million), and the value of a path to 10^(−10^9)."""
    cost = scale * random_cost(2, 90, 140, dtype=dtype) / 2
    value, gradient = with_gradient(cost, [90, 40], [140, 140], gamma, backend)
    exact = [recursive(cost[0], gamma), recursive(cost[1, :40], gamma)]
    # Relative to the two terms of the value, the cost of a path and γ times its entropy
    atol = (1e-7 if dtype == torch.float32 else 1e-14) * 200 * gamma
    torch.testing.assert_close(value.double(), torch.tensor(exact).double(), rtol=3e-7, atol=atol)
    assert gradient.isfinite().all()
    assert gradient[[0, 1], [89, 39], [139, 139]] == pytest.approx([1.0, 1.0])
    # What numba and the oracle both lose at costs of 10^7 γ: R/γ · 1e-16 in a weight, per step
    _, oracle = with_gradient(cost.double(), [90, 40], [140, 140], gamma, "torch")
    torch.testing.assert_close(gradient.double(), oracle, rtol=0, atol=3e-5)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_nan_in_nan_out(backend: Backend, bad: float) -> None:
    for i, j in [(0, 0), (39, 49), (20, 0), (0, 49), (33, 17)]:
        cost = random_cost(3, 45, 50, dtype=torch.float32)
        cost[1, i, j] = bad
        value, gradient = with_gradient(cost, [45, 40, 45], [50, 50, 50], 0.2, backend)
        assert value.isnan().tolist() == [False, True, False]
        assert gradient[1, :40].isnan().all() and (gradient[1, 40:] == 0).all()
        assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", CPU)
def test_infinite_costs_bar_a_cell(backend: Backend, dtype: torch.dtype) -> None:
    cost = random_cost(3, 40, 45, dtype=dtype)
    off_band = (torch.arange(40)[:, None] - torch.arange(45)).abs() > 6
    cost[0, off_band] = math.inf
    cost[1, 17] = math.inf  # a row: no path is left
    cost[2, 0, 0] = math.inf
    value, gradient = with_gradient(cost, [40] * 3, [45] * 3, 0.3, backend)
    assert value.isinf().tolist() == [False, True, True]
    assert (gradient[1:] == 0).all() and (gradient[0, off_band] == 0).all()
    # A cost that no path can afford is as good.
    high = torch.where(off_band, 1e4, cost[:1])
    near, near_gradient = with_gradient(high, [40], [45], 0.3, backend)
    torch.testing.assert_close(near, value[:1])
    torch.testing.assert_close(near_gradient, gradient[:1], rtol=0, atol=3e-6)


@pytest.mark.parametrize("backend", CPU)
def test_empty_samples_and_batches(backend: Backend) -> None:
    value, gradient = with_gradient(random_cost(3, 4, 5), [0, 4, 0], [5, 0, 0], 1.0, backend)
    assert value.tolist() == [0, 0, 0] and (gradient == 0).all()
    for shape in [(0, 4, 5), (2, 0, 5), (2, 4, 0), (2, 0, 0)]:
        none = [0] * shape[0]
        cost = torch.zeros(shape, requires_grad=True)
        values = soft_dtw(cost, lengths(none, cost).long(), lengths(none, cost).long(), 1.0)
        values.sum().backward()  # there is a graph
        assert values.tolist() == none and cost.grad is not None


# ---- autograd


@pytest.mark.parametrize("backend", CPU)
def test_gradient_is_scaled_and_can_be_taken_twice(backend: Backend) -> None:
    cost = random_cost(2, 35, 20, dtype=torch.float32)
    before = cost.clone()
    leaf = cost.requires_grad_()
    n, m = torch.tensor([35, 20]), torch.tensor([20, 20])
    values = soft_dtw(leaf, n, m, 0.4, backend=backend)
    (once,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
    weights = torch.tensor([-2.0, 0.25])
    (scaled,) = torch.autograd.grad(values @ weights, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(values.sum(), leaf)
    assert torch.equal(once, again)
    # Scaling by powers of two is exact, but for subnormal numbers.
    torch.testing.assert_close(scaled, weights[:, None, None] * once, rtol=0, atol=1e-37)
    assert torch.equal(cost, before)


@pytest.mark.parametrize("backend", CPU)
def test_strided_costs(backend: Backend) -> None:
    cost = random_cost(20, 3, 35).permute(1, 2, 0)
    value, gradient = with_gradient(cost, [35, 8, 1], [20, 20, 3], 0.4, backend)
    dense, dense_gradient = with_gradient(cost.contiguous(), [35, 8, 1], [20, 20, 3], 0.4, backend)
    assert torch.equal(value, dense) and torch.equal(gradient, dense_gradient)


@pytest.mark.parametrize("backend", CPU)
def test_values_without_a_graph(backend: Backend) -> None:
    cost = random_cost(1, 35, 20)
    value = soft_dtw(cost, torch.tensor([35]), torch.tensor([20]), 0.4, backend=backend)
    assert not value.requires_grad
    assert torch.equal(value, with_gradient(cost, [35], [20], 0.4, backend)[0])


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert package._backend("auto", "cpu").__name__.endswith(".cpu")
    assert package._backend("auto", "mps").__name__.endswith(".wavefront")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert package._backend("auto", "cpu").__name__.endswith(".wavefront")
    assert package._backend("auto", "cuda").__name__.endswith(".wavefront")


def test_errors_say_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cost, two = torch.zeros(1, 2, 2), torch.tensor([2])
    with pytest.raises(ValueError, match=r"shape \(B, S, T\), got \(2, 2\)"):
        soft_dtw(cost[0], two, two, 1.0)
    with pytest.raises(TypeError, match=r"bfloat16; use cost.float\(\)"):
        soft_dtw(cost.bfloat16(), two, two, 1.0)
    for gamma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"gamma .* got {gamma}"):
            soft_dtw(cost, two, two, gamma)
    with pytest.raises(ValueError, match=r"student_lengths .* \(1,\), got \(2,\)"):
        soft_dtw(cost, torch.tensor([2, 2]), two, 1.0)
    with pytest.raises(TypeError, match=r"teacher_lengths .*float32"):
        soft_dtw(cost, two, two.float(), 1.0)
    with pytest.raises(ValueError, match=r"teacher_lengths must lie in 0..2, got \[3\]"):
        soft_dtw(cost, two, two + 1, 1.0)
    with pytest.raises(ValueError, match="'cuda'"):
        soft_dtw(cost, two, two, 1.0, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a CPU tensor, got one on meta"):
        soft_dtw(cost.to("meta"), two, two, 1.0, backend="numba")
    with pytest.raises(ValueError, match="needs a CUDA tensor, got one on cpu"):
        soft_dtw(cost, two, two, 1.0, backend="triton")


# ---- triton

# In a process of its own, as triton asks for its interpreter on import. 33 rows are two strips.
INTERPRETED = """
import math, sys
import torch
from dwakd_plugin.loss.soft_dtw import soft_dtw

assert "numba" not in sys.modules, "numba is to be imported on first use"
# Tolerances as for numba; values also have the last bit of a float32 logarithm, times γ.
for dtype, value_atol, gradient_atol in (
    (torch.float32, 1e-6, 3e-6), (torch.float64, 1e-13, 1e-10)
):
    cost = 2 * torch.rand(5, 33, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    cost[2, 1, 1] = math.nan
    cost[3, 0, 0] = math.inf
    cost[0, :3, 5] = math.inf
    cost[0, 4, 4] = 1e4
    cost[1, 3:] = math.nan
    n, m = torch.tensor([33, 3, 2, 2, 0]), torch.tensor([6, 5, 4, 2, 3])
    results = []
    for backend in ("triton", "torch"):
        leaf = cost.clone().requires_grad_()
        values = soft_dtw(leaf, n, m, 0.05, backend=backend)
        (values * torch.arange(1, 6)).sum().backward()
        results.append((values.detach(), leaf.grad))
    (value, gradient), (exact, exact_gradient) = results
    torch.testing.assert_close(value, exact, rtol=3e-7, atol=value_atol, equal_nan=True)
    torch.testing.assert_close(gradient, exact_gradient, rtol=0, atol=gradient_atol, equal_nan=True)
    assert value.isnan().tolist() == [False, False, True, False, False]
"""


@needs_triton
def test_triton_under_its_interpreter_equals_torch() -> None:
    interpreted(INTERPRETED)


# Several costs in one launch, of which some are symmetric, with exponents of 32 bits; with strips
# and, where memory is short, with weights that are found again.
TOGETHER = """
import sys
import torch
from dwakd_plugin.loss.soft_dtw import expected_alignments, gpu, layout

def check(sizes):
    generator = torch.Generator().manual_seed(1)
    jobs = [
        (2 * torch.rand(len(n), max(n), max(m), generator=generator), n, m) for n, m in sizes
    ]
    costs = [cost for cost, _, _ in jobs]
    lengths = [tuple(map(torch.tensor, each[1:])) for each in jobs]
    ours = expected_alignments(costs, lengths, 0.3, largest=2.0, backend="triton")
    doubles = [cost.double() for cost in costs]
    exact = expected_alignments(doubles, lengths, 0.3, backend="numba")
    for (value, path), (exact_value, exact_path) in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), exact_value, rtol=3e-7, atol=1e-6)
        torch.testing.assert_close(path.double(), exact_path, rtol=0, atol=3e-6)

if sys.argv[1] == "short":
    check([([3, 2], [4, 1]), ([3, 2], [3, 2]), ([4, 1], [4, 1])])
    gpu.lanes_for = lambda rows: 32
    check([([34, 5], [3, 2])])
    gpu.ELEMENTS_AT_ONCE = 10
    check([([34], [3])])
else:
    for size in (1, 31, 32, 33, 512, 513, 1024, 1500):
        check([([size, 2], [3, 2])])
    check([([2, 1], [600, 33])])
"""


def interpreted(script: str, *arguments: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_triton
def test_triton_takes_several_costs_at_once() -> None:
    interpreted(TOGETHER, "short")


@pytest.mark.slow
@needs_triton
def test_triton_at_the_ends_of_warps_blocks_and_strips() -> None:
    interpreted(TOGETHER, "long")


def registers(cubin: bytes, file: Path) -> tuple[int, int]:
    """Registers a thread has, and bytes that it spills."""
    import triton

    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run(
        [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    count, stack, local = map(int, found.groups())
    return count, stack + local


@needs_triton
@pytest.mark.parametrize(
    "capability, real, exponent, lanes, kept",
    [
        *((capability, "fp32", "i32", MOST_LANES, True) for capability in (80, 90, 100, 120)),
        (80, "fp32", "i64", MOST_LANES, False),
        (90, "fp32", "i32", WARP, True),
        (90, "fp64", "i64", MOST_LANES // 2, False),
    ],
)
def test_triton_compiles_without_a_gpu(
    capability: int, real: str, exponent: str, lanes: int, kept: bool, tmp_path: Path
) -> None:
    """Within the registers that so many threads can have, and with none spilt."""
    from triton import compile as compile_
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dwakd_plugin.loss.soft_dtw.kernel import soft_dtw_kernel as kernel

    settings = {"LANES": lanes, "PATH": True, "KEPT": kept}
    signature = dict.fromkeys(kernel.arg_names, f"*{real}")
    signature |= dict.fromkeys(("table", "n", "m"), "*i64") | {"edges_e": f"*{exponent}"}
    signature |= dict.fromkeys(("high", "middle", "low"), "fp32")
    signature |= dict.fromkeys(settings, "constexpr")
    compiled = compile_(
        ASTSource(kernel, signature, constexprs=settings),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": lanes // WARP},
    )
    count, spilt = registers(compiled.asm["cubin"], tmp_path / "kernel.cubin")
    assert count <= min(255, 65536 // lanes) and spilt == 0


def test_serial_steps() -> None:
    """Against a kernel of one warp a matrix that goes down, down again and up."""
    for size, times in (((512, 600), 10), ((4096, 4096), 14)):
        assert times * serial_steps(*size) <= 3 * steps_of_a_pass(*size, WARP)
    # One strip of 5 rows, and strips of 32, 32 and 6: each row begins a step after the one above.
    assert steps_of_a_pass(5, 7, 32) == 7 + 4
    assert steps_of_a_pass(70, 7, 32) == (7 + 31) + (7 + 31) + (7 + 5)
    assert [lanes_for(rows) for rows in (1, 32, 33, 512, 513, 1500)] == [
        *(32, 32, 64, 512, 1024, 1024)
    ]


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 3), (32, 9), (33, 40), (64, 64), (100, 7)])
def test_what_is_skewed_comes_back(rows: int, columns: int, lanes: int) -> None:
    place, cost = Skewed(2, rows, columns, lanes), random_cost(2, rows, columns)
    flat = torch.empty(place.elements, dtype=cost.dtype)
    place.skew(cost, flat)
    assert torch.equal(place.unskew(flat), cost)
    skewed = flat.view(2, place.strips, place.steps, place.width)
    row = rows - 1
    strip, lane = divmod(row, place.width)
    assert torch.equal(skewed[:, strip, lane : lane + columns, lane], cost[:, row])


def test_what_fits_goes_together() -> None:
    assert together([(8, 512, 600), (8, 512, 512), (8, 600, 600)] * 2) == [[0, 1, 2, 3, 4, 5]]
    assert together([(2, 4096, 4096)] * 2) == [[0], [1]]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("dtype, value_rtol, gradient_atol", TOLERANCES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_triton_equals_torch_on_the_device(
    gamma: float, dtype: torch.dtype, value_rtol: float, gradient_atol: float
) -> None:
    cost = random_cost(5, 150, 1100, dtype=dtype).cuda()
    n, m = [150, 149, 64, 0, 33], [1100, 80, 1099, 150, 2]
    value, gradient = with_gradient(cost, n, m, gamma, "triton")
    exact_value, exact_gradient = with_gradient(cost.double(), n, m, gamma, "torch")
    # The device's approximate exp2 and log2 have an error of two last bits each.
    looser = 4 if dtype == torch.float32 else 1
    torch.testing.assert_close(
        value.double(), exact_value, rtol=looser * value_rtol, atol=1e-6 * gamma
    )
    torch.testing.assert_close(
        gradient.double(), exact_gradient, rtol=0, atol=looser * gradient_atol
    )
