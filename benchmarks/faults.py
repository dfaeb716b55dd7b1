"""Kills runs at random moments, looks at what is left, runs them again, and compares the end.

    python -m benchmarks.faults --kills 50

Training, the projectors' warm-up, the teacher's cache, evaluation and export of a tiny pair, each
in a process forked from one that has imported everything. Runs die in three ways, in turn:

    time     SIGKILL after a random share of the time that the run takes
    file     SIGKILL at a random one of the run's own file operations in its folder
    write    within a write: the kernel ends the process where a file grows beyond a random size
             (SIGXFSZ, left at its default, which is as abrupt)

A folder's run dies up to three times, so that a run that goes on is killed too. After each death
whatever counts as whole there must be what the undisturbed run had; after the last the same run
goes on to its end, which must be the undisturbed run's, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import typer
import yaml

Death = tuple[str, float]  # a way and its moment: seconds, number of the operation, or bytes
WAYS = ("time", "file", "write")
LONGEST = 3  # deaths of one folder's run
EVAL_STEPS = 3
PATIENCE = 300.0  # seconds that a run may take
PRELOADED = [
    "tests.conftest",  # the environment, before anything else
    "axolotl.cli.train",
    "axolotl.cli.config",
    "axolotl.common.datasets",
    "axolotl.core.builders",
    "axolotl.train",
    "dwakd_cli.cache",
    "dwakd_cli.evaluate",
    "dwakd_cli.evaluation_report",
    "dwakd_cli.main",
    "dwakd_cli.warmup",
    "dwakd_plugin.train.assembly",
    "dwakd_plugin.evaluate.rows",
    "dwakd_plugin.export.export",
    "dwakd_plugin.train.open_run",
    "dwakd_plugin.plugin",
    "dwakd_plugin.train.trainer",
    "matplotlib.pyplot",
    "rouge_score.rouge_scorer",
    "transformers.models.llama.modeling_llama",
]


# The runs -----------------------------------------------------------------------------------


def train(folder: Path, lab: Path) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    do_train(load_cfg(str(recipe_file(folder, lab))), TrainerCliArgs())


def warmup(folder: Path, lab: Path) -> None:
    from dwakd_cli.warmup import warmup as command
    from dwakd_plugin.train import warmup

    warmup.SHARD_BYTES = 4096
    output = folder / "projectors.safetensors"
    command(recipe_file(folder, lab), epochs=3, patience=3, output=output)


def cache(folder: Path, lab: Path) -> None:
    from dwakd_cli.cache import cache as command
    from dwakd_plugin.models.teacher import cached as cached_teacher

    cached_teacher.SHARD_BYTES = 8192
    file = recipe_file(folder, lab)
    command(file, teacher_cache=folder / "states", batch_tokens=300)


def evaluate(folder: Path, lab: Path) -> None:
    from dwakd_cli.main import app

    options = ["--max-new-tokens", "8", "--seeds", "10,20", "--batch-size", "2"]
    model, data = str(lab / "student"), str(lab / "test.jsonl")
    command = ["evaluate", model, data, "--output", str(folder / "figures"), *options]
    app(command, standalone_mode=False)


def export(folder: Path, lab: Path) -> None:
    from dwakd_plugin.export import verify
    from dwakd_plugin.export.export import export as export_run
    from dwakd_plugin.export.new_process import NewProcess

    # Another process would import for ten seconds, and it reads alone.
    here = cast(NewProcess, SimpleNamespace(verify=verify._verify))
    export_run(lab / "run" / "out", folder / "student", force=True, process=here)


def recipe_file(folder: Path, lab: Path) -> Path:
    """Of the tiny pair; prepared rows are shared, but where the folder has a place for its own."""
    from tests.conftest import tiny_recipe

    own = (folder / "prepared").is_dir()
    recipe = tiny_recipe(
        lab,
        folder,
        # Without DTW, whose kernels every process would load anew.
        {"projectors": {"init": "random"}, "loss": {"dtw_weight": 0.0}},
        max_steps=6,
        val_set_size=0.2,
        eval_steps=EVAL_STEPS,
        auto_resume_from_checkpoints=True,
        save_total_limit=None if folder == lab / "run" else 2,
        dataset_prepared_path=str((folder if own else lab) / "prepared"),
    )
    file = lab / f"{folder.name}.yml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


# What they leave ----------------------------------------------------------------------------


def trained(folder: Path) -> dict[str, Any]:
    """What counts as whole in an output folder: as `dwakd` and axolotl would take it."""
    from safetensors import SafetensorError, safe_open

    from dwakd_plugin.train.run_folder import RUN_FILE, read_run_file

    out = folder / "out"
    found: dict[str, Any] = {}
    states = {}
    for file in out.glob("checkpoint-*/trainer_state.json"):
        try:
            states[int(file.parent.name.split("-")[1])] = json.loads(file.read_text())
        except ValueError:
            continue  # is set aside
    # The last alone is resumed from; older ones may be in the midst of their removal.
    for step in sorted(states)[-1:]:
        place = out / f"checkpoint-{step}"
        found |= {f"{place.name}/{part}": what for part, what in student(place).items()}
        for line in states[step]["log_history"]:
            if "eval_loss" in line and line["step"] % EVAL_STEPS != 0:
                continue  # axolotl evaluates once where a run begins, or goes on
            figures = {key: line[key] for key in ("loss", "eval_loss", "ce") if key in line}
            found[f"log of step {line['step']}: {sorted(figures)}"] = figures
    read_run_file(out / RUN_FILE)
    try:
        with safe_open(out / "model.safetensors", framework="pt"):
            found |= student(out)
    except (FileNotFoundError, SafetensorError):
        pass  # is refused
    return found


def student(folder: Path) -> dict[str, Any]:
    """The student's weights, and the projectors if they are there yet."""
    from dwakd_plugin.models.projectors import PROJECTOR_FILE, read_projectors

    found: dict[str, Any] = {"student": (folder / "model.safetensors").read_bytes()}
    if (folder / PROJECTOR_FILE).is_file():
        tensors, metadata = read_projectors(folder / PROJECTOR_FILE)
        found |= {"pair": metadata} | {name: value.tolist() for name, value in tensors.items()}
    return found


