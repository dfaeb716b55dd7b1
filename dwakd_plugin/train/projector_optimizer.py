"""The projectors' own learning rate, and their own AdamW where the student's doesn't suit them.

Muon and its like choose what they do with a parameter by its shape and name, for the layers of a
decoder: a projector's weight would be orthogonalised, and its bias left as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from axolotl.core.trainers.mixins.optimizer import is_optimizer_factory
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from dwakd_plugin.models.projectors import Projectors


def chooses_by_parameter(trainer: Any) -> bool:
    """Whether the student's optimizer treats parameters by their shapes and names."""
    chosen = trainer.optimizer_cls_and_kwargs
    return chosen is not None and is_optimizer_factory(chosen[0])


@contextlib.contextmanager
def left_out(projectors: Projectors) -> Iterator[None]:
    """While open, the projectors look frozen to who collects parameters to train."""
    trained = [each for each in projectors.parameters() if each.requires_grad]
    for each in trained:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in trained:
            each.requires_grad_(True)


def adamw(projectors: Projectors, args: Any, learning_rate: float) -> torch.optim.AdamW:
    """AdamW for the projectors that train: weights decay as the run says, biases don't."""
    trained = [each for each in projectors.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in trained if each.dim() > 1]},
        {"params": [each for each in trained if each.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


class TwoOptimizers(torch.optim.Optimizer):
    """The student's optimizer and the projectors' as one, for schedulers, accelerate, checkpoints.

    The parameter groups are those of the two, the student's first.
    """

    def __init__(self, student: torch.optim.Optimizer, projectors: torch.optim.Optimizer) -> None:
        self.parts = (student, projectors)
        groups = [*student.param_groups, *projectors.param_groups]
        super().__init__(groups, student.defaults)
        self._share()

    def _share(self) -> None:
        """Has the parts' groups and states be this optimizer's."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.parts[0].step(closure)
        self.parts[1].step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        self.state.clear()
        for part in self.parts:
            self.state.update(part.state)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        first = len(self.parts[0].param_groups)
        groups = state_dict["param_groups"]
        for part, own in zip(self.parts, (groups[:first], groups[first:]), strict=True):
            keys = [key for group in own for key in group["params"]]
            state = {key: state_dict["state"][key] for key in keys if key in state_dict["state"]}
            part.load_state_dict({"state": state, "param_groups": own})
        self._share()


def give_their_rate(
    optimizer: torch.optim.Optimizer, projectors: nn.Module, learning_rate: float
) -> None:
    """Moves the projectors' parameters into parameter groups of their own.

    What an optimizer has made of the student's rate (AdamC's `max_lr`) is scaled with it. Groups
    that were made before there were projectors (Q-GaLore's) hold none of them: they are added.
    """
    own = {id(each): each for each in projectors.parameters() if each.requires_grad}
    for group in list(optimizer.param_groups):
        mine = [own.pop(id(each)) for each in group["params"] if id(each) in own]
        if not mine:
            continue
        theirs = set(map(id, mine))
        group["params"] = [each for each in group["params"] if id(each) not in theirs]
        new = {**group, "params": mine, "lr": learning_rate}
        if group.get("max_lr"):
            new["max_lr"] = group["max_lr"] * learning_rate / group["lr"]
        optimizer.add_param_group(new)
    if own:
        optimizer.add_param_group({"params": list(own.values()), "lr": learning_rate})
    # DeepSpeed cannot flatten a group of none.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def schedule_their_rate(scheduler: Any, projectors: nn.Module, learning_rate: float) -> None:
    """Has the one-cycle schedule, which has one peak for all, peak at the projectors' own rate.

    Other schedules multiply each group's rate.
    """
    scheduler = getattr(scheduler, "inner_schedule", scheduler)  # of jagged restarts
    if not isinstance(scheduler, OneCycleLR):
        return
    own = set(map(id, projectors.parameters()))
    for group in scheduler.optimizer.param_groups:
        if any(id(parameter) in own for parameter in group["params"]):
            share = learning_rate / group["max_lr"]
            for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                group[key] *= share
    scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
