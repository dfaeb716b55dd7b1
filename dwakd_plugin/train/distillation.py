"""What a run distils with, and the projectors' place among what trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dwakd_plugin.data.row_report import RowReport
from dwakd_plugin.models.projectors import HeadFollower, Projectors
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.recipe.schema import DWAKDConfig

PROJECTORS = "dwakd_projectors"  # the submodule's name on the student


@dataclass(frozen=True)
class Distillation:
    """What a run distils with; no teacher and no projectors where no term asks for them."""

    config: DWAKDConfig
    teacher: Teacher | None
    projectors: Projectors | None
    rows: RowReport
    pair: dict[str, str]  # which two models the projectors belong to
    head_follower: HeadFollower | None = None  # where `s2t` follows a head that trains


def give_their_rate(
    optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float
) -> None:
    """Moves the projectors' parameters into parameter groups of their own."""
    projectors = {
        id(parameter) for name, parameter in model.named_parameters() if f"{PROJECTORS}." in name
    }
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in projectors]
        if not mine:
            continue
        group["params"] = [
            parameter for parameter in group["params"] if id(parameter) not in projectors
        ]
        optimizer.add_param_group({**group, "params": mine, "lr": learning_rate})
    # DeepSpeed cannot flatten a group of none.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
