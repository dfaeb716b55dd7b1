"""How soft-DTW's matrices lie in a GPU's memory, and how many steps a kernel takes one by one.

A matrix is cut into strips of as many rows as there are lanes, one for a matrix of up to 1,024
rows. In a strip, lane l works on column t − l at step t. A strip is stored skewed, (steps, lanes),
so that what the lanes read and write at one step are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

WARP, MOST_LANES = 32, 1024

# Of all matrices of a launch, skewed. Up to there the weights of the softmin are kept too, which is
# three times as much: half of what the chunks of the heads take afterwards on a card of 24 GB.
ELEMENTS_AT_ONCE = 2**25


def lanes_for(rows: int) -> int:
    """One lane a row, as a power of two from a warp's 32 to a block's 1,024."""
    return max(WARP, min(MOST_LANES, 1 << (rows - 1).bit_length()))


@dataclass(frozen=True)
class Skewed:
    """A batch of matrices (samples, rows, columns), in strips of at most `lanes` rows."""

    samples: int
    rows: int
    columns: int
    lanes: int

    @property
    def width(self) -> int:
        return min(self.rows, self.lanes)

    @property
    def strips(self) -> int:
        return -(-self.rows // self.width)

    @property
    def steps(self) -> int:
        return self.columns + self.width - 1

    @property
    def strip_elements(self) -> int:
        return self.steps * self.width

    @property
    def elements(self) -> int:
        return self.samples * self.strips * self.strip_elements

    def skew(self, matrix: Tensor, flat: Tensor) -> None:
        """matrix (samples, rows, columns) into flat (elements,); anything where no cell lies."""
        padding = (0, self.width, 0, self.strips * self.width - self.rows)
        wide = pad(matrix, padding).view(self.samples, self.strips, -1)
        skewed = wide[..., : self.strip_elements].reshape(
            self.samples, self.strips, self.width, self.steps
        )
        flat.view(self.samples, self.strips, self.steps, self.width).copy_(skewed.mT)

    def unskew(self, flat: Tensor) -> Tensor:
        """The inverse, as a tensor of its own."""
        skewed = flat.view(self.samples, self.strips, self.steps, self.width).mT
        wide = pad(skewed.flatten(2), (0, self.width))
        wide = wide.view(self.samples, self.strips * self.width, self.steps + 1)
        return wide[:, : self.rows, : self.columns].contiguous()


def together(shapes: Sequence[tuple[int, int, int]]) -> list[list[int]]:
    """Which batches of matrices (samples, rows, columns), by number, go through one launch."""
    launches: list[list[int]] = []
    taken = ELEMENTS_AT_ONCE
    for number, shape in enumerate(shapes):
        elements = Skewed(*shape, MOST_LANES).elements
        if taken + elements > ELEMENTS_AT_ONCE:
            launches.append([])
            taken = 0
        launches[-1].append(number)
        taken += elements
    return launches


def serial_steps(rows: int, columns: int, samples: int = 1) -> int:
    """Steps, each waiting for the one before, of a matrix's value and gradient.

    Down all strips for the value, and up again for the gradient; where the weights could not be
    kept, down each strip once more before that.
    """
    skewed = Skewed(samples, rows, columns, lanes_for(rows))
    passes = 2 if skewed.elements <= ELEMENTS_AT_ONCE else 3
    return passes * steps_of_a_pass(rows, columns, skewed.lanes)


def steps_of_a_pass(rows: int, columns: int, lanes: int) -> int:
    strips = -(-rows // lanes)
    return strips * (columns - 1) + rows
