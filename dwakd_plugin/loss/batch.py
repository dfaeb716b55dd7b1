"""One call of the loss: both sides, the projectors and the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dwakd_plugin.loss.alignment import valid_positions
from dwakd_plugin.loss.head_pass import tokens_per_chunk
from dwakd_plugin.loss.products import in_full_precision
from dwakd_plugin.loss.states import Head, ProjectorSet, ResponseStates
from dwakd_plugin.loss.threads import compiles_for
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig


@dataclass(frozen=True)
class Side:
    """One model's states in the loss's dtype, zero at padding, of the samples with both sides.

    The padding is zeroed once, so that what it holds reaches no sum, forward or backward.
    """

    states: ResponseStates
    lengths: Tensor  # (B,)
    dtype: torch.dtype

    @cached_property
    def valid(self) -> Tensor:
        """(B, L) bool."""
        return valid_positions(self.lengths, self.states.hidden.shape[1])

    @cached_property
    def input_embeds(self) -> Tensor:
        """(B, L, d), as the other two."""
        return self._clean(self.states.input_embeds)

    @cached_property
    def target_embeds(self) -> Tensor:
        return self._clean(self.states.target_embeds)

    @cached_property
    def hidden(self) -> Tensor:
        return self._clean(self.states.hidden)

    def _clean(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).where(self.valid[..., None], 0.0)

    @property
    def last(self) -> Tensor:
        """The last position of each sample, as (B, L) bool."""
        return self.valid & (self.valid.cumsum(1) == self.lengths[:, None])


@dataclass(frozen=True)
class Batch:
    """What `dwakd_loss` was given, and what follows from it at once.

    The teacher is a constant, and has no position in any sample where there is none.
    """

    student: ResponseStates
    teacher: ResponseStates
    projectors: ProjectorSet | None
    loss: LossConfig
    soft_dtw: SoftDTWConfig
    gamma: float
    product: torch.dtype | None  # of the heads' products under autocast; None: the weights' own

    @cached_property
    def dtype(self) -> torch.dtype:
        """float32 at least (D3)."""
        dtype = torch.promote_types(self.student.hidden.dtype, self.teacher.hidden.dtype)
        return torch.promote_types(dtype, torch.float32)

    @cached_property
    def compiled(self) -> bool:
        """Whether the kernels for a CPU take it: then what the host reads is no wait either."""
        return compiles_for(self.student.hidden)

    @cached_property
    def paired(self) -> Tensor:
        """Samples with both sides: (B,) bool. Two-sided terms know no others."""
        return (self.student.lengths > 0) & (self.teacher.lengths > 0)

    @property
    def spells(self) -> bool:
        """Whether the teacher says of tokens that are several of its own what each of these is: of
        its likeliest tokens alone it doesn't."""
        return self.teacher.spellings is not None and self.teacher.top is None

    @cached_property
    def student_side(self) -> Side:
        return Side(self.student, self.student.lengths * self.paired, self.dtype)

    @cached_property
    def teacher_side(self) -> Side:
        return Side(self.teacher, self.teacher.lengths * self.paired, self.dtype)

    def chunk(self, *heads: Head) -> int:
        """How many tokens go through these heads at once."""
        return min(
            tokens_per_chunk(self.loss.chunk_size, head.weight.shape[0], head.weight.device)
            for head in heads
        )

    def project(self, name: str, states: Tensor) -> Tensor:
        """Apply a projector in its own dtype and come back to the dtype of the states.

        In full precision, as costs are formed of what it gives (backward is the process's choice).
        """
        projector: Callable[[Tensor], Tensor] = getattr(self.projectors, name)
        parameter = next(_parameters(projector), states)
        with in_full_precision():
            return projector(states.to(parameter.dtype)).to(states.dtype)

    def zero(self) -> Tensor:
        """0 whose backward gives zeros to all that trains here and that no term may reach.

        Without it an ablation, or a batch without labels, leaves gradients None; DDP then waits
        for them, and optimizers skip what other ranks step. Empty slices: padding may hold NaN.
        Projectors are called, as a sharded one has its parameters only while it is.
        """
        student, teacher = self.student, self.teacher
        trained = [student.hidden, student.target_embeds]
        if self.projectors is not None:
            read = student.hidden[:0].detach().repeat(1, 1, 2)  # a term may read no embeddings
            trained += [
                self.project("query", read),
                self.project("t2s", teacher.hidden[:0]),
                self.project("s2t", student.hidden[:0].detach()),
                self.project("embed_t2s", teacher.target_embeds[:0]),
            ]
        if self.loss.ce_weight == 0:  # a zero of the head's size: only where no cross-entropy
            trained.append(student.head.weight)  # reaches it anyway
            if student.head.bias is not None:
                trained.append(student.head.bias)
        return torch.stack([tensor[:0].sum().float() for tensor in trained]).sum().to(self.dtype)


def no_teacher(student: ResponseStates) -> ResponseStates:
    """The side of a teacher that is not there: no position in any sample."""
    nothing = student.hidden.new_zeros(student.hidden.shape[0], 0, 0)
    head = Head(student.hidden.new_zeros(0, 0))
    return ResponseStates(nothing, nothing, nothing, torch.zeros_like(student.lengths), head)


def _parameters(projector: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    return projector.parameters() if isinstance(projector, nn.Module) else iter(())
