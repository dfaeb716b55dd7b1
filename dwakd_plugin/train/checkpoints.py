"""The projectors in a run's checkpoints, beside the student, and what saving and loading need."""

from __future__ import annotations

from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes
from dwakd_plugin.models.projectors import PROJECTOR_FILE, load_projectors, save_projectors
from dwakd_plugin.train.distillation import Distillation
from dwakd_plugin.train.sharding import gathered
from dwakd_plugin.train.signals import end_run

# What to do where the disk is full when all is trained.
AT_THE_END = "Free some space, and resume: the last checkpoint has all that was trained."


def write_projectors(distillation: Distillation, folder: Path, *, first_rank: bool) -> None:
    """Writes the projectors below `folder`. All ranks must take part, and the first writes."""
    if distillation.projectors is None:
        return
    tensors = gathered(distillation.projectors)
    if first_rank:
        save_projectors(tensors, folder / PROJECTOR_FILE, distillation.pair)


def resume_projectors(distillation: Distillation, checkpoint: Path) -> None:
    """Takes the projectors of a checkpoint. Raises UserError where they cannot be read."""
    if distillation.projectors is not None:
        file = checkpoint / PROJECTOR_FILE
        load_projectors(distillation.projectors, file, distillation.pair)


def check_optimizer(checkpoint: Path) -> None:
    """Raises UserError where a checkpoint lacks the optimizer's state, which would start over."""
    names = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")  # engines have others
    if not any(next(checkpoint.glob(name), None) for name in names):
        raise UserError(
            f"{checkpoint} cannot be resumed: it holds no optimizer state (`save_only_model: true` "
            "wrote it), so the optimizer would start over in the middle of its schedule. To train "
            f"on from its student, begin a new run with `base_model: {checkpoint}` (of a LoRA, "
            "`lora_model_dir`) and another output_dir."
        )


def explain_a_failing_save(student: Any) -> None:
    """Has axolotl's saving of the student end with a message where the disk is full."""
    save = student.save_pretrained

    @wraps(save)
    def explaining(folder: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with explaining_writes(Path(folder), AT_THE_END):
                return save(folder, *args, **kwargs)
        except UserError as error:
            end_run(str(error))

    student.save_pretrained = explaining


def prepare_loading(device: torch.device, optimizer: torch.optim.Optimizer | None) -> None:
    """What a checkpoint's optimizer cannot be loaded without."""
    if device.type == "cpu" and device.index is not None:
        _have_torch_load_to_numbered_cpus()
    for group in () if optimizer is None else optimizer.param_groups:
        # axolotl 0.21 reads it of every group, and its own Muon calls it `wd`.
        group.setdefault("weight_decay", group.get("wd", 0.0))


@cache  # torch refuses a second one
def _have_torch_load_to_numbered_cpus() -> None:
    """accelerate numbers the CPUs of several processes, and `torch.load` knows only `cpu`."""
    torch.serialization.register_package(
        99,
        lambda storage: None,
        lambda storage, place: storage if place.startswith("cpu:") else None,
    )