def warmed_up(folder: Path) -> dict[str, Any]:
    from dwakd_plugin.models.projectors import read_projectors

    file = folder / "projectors.safetensors"
    if not file.exists():
        return {}
    tensors, metadata = read_projectors(file)
    report = json.loads(metadata["warmup"])
    del report["seconds"]
    return {"report": report} | {name: tensor.tolist() for name, tensor in tensors.items()}


def cached(folder: Path) -> dict[str, Any]:
    from dwakd_plugin.models.teacher.cache import INDEX, TeacherCache

    index = folder / "states" / INDEX
    if not index.is_file() or b"\n" not in index.read_bytes():
        return {}
    identity = json.loads(index.read_bytes().splitlines()[0])["identity"]
    cache = TeacherCache(folder / "states", identity)
    cache.verify()
    return {
        name: cache._tensor(file, name).tolist()
        for file, entry in cache._files.items()
        for name in entry["crc32"]
    }


def evaluated(folder: Path) -> dict[str, Any]:
    from dwakd_plugin.io.files import whole_lines

    found: dict[str, Any] = {}
    for file in (folder / "figures").glob("responses-*.jsonl"):
        found |= {line.decode(): True for line in whole_lines(file.read_bytes())}
    report = folder / "figures" / "report.json"
    if report.exists():
        found["report"] = json.loads(report.read_text())["models"]
    return found


def exported(folder: Path) -> dict[str, Any]:
    """The model at its place; where there is none, the one that was there before is beside it."""
    dest, old = folder / "student", folder / ".student.old"
    place = dest if dest.exists() else old
    files = {file.name: file.read_bytes() for file in place.glob("*") if file.name != "README.md"}
    return {} if files == OLD_MODEL else files


OLD_MODEL = {"config.json": b"{}", "model.safetensors": b"an older model"}


