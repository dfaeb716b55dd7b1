"""What a run distils with, its schedules, and the projectors' place on the student."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dwakd_plugin.data.row_report import RowReport
from dwakd_plugin.models.causal_lm import causal_lm
from dwakd_plugin.models.projectors import HeadFollower, Projectors
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train.own_answers import OwnAnswers

PROJECTORS = "dwakd_projectors"  # the submodule's name on the student


@dataclass(frozen=True)
class Facts:
    """What the start of a run says of how its distillation was put together."""

    teacher_vocabulary: int  # tokens, as are the next two
    student_vocabulary: int
    shared_tokens: int
    processes: str
    initialisation: str = "none"  # of the projectors
    # Of the teachers beside the first: their tokens, and those that the student has too.
    further: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Distillation:
    """What a run distils with; no teacher and no projectors where no term asks for them."""

    config: DWAKDConfig
    rows: RowReport
    facts: Facts
    teacher: Teacher | None = None
    projectors: Projectors | None = None
    # Which two models the projectors belong to.
    pair: dict[str, str] = field(default_factory=dict)
    head_follower: HeadFollower | None = None  # where `s2t` follows a head that trains
    own_answers: OwnAnswers | None = None
    further: tuple[Teacher, ...] = ()  # the teachers beside the first

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """All of them, in the recipe's order."""
        return () if self.teacher is None else (self.teacher, *self.further)

    def gamma(self, step: int, steps: int) -> float:
        """γ after `step` of `steps` optimizer steps: linear from the first to the last (D8)."""
        config, progress = self.config.soft_dtw, min(1.0, step / max(1, steps - 1))
        return config.gamma_start + (config.gamma_end - config.gamma_start) * progress

    def kd_ramp(self, step: int) -> float:
        """The weight of the student-space term after `step` steps, while it ramps up (D6)."""
        steps = self.config.loss.kd_warmup_steps
        return 1.0 if steps == 0 else min(1.0, step / steps)


def attach(projectors: Projectors | None, student: Any) -> None:
    """Makes the projectors a submodule of the student, which is saved without them."""
    setattr(student, PROJECTORS, projectors)
    if projectors is not None:
        lm = causal_lm(student)
        lm._keys_to_ignore_on_save = {
            *(lm._keys_to_ignore_on_save or ()),
            *(f"{PROJECTORS}.{name}" for name in projectors.state_dict()),
        }
