"""Two processes give what one gives: DDP and FSDP2, on the CPU over gloo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import every_sum
from dwakd_plugin.loss.variants import VARIANTS
from dwakd_plugin.models.teacher.loaded import load_teacher
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.checks import check_recipe
from dwakd_plugin.recipe.schema import TeacherConfig
from dwakd_plugin.train.preflight import check_variant
from dwakd_plugin.train.trainer import DWAKDTrainer
from tests.conftest import ROOT, ROWS
from tests.runs import wait_for
from tests.train.ranks import Job, sums_of_one_rank, watched, without_labels

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]

PROJECTORS = Path("dwakd") / "projectors.safetensors"
FSDP = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
    },
}


ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
ZERO3 = {"stage3_gather_16bit_weights_on_model_save": True}


# axolotl 0.21 asks a CUDA build of torch whether two cards reach one another, also where none is.
no_two_processes = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="axolotl starts several processes of a CUDA build only where there is a card",
)


def run_ranks(folder: Path, jobs: list[Job], ranks: int = 2, **environment: str) -> None:
    file = folder / "jobs.json"
    file.write_text(json.dumps([asdict(job) for job in jobs]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, f"--nproc_per_node={ranks}", "-m", "tests.train.ranks", str(file)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
        check=True,
        timeout=280,
    )


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors") | load_file(out / PROJECTORS)


def assert_close(found: Path, expected: Path, atol: float = 1e-5) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() >= theirs.keys()  # FSDP writes tied weights twice
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=atol, rtol=0, msg=name)


def seen(out: Path) -> list[list[dict[str, Any]]]:
    """What each rank noted of each micro-batch."""
    return [json.loads(file.read_text()) for file in sorted(out.glob("rank-*.json"))]


@pytest.mark.slow
@no_two_processes
def test_two_processes_train_as_one(recipe: Recipe, train: Train, tmp_path: Path) -> None:
    def settings(name: str, dwakd: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
        own = {"output_dir": str(tmp_path / name), "max_steps": 5, "save_steps": 3}
        return recipe(dwakd or {}, **own | others)

    def batches(micro_batch: int, accumulation: int) -> dict[str, int]:
        return {"micro_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}

    one = Job(settings("one", **batches(8, 1)))
    with watched(DWAKDTrainer, one):
        train(one.recipe)
    train(settings("one-by-one", **batches(1, 8)))
    assert_close(tmp_path / "one-by-one", tmp_path / "one")

    # In the first step the second rank has no label at all; the second step ends the epoch with one
    # micro-batch instead of three.
    uneven = {"max_steps": 2, "save_steps": 2}
    order = [row for step in one.seen for row in step["rows"]]
    unlabelled = [row for start in (5, 15, 25) for row in order[start : start + 5]]
    with without_labels(unlabelled):
        train(settings("one-uneven", **batches(10, 3) | uneven))

    cache = {"teacher": {"cache": str(tmp_path / "states")}}
    ddp, fsdp = batches(1, 4), batches(2, 2) | FSDP
    run_ranks(
        tmp_path,
        [
            Job(settings("ddp", **ddp)),
            Job(
                settings("ddp-resumed", **ddp, auto_resume_from_checkpoints=True),
                checkpoint=str(tmp_path / "ddp" / "checkpoint-3"),
            ),
            Job(settings("ddp-uneven", **batches(5, 3) | uneven), unlabelled=unlabelled),
            Job(settings("ddp-cached", cache, **batches(4, 1))),
            Job(settings("fsdp", **fsdp)),
            Job(
                settings("fsdp-resumed", **fsdp, auto_resume_from_checkpoints=True),
                checkpoint=str(tmp_path / "fsdp" / "checkpoint-3"),
            ),
            Job(settings("fsdp-uneven", **batches(5, 3) | uneven | FSDP), unlabelled=unlabelled),
        ],
    )
    for engine in ("ddp", "fsdp"):
        assert_close(tmp_path / engine, tmp_path / "one")
        assert_close(tmp_path / f"{engine}-resumed", tmp_path / engine, atol=0)
        assert_close(tmp_path / f"{engine}-uneven", tmp_path / "one-uneven")
        student = load_file(tmp_path / engine / "model.safetensors")
        assert not [name for name in student if "dwakd" in name]

        first, second = seen(tmp_path / f"{engine}-uneven")
        for start, end in ((0, 3), (3, 4)):
            steps = first[start:end] + second[start:end]
            assert {step["n"] for step in steps} == {sum(step["labels"] for step in steps)}
        assert sum(step["labels"] for step in second[:3]) == 0
        assert [step["length"] for step in first] != [step["length"] for step in second]
        rows = [row for step in first + second for row in step["rows"]]
        assert sorted(rows) == list(range(40))

    # One of the two filled the cache, and the other waited for it.
    assert_close(tmp_path / "ddp-cached", tmp_path / "one")
    assert len(list((tmp_path / "states").glob("states-*.safetensors"))) == 1
    index = [json.loads(line) for line in (tmp_path / "states" / "index.jsonl").open()]
    keys = [key for line in index[1:] for key in line["crc32"] if line["file"].startswith("states")]
    assert len(keys) == len(set(keys)) == len(ROWS)


@pytest.mark.slow
@no_two_processes
def test_two_processes_answer_as_one(recipe: Recipe, train: Train, tmp_path: Path) -> None:
    """The likeliest tokens, which all processes sample alike; every row, so that one may have no
    given answer, and its projectors no gradient of their own."""
    own = {"share": 1.0, "temperature": 0, "max_new_tokens": 2, "start_after": 0}

    def settings(name: str, micro_batch: int, accumulation: int, **others: Any) -> dict[str, Any]:
        sizes = {"micro_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        keys = {"output_dir": str(tmp_path / name), "max_steps": 3, "save_steps": 2}
        return recipe({"own_answers": own}, **keys, **sizes, **others)

    log = [line for line in train(settings("one", 8, 1)) if "loss" in line]
    ddp = settings("ddp", 1, 4)
    again = settings("ddp-resumed", 1, 4, auto_resume_from_checkpoints=True)
    checkpoint = str(tmp_path / "ddp" / "checkpoint-2")
    run_ranks(tmp_path, [Job(ddp), Job(again, checkpoint=checkpoint)])
    assert_close(tmp_path / "ddp", tmp_path / "one")
    assert_close(tmp_path / "ddp-resumed", tmp_path / "ddp", atol=0)
    state = json.loads((tmp_path / "ddp" / "checkpoint-3" / "trainer_state.json").read_text())
    for line, expected in zip(state["log_history"], log, strict=False):
        for name in ("own_length", "own_ended", "own_unaligned", "own_divergence"):
            assert line.get(name) == pytest.approx(expected.get(name), rel=1e-4), name


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@no_two_processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeed_trains_as_one_process_does(
    ranks: int, recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    """ZeRO-1, 2 and 3: the same student and projectors after five steps, also when resumed."""

    def settings(name: str, **others: Any) -> dict[str, Any]:
        own = {"output_dir": str(tmp_path / name), "max_steps": 5, "save_steps": 3}
        return recipe(
            {}, **own, micro_batch_size=4 // ranks, gradient_accumulation_steps=2, **others
        )

    train(settings("one") | {"micro_batch_size": 8, "gradient_accumulation_steps": 1})
    jobs = []
    for stage in (1, 2, 3):
        file = tmp_path / f"zero{stage}.json"
        file.write_text(json.dumps(ZERO | {"zero_optimization": {"stage": stage, **ZERO3}}))
        name, engine = f"zero{stage}", {"deepspeed": str(file)}
        jobs.append(Job(settings(name, **engine)))
        again = settings(f"{name}-resumed", **engine, auto_resume_from_checkpoints=True)
        jobs.append(Job(again, checkpoint=str(tmp_path / name / "checkpoint-3")))
    run_ranks(tmp_path, jobs, ranks, DS_ACCELERATOR="cpu")
    for stage in (1, 2, 3):
        assert_close(tmp_path / f"zero{stage}", tmp_path / "one")
        assert_close(tmp_path / f"zero{stage}-resumed", tmp_path / f"zero{stage}", atol=0)


@pytest.mark.slow
def test_a_rank_without_a_batch_of_an_evaluation_holds_nobody_up(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(sums_of_one_rank, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        sums, nothing = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sums == dict.fromkeys(every_sum(), 3.0)
        assert nothing == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_config": FSDP["fsdp_config"]}, "fsdp_version: 1 — "),
        (
            {"fsdp_version": 2, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}},
            "fsdp_config.auto_wrap_policy: SIZE_BASED_WRAP — ",
        ),
        ({"deepspeed": "no-such.json"}, "deepspeed: no-such.json — cannot be read"),
        (
            {"deepspeed": {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}},
            "its `optimizer` section",
        ),
        (
            {
                "deepspeed": {"zero_optimization": {"stage": 3}},
                "dwakd": {"projectors": {"warmup_steps": 3}},
            },
            "run `dwakd warmup RECIPE`",
        ),
    ],
)
def test_what_an_engine_cannot_do_is_refused_by_name(
    recipe: Recipe, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        check_recipe(ReadRecipe(recipe({}) | settings))
    assert message in str(refused.value)
    check_recipe(ReadRecipe(recipe({}, **FSDP)))
    check_recipe(ReadRecipe(recipe({}, deepspeed={"zero_optimization": {"stage": 3}})))


@pytest.mark.parametrize("matching", VARIANTS)
def test_a_map_that_follows_the_whole_student_needs_one(recipe: Recipe, matching: str) -> None:
    loss = {"matching": matching, "dtw_weight": 0}
    check_variant(ReadRecipe(recipe({"loss": loss})))
    for settings in (FSDP, {"deepspeed": {"zero_optimization": {"stage": 3}}}):
        sharded = ReadRecipe(recipe({"loss": loss}, **settings))
        if VARIANTS[matching].follows_head:
            with pytest.raises(UserError, match=f"matching: {matching} — its map between"):
                check_variant(sharded)
        else:
            check_variant(sharded)


def test_the_teacher_is_whole_where_the_student_is_not(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As axolotl leaves it for ZeRO-3, and accelerate for FSDP on a rank that loads no weights.
    for place in (transformers.modeling_utils, transformers.integrations.deepspeed):
        monkeypatch.setattr(place, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    config = TeacherConfig.model_validate({"base_model": str(lab / "teacher")})
    head = load_teacher(config, "cpu").head.weight
    assert torch.equal(head, load_file(lab / "teacher" / "model.safetensors")["lm_head.weight"])
    assert transformers.modeling_utils.is_deepspeed_zero3_enabled()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


# Through the command ------------------------------------------------------------------------


def start(file: Path, *further: str) -> subprocess.Popen[str]:
    script = "from dwakd_cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", script, "train", str(file), *further],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@no_two_processes
def test_an_error_of_one_rank_is_said_once(
    recipe: Recipe, write: Callable[..., Path], lab: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "broken"
    shutil.copytree(lab / "teacher", teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    settings = recipe({"teacher": {"base_model": str(teacher)}, "projectors": {"init": "random"}})
    run = start(write(settings), "--launcher", "torchrun", "--", "--", "--nproc_per_node", "2")
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 1
    assert said.count("The loss is not finite at step 1") == 1
    assert "Traceback" not in said


@pytest.mark.slow
@no_two_processes
def test_ctrl_c_ends_two_processes(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    settings = recipe({}, max_steps=10_000, save_steps=1)
    run = start(write(settings), "--nproc", "2")
    checkpoint = tmp_path / "out" / "checkpoint-1" / "trainer_state.json"
    wait_for(lambda: checkpoint.exists() or run.poll() is not None, 180)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=90)
    assert run.returncode == 130, said
    words = " ".join(said.split())  # a long path moves the line breaks
    assert "`--resume` goes on from the last checkpoint." in words
    assert "Traceback" not in said
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    student = load_file(tmp_path / "out" / "model.safetensors")
    saved = load_file(tmp_path / "out" / f"checkpoint-{last}" / "model.safetensors")
    assert all(torch.equal(student[name], tensor) for name, tensor in saved.items())
    assert not [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(process.info["cmdline"] or [])
    ]