def prepare_export(folder: Path) -> None:
    """A model is there, which the export replaces."""
    (folder / "student").mkdir()
    for name, content in OLD_MODEL.items():
        (folder / "student" / name).write_bytes(content)


@dataclass
class Operation:
    """A run, what of its folder counts as whole (names to contents), and what it begins with."""

    run: Callable[[Path, Path], None]
    whole: Callable[[Path], dict[str, Any]]
    prepare: Callable[[Path], None] = lambda folder: None
    # Of the undisturbed run:
    end: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    operations: int = 0
    sizes: list[int] = field(default_factory=list)


OPERATIONS = {
    "train": (train, trained),
    "warmup": (warmup, warmed_up),
    "cache": (cache, cached),
    "evaluate": (evaluate, evaluated),
    "export": (export, exported, prepare_export),
}


# The processes ------------------------------------------------------------------------------


def child(name: str, folder: Path, lab: Path, death: Death | None, connection: Any) -> None:
    """Runs an operation to its end or its death; says when it begins, and what it counted."""
    main = sys.modules["__main__"]
    main.__spec__ = main.__file__ = None  # processes that it spawns do not import this again
    log = os.open(lab / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if death is not None and death[0] == "write":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(death[1]), resource.RLIM_INFINITY))
        log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count = 0

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if not watched or not _changes_files(event, arguments, str(folder)):
            return
        count += 1
        if death is not None and death[0] == "file" and count >= death[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    watched = True
    begun = time.monotonic()
    sys.addaudithook(hear)
    connection.send(None)
    try:
        OPERATIONS[name][0](folder, lab)  # type: ignore[operator]
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    watched = False
    connection.send((time.monotonic() - begun, count))
    os._exit(0)


def _changes_files(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        path = arguments[0] if arguments else None
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
    return bool(changes) and isinstance(path, str | os.PathLike) and str(path).startswith(folder)


def start(name: str, folder: Path, lab: Path, death: Death | None) -> tuple[int, Any]:
    """Runs a process to its end; its exit code (negative: the signal) and what it counted."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(name, folder, lab, death, theirs))
    process.start()
    theirs.close()
    try:
        ours.recv()
        if death is not None and death[0] == "time":
            process.join(death[1])
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join(PATIENCE)
        counted = ours.recv() if process.exitcode == 0 else None
    finally:
        process.kill()
        process.join()
    return process.exitcode or 0, counted


# The experiment -----------------------------------------------------------------------------


def prepare_lab(lab: Path) -> None:
    """The tiny pair, and an environment in which no cache of the user's is written."""
    from tests.conftest import make_lab

    lab.mkdir(parents=True, exist_ok=True)
    make_lab(lab)


def undisturbed(name: str, lab: Path) -> Operation:
    """An operation, and what it comes to where nobody disturbs it."""
    operation = Operation(*OPERATIONS[name])  # type: ignore[arg-type]
    folder = lab / ("run" if name == "train" else f"undisturbed-{name}")
    folder.mkdir()
    operation.prepare(folder)
    code, counted = start(name, folder, lab, None)
    if code != 0:
        raise RuntimeError((lab / f"{folder.name}.log").read_text()[-4000:])
    operation.seconds, operation.operations = counted
    operation.end = operation.whole(folder)
    operation.sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    if name == "train":  # its first checkpoints are gone where two are kept
        for place in sorted(folder.glob("out/checkpoint-*")):
            operation.end |= {f"{place.name}/{part}": what for part, what in student(place).items()}
    return operation


def moment(way: str, operation: Operation, chance: random.Random) -> Death:
    if way == "time":
        return way, chance.uniform(0.0, operation.seconds)
    if way == "file":
        return way, chance.randint(1, operation.operations)
    return way, chance.randint(1, max(1, chance.choice(operation.sizes) - 1))


def kill_runs(
    name: str, operation: Operation, lab: Path, kills: int, seed: int, ways: tuple[str, ...] = WAYS
) -> list[dict[str, Any]]:
    """Kills an operation's runs so many times; one line for each death, and for each end.

    A line has `problem`, which is None where all was as it must be.
    """
    chance = random.Random(f"{name}-{seed}")
    lines: list[dict[str, Any]] = []
    deaths = tries = case = 0
    while deaths < kills:
        case += 1
        folder = lab / f"{name}-{seed}-{case}"
        folder.mkdir()
        if chance.random() < 0.25:
            (folder / "prepared").mkdir()  # rows are prepared anew
        operation.prepare(folder)
        code = 0
        for _ in range(chance.randint(1, min(LONGEST, kills - deaths))):
            death = moment(ways[tries % len(ways)], operation, chance)
            code, _counted = start(name, folder, lab, death)
            tries += 1
            if code == 0:
                break  # it was faster
            line = {"case": folder.name, "way": death[0], "moment": round(death[1], 3)}
            killed = code in (-signal.SIGKILL, -signal.SIGXFSZ)
            deaths += killed
            # A single write, or one of a process that it started, may fail without a signal.
            failed = not killed and death[0] == "write"
            line["way"] = "failed write" if failed else death[0]
            problem = None if killed or failed else _log(lab, folder)
            lines.append(line | {"problem": problem or _check(operation, folder, end=False)})
        if code != 0:
            code, _counted = start(name, folder, lab, None)
        problem = _log(lab, folder) if code != 0 else _check(operation, folder, end=True)
        lines.append({"case": folder.name, "way": None, "problem": problem})
        if problem is None:
            shutil.rmtree(folder)
    return lines


def _check(operation: Operation, folder: Path, *, end: bool) -> str | None:
    """What is wrong with what is left in a folder."""
    try:
        found = operation.whole(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wrong = [key for key, value in found.items() if operation.end.get(key) != value]
    if end:
        last = [key for key in operation.end if not key.startswith("checkpoint-")]
        wrong += [key for key in last if key not in found]
    return f"differs, or is missing: {', '.join(wrong)[:300]}" if wrong else None


def _log(lab: Path, folder: Path) -> str:
    return "it ended by itself: " + (lab / f"{folder.name}.log").read_text()[-1500:]


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    deaths = Counter(line["way"] for line in lines if line["way"] is not None)
    return {
        "kills": sum(deaths[way] for way in WAYS),
        "by_way": dict(sorted(deaths.items())),
        "runs_to_their_end": sum(line["way"] is None for line in lines),
        "problems": [line for line in lines if line["problem"] is not None],
    }


def main(
    kills: Annotated[int, typer.Option(help="Kills of all operations together.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 1,
    only: Annotated[str | None, typer.Option(help="One of the operations.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of the report.")] = None,
) -> None:
    from benchmarks import measure

    started = measure.start(1, False, ["axolotl", "transformers", "safetensors"])
    names = list(OPERATIONS) if only is None else [only]
    lines: dict[str, list[dict[str, Any]]] = {}
    facts: dict[str, Any] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dwakd-faults-") as folder:
        lab = Path(folder) / "lab"
        prepare_lab(lab)
        operations = {"train": undisturbed("train", lab)}  # its run is what is exported
        for place, name in enumerate(names):
            operation = operations.get(name) or undisturbed(name, lab)
            share = kills * (place + 1) // len(names) - kills * place // len(names)
            lines[name] = kill_runs(name, operation, lab, share, seed)
            facts[name] = {
                "seconds_undisturbed": round(operation.seconds, 1),
                "file_operations": operation.operations,
                **summary(lines[name]),
            }
            measure.say(f"{name}: {json.dumps(facts[name])[:2000]}")
    everything = [line for part in lines.values() for line in part]
    report = {
        "operations": facts,
        "total": summary(everything),
        "seconds": round(time.monotonic() - begun),
        "lines": lines,
    }
    total = report["total"]
    targets = [
        measure.target("kills", total["kills"], kills, at_least=True),
        measure.target("problems after a kill or at the end", len(total["problems"]), 0),
    ]
    measure.write_report("faults", started, report, targets, results or measure.RESULTS)


if __name__ == "__main__":
    typer.run(main)
