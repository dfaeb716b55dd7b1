"""One process of several: runs recipes through axolotl, one after the other, on the CPU.

    torchrun --nproc_per_node 2 -m tests.train.ranks JOBS.json

JOBS.json is a list of `Job`s as mappings. What a job saw is written to `OUTPUT_DIR/rank-N.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml


@dataclass
class Job:
    """A recipe to train; `checkpoint`, a folder that its output begins with, to resume from;
    `unlabelled`, source rows that lose their labels before they are collated."""

    recipe: dict[str, Any]
    checkpoint: str | None = None
    unlabelled: list[int] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)  # per micro-batch


def main(jobs: Path) -> None:
    import axolotl.train

    from dwakd_plugin.train.trainer import DWAKDTrainer

    # One process group serves all jobs.
    torch.distributed.init_process_group("gloo")
    axolotl.train.cleanup_distributed = lambda: None
    for spec in json.loads(jobs.read_text()):
        job = Job(**spec)
        if job.checkpoint is not None:
            if os.environ["RANK"] == "0":
                folder = Path(job.checkpoint)
                shutil.copytree(folder, Path(job.recipe["output_dir"]) / folder.name)
            torch.distributed.barrier()
        with without_labels(job.unlabelled), watched(DWAKDTrainer, job):
            train(job.recipe)
        file = Path(job.recipe["output_dir"]) / f"rank-{os.environ['RANK']}.json"
        file.write_text(json.dumps(job.seen))
    torch.distributed.destroy_process_group()


def sums_of_one_rank(rank: int, port: int, folder: str) -> None:
    """As a log line adds up: the second of two ranks has no batch, and then neither has."""
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    from dwakd_plugin.loss import LossTerms, every_sum
    from dwakd_plugin.recipe.schema import LossConfig
    from dwakd_plugin.train.metrics import Sums
    from dwakd_plugin.train.parts import Part

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=60))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
    sums = Sums()
    if rank == 0:
        for _ in range(2):
            terms = LossTerms(**{name: torch.tensor(1.5) for name in every_sum()})
            sums.add([Part("", 1.0, True, LossConfig(), terms)])
    found = [sums.over_ranks(accelerator), Sums().over_ranks(accelerator)]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def train(recipe: dict[str, Any]) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.integrations.base import PluginManager

    environment = dict(os.environ)
    file = Path(recipe["output_dir"]).with_suffix(f".{os.environ['RANK']}.yml")
    file.write_text(yaml.safe_dump(recipe))
    PluginManager.get_instance().plugins.clear()
    try:
        engines = {"fsdp_config": "MULTI_GPU", "deepspeed": "DEEPSPEED"}
        engine = next((engines[key] for key in engines if recipe.get(key)), "")
        with cpus_as_accelerators(engine):
            do_train(load_cfg(str(file)), TrainerCliArgs())
    finally:
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def cpus_as_accelerators(engine: str) -> Iterator[None]:
    """While open, accelerate takes CPUs for GPUs, if an engine is named: it offers FSDP and
    DeepSpeed there alone, without a need to."""
    import axolotl.utils.distributed
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    initialise, build_mesh = PartialState.__init__, ParallelismConfig.build_device_mesh
    backend = PartialState._prepare_backend

    def initialise_as_gpu(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        if engine == "MULTI_GPU" and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    if engine == "DEEPSPEED":
        import deepspeed.ops

        # Its own sums in shared memory would be compiled first, for minutes; gloo adds up as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    AcceleratorState._reset_state(reset_partial_state=True)
    axolotl.utils.distributed.distributed_state = None
    PartialState.__init__ = initialise_as_gpu
    ParallelismConfig.build_device_mesh = lambda self, kind: build_mesh(self, "cpu")
    try:
        yield
    finally:
        PartialState.__init__, ParallelismConfig.build_device_mesh = initialise, build_mesh
        PartialState._prepare_backend = backend


@contextmanager
def without_labels(source_rows: list[int]) -> Iterator[None]:
    """While open, collated batches have no labels in these rows of the data."""
    from dwakd_plugin.data.collator import DualCollator

    collate = DualCollator.__call__

    def collate_without(self: Any, features: Any, return_tensors: Any = None) -> Any:
        features = [dict(feature) for feature in features]
        for feature in features:
            if feature["source_row"] in source_rows:
                feature["labels"] = [-100] * len(feature["labels"])
        return collate(self, features, return_tensors)

    DualCollator.__call__ = collate_without  # type: ignore[method-assign]
    try:
        yield
    finally:
        DualCollator.__call__ = collate  # type: ignore[method-assign]


@contextmanager
def watched(trainer: Any, job: Job) -> Iterator[None]:
    """While open, notes of each micro-batch N, its own label count and its padded length."""
    step: Callable[..., Any] = trainer.training_step

    def noted(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        job.seen.append(
            {
                "n": int(num_items_in_batch),
                "labels": int((inputs["labels"][:, 1:] != -100).sum()),
                "length": inputs["labels"].shape[1],
                "rows": inputs["source_row"].tolist(),
            }
        )
        return step(self, model, inputs, num_items_in_batch)

    trainer.training_step = noted
    try:
        yield
    finally:
        trainer.training_step = step


if __name__ == "__main__":
    main(Path(sys.argv[1]))
