"""Sums by token: the same as adding one after another, and in an order that nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dwakd_plugin.loss import ContinuationTable
from dwakd_plugin.loss.terms.mapped import mapped_statistics
from dwakd_plugin.loss.token_order import RUN, token_order


def some_map(rows: int, size: int, seed: int = 0) -> Tensor:
    """Some tokens are none's, most are few tokens', one is that of a third of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(-1, rows, (size,), generator=generator)
    found[torch.rand(size, generator=generator) < 1 / 3] = rows // 2
    return found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize(
    "token_map",
    [some_map(7, 11 * RUN), some_map(40, 60), torch.arange(5), torch.full((9,), -1)],
    ids=["many", "few", "each its own", "none"],
)
def test_sums_are_those_of_one_addition_after_another(
    token_map: Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    values = torch.rand(3, len(token_map), dtype=torch.float64)
    rows = max(int(token_map.max()), 0) + 2
    expected = torch.zeros(rows + 1, 3, dtype=torch.float64)
    expected.index_add_(0, torch.where(token_map < 0, rows, token_map), values.T)
    found = token_order(token_map).sums(values.to(dtype), rows)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected[:rows], rtol=tolerance, atol=0)


def test_a_map_is_sorted_once_and_forgotten_with_it() -> None:
    token_map = some_map(7, 50)
    assert token_order(token_map) is token_order(token_map)
    other = token_map.clone()
    assert token_order(other) is not token_order(token_map)


class NoRace(TorchDispatchMode):
    """Fails where two values are added to one place: on a GPU, in whichever order they come."""

    def __init__(self, spare: int) -> None:
        super().__init__()
        self.spare, self.scattered = spare, 0  # a row that nobody reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert not name.startswith(("index_add", "index_reduce", "bincount", "histc")), func
        assert not (name.startswith("index_put") and len(args) > 3 and args[3]), func
        if name.startswith("scatter"):
            self.scattered += 1
            for column in args[2].T.tolist():
                places = [place for place in column if place != self.spare]
                assert len(places) == len(set(places)), func
        return func(*args, **(kwargs or {}))


def test_no_two_probabilities_are_added_to_one_place() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(12, size, generator=generator) for size in (9, 300))
    counts = torch.tensor([0, 40, 1, 7])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    tokens = torch.randint(300, (48,), generator=generator), torch.randint(3, (48,))
    table = ContinuationTable(starts, *tokens)
    read = torch.arange(12) % 4
    token_map = some_map(9, 300)
    assert token_order(token_map) and table.in_order[1] > 2
    with NoRace(spare=9) as race:
        found = mapped_statistics(
            student, teacher, torch.zeros(12).long(), read, token_map, table, "js", 1.0
        )
    assert race.scattered == 1 and found.divergence.isfinite().all()
    with pytest.raises(AssertionError), NoRace(spare=9):
        torch.zeros(9).index_add_(0, torch.tensor([1, 1]), torch.ones(2))
