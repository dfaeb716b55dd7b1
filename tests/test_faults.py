"""Kills, full disks, damaged files, two runs at once, NaN: what is said, and what is left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import faults
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.responses import Response, ResponseStore, discard
from dwakd_plugin.export.export import _check_destination
from dwakd_plugin.io import locks, run_lock
from dwakd_plugin.io.files import append_lines, explaining_writes, json_checksum
from dwakd_plugin.io.folders import new_folder
from dwakd_plugin.models.projectors import Projectors, read_projectors, save_projectors
from dwakd_plugin.models.teacher.cache import TeacherCache
from dwakd_plugin.models.teacher.cached import fill, missing_rows, open_cache
from dwakd_plugin.models.teacher.kept_states import row_key
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.schema import TeacherConfig
from dwakd_plugin.train.preflight import check_all
from dwakd_plugin.train.run_folder import RUN_FILE, read_run_file
from dwakd_plugin.train.warmup_file import _alone
from tests.loss.test_memory import NoWaiting

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]
ROOT = Path(__file__).parents[1]


# Kills --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, faults.Operation]:
    """A lab with the undisturbed training, whose run is what is exported."""
    lab = tmp_path_factory.mktemp("kills") / "lab"
    faults.prepare_lab(lab)
    return lab, faults.undisturbed("train", lab)


@pytest.mark.slow
@pytest.mark.parametrize("name", faults.OPERATIONS)
def test_a_killed_run_goes_on_to_the_same_end(
    name: str, killing: tuple[Path, faults.Operation]
) -> None:
    """`python -m benchmarks.faults` does this with many more kills."""
    lab, training = killing
    operation = training if name == "train" else faults.undisturbed(name, lab)
    way = ("file", "write") if name in ("train", "export") else ("write", "file")
    lines = faults.kill_runs(name, operation, lab, kills=2, seed=7, ways=way)
    found = faults.summary(lines)
    assert found["kills"] == 2
    assert found["problems"] == []


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_trains_no_step_more(
    recipe: Recipe, train: Train
) -> None:
    settings = recipe({}, max_steps=3, save_steps=3)
    train(settings)
    out = Path(settings["output_dir"])
    student = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    (out / ".tmpA1b2C3").write_bytes(b"half a student")
    log = train(settings | {"auto_resume_from_checkpoints": True})
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]
    assert not (out / ".tmpA1b2C3").exists()
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in student.items())


@pytest.mark.slow
def test_rows_that_a_kill_left_half_prepared_are_prepared_again(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    settings = recipe({}, max_steps=1, save_steps=1)
    train(settings)
    (info,) = (tmp_path / "prepared").glob("dwakd-*/*/dataset_info.json")
    info.write_text(info.read_text()[:20])
    (info.parent / "state.json").unlink()
    train(settings | {"output_dir": str(tmp_path / "again")})
    assert json.loads(info.read_text())


def test_a_model_that_a_killed_export_put_aside_comes_back(tmp_path: Path) -> None:
    run, dest, old = tmp_path / "run", tmp_path / "student", tmp_path / ".student.old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    with (
        pytest.raises(RuntimeError, match="as if it failed"),
        new_folder(dest, lambda dest: _check_destination(run, dest, force=True)),
    ):
        raise RuntimeError("as if it failed")
    assert (dest / "config.json").is_file() and not old.exists()


@pytest.mark.slow
def test_sigterm_ends_a_run_with_a_checkpoint_that_resumes_exactly(
    recipe: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dwakd_plugin.train.trainer import DWAKDTrainer

    settings = recipe({}, max_steps=6, save_steps=100)
    train(settings)
    whole = Path(settings["output_dir"])
    handler = signal.getsignal(signal.SIGTERM)
    compute = DWAKDTrainer.compute_loss

    def terminated(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, *args, **kwargs)

    cut = tmp_path / "cut"
    monkeypatch.setattr(DWAKDTrainer, "compute_loss", terminated)
    train(settings | {"output_dir": str(cut)})
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [path.name for path in cut.glob("checkpoint-*")] == ["checkpoint-3"]
    assert (cut / "model.safetensors").is_file()
    train(settings | {"output_dir": str(cut), "auto_resume_from_checkpoints": True})
    for file in ("model.safetensors", "dwakd/projectors.safetensors"):
        expected, found = load_file(whole / file), load_file(cut / file)
        assert all(torch.equal(expected[name], found[name]) for name in expected), file


# Two at once --------------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that trains in tmp_path/out, as far as its lock says, with a worker of its own."""
    script = (
        "import os, pathlib, sys, time; from dwakd_plugin.io import run_lock\n"
        "run_lock.hold(pathlib.Path(sys.argv[1]))\n"
        "if os.fork() == 0: time.sleep(20); os._exit(0)\n"  # as a data-loader worker
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_two_runs_in_one_folder_are_refused(
    holder: subprocess.Popen[str], recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    who = f"is in use: process {holder.pid} on {socket.gethostname()} trains there"
    for recipe_ in (recipe({}), recipe({}, auto_resume_from_checkpoints=True)):
        with pytest.raises(UserError, match=who):  # `dwakd train`, before it writes anything
            check_all(ReadRecipe(recipe_))
    with pytest.raises(UserError, match=who):  # the run itself
        run_lock.hold(out)
    # Killed: its lock is gone, though a process that it forked lives on.
    holder.kill()
    holder.wait()
    check_all(ReadRecipe(recipe({}, auto_resume_from_checkpoints=True)))
    run_lock.hold(out)
    run_lock.hold(out)  # its own
    run_lock.check_free(out)
    assert str(os.getpid()) in (out / run_lock.LOCK).read_text()
    run_lock.release()
    assert (out / run_lock.LOCK).read_text() == ""


@pytest.mark.slow
def test_a_run_refuses_a_folder_in_use_and_gives_its_own_back(
    holder: subprocess.Popen[str],
    recipe: Recipe,
    train: Train,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(SystemExit):
        train(recipe({}))
    assert f"process {holder.pid} on" in caplog.text
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    own = recipe({}, max_steps=1, save_steps=1, output_dir=str(tmp_path / "own"))
    train(own)
    assert (tmp_path / "own" / run_lock.LOCK).read_text() == ""


@pytest.mark.slow
def test_two_warm_ups_of_one_file_are_refused(tmp_path: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "projectors.safetensors"
    work.mkdir()
    script = (
        "import pathlib, sys, time; from dwakd_plugin.train.warmup_file import _alone\n"
        "with _alone(pathlib.Path(sys.argv[1]), pathlib.Path()): print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        who = rf"is being made by process {other.pid} on"
        with pytest.raises(UserError, match=who), _alone(work, output):
            pass
        other.kill()
    with _alone(work, output):
        pass


def test_force_does_not_take_the_answers_of_a_running_evaluation(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "responses.jsonl", {"weights": "abc"})
    with store.writing():
        store.add([(10, 0, [1, 2], Response("text", 3, True))])
        who = f"is writing {store.file}: process {os.getpid()} on"
        with pytest.raises(UserError, match=f"Another process {who}"):
            discard(store.file)
    assert len(ResponseStore(store.file, {"weights": "abc"})) == 1
    discard(store.file)
    assert len(ResponseStore(store.file, {"weights": "another"})) == 0
    assert not list(tmp_path.iterdir())


def test_where_the_file_system_knows_no_locks_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_with(code: int) -> None:
        error = OSError(code, "no locks here")
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=error))

    for code in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        failing_with(code)
        for lock in [locks.take(tmp_path / "lock", str) for _ in range(2)]:
            locks.release(lock)
    failing_with(errno.EIO)  # another error is said
    with pytest.raises(OSError, match="no locks here"):
        locks.take(tmp_path / "lock", str)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    script = (
        "import os, pathlib, sys; from dwakd_plugin.io import locks\n"
        "lock = locks.take(pathlib.Path(sys.argv[1]), str)\n"
        "print(flush=True); input(); locks.release(lock, remove=True)"
    )
    command = [sys.executable, "-c", script, str(file)]
    heard = []

    def on_wait(who: str) -> None:
        heard.append(who)
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()

    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        lock = locks.take(file, str, on_wait)  # of the file that is there once it is removed
    assert heard == [f"process {other.pid} on {socket.gethostname()}"]
    assert file.read_text().startswith(f"process {os.getpid()} on")
    locks.release(lock, remove=True)
    assert not file.exists()


# Damaged files ------------------------------------------------------------------------------


def damaged(file: Path) -> Iterator[int]:
    """Damages one byte after another, each for one turn of the loop; yields its place."""
    content = file.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        yield place
    file.write_bytes(content)


def test_a_damaged_byte_of_projectors_is_found(tmp_path: Path) -> None:
    file = tmp_path / "projectors.safetensors"
    save_projectors(Projectors(2, 3).state_dict(), file, {"student": "small", "teacher": "big"})
    tensors, metadata = read_projectors(file)
    found = places = 0
    for _ in damaged(file):
        places += 1
        try:
            again, other = read_projectors(file)
        except UserError as error:
            assert str(file) in str(error)
            found += 1
            continue
        # The checksum's own name, so that there is none; what it was of is whole.
        assert other.items() >= metadata.items()
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert found > 0.98 * places


def test_a_damaged_byte_of_a_teacher_cache_is_found(tmp_path: Path) -> None:
    identity = {"teacher": "big", "hidden_size": 4}
    rows = [(torch.tensor([n, 6, 7, 8]), torch.tensor([-100, -100, 7, 8])) for n in range(3)]
    cache = TeacherCache(tmp_path / "states", identity)
    cache.save_weights({"embeddings": torch.randn(5, 4), "scale": torch.tensor(1.0)})
    cache.append({row_key(*row): torch.randn(2, 4) for row in rows})
    kept = {row_key(*row): cache.read(*row) for row in rows}
    weights = cache.load_weights("cpu")
    assert weights is not None
    for file in sorted(cache.folder.iterdir()):
        found = places = 0
        for _ in damaged(file):
            places += 1
            try:
                again = TeacherCache(cache.folder, identity)
                again.verify()
            except UserError as error:
                assert str(cache.folder) in str(error)
                found += 1
                continue
            # What is there is right; a row, or the last line, that is not there is made again.
            for row in rows:
                if row_key(*row) in again:
                    assert torch.equal(again.read(*row), kept[row_key(*row)])
            read = again.load_weights("cpu") or weights
            assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
        assert found > 0.9 * places, (file.name, found, places)


def test_a_damaged_byte_of_a_runs_record_is_found(recipe: Recipe, tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "identity": {"student": "small", "teacher": "big", "adapter": "none"},
        "settings": {"loss": {"temperature": 1.5}},
    }
    file = tmp_path / "out" / RUN_FILE
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(record | {"crc32": json_checksum(record)}, indent=1))
    for _ in damaged(file):
        try:
            found = read_run_file(file)
        except UserError as error:
            assert str(file) in str(error)
        else:
            assert found is not None and found.items() >= record.items()
    with pytest.raises(UserError, match="is damaged"):
        file.write_text(file.read_text().replace("1.5", "1.6"))
        check_all(ReadRecipe(recipe({})))


def test_a_damaged_byte_of_answers_is_found(tmp_path: Path) -> None:
    identity = {"weights": "abc", "temperature": 1.0}
    store = ResponseStore(tmp_path / "responses.jsonl", identity)
    made = {(10, row): Response(f"answer {row}", row, row % 2 == 0) for row in range(3)}
    with store.writing():
        store.add([(seed, row, [row, 2], response) for (seed, row), response in made.items()])
    for _ in damaged(store.file):
        try:
            again = ResponseStore(store.file, identity)
        except UserError as error:
            assert str(store.file) in str(error)
            continue
        for (seed, row), response in made.items():
            assert again.get(seed, row, [row, 2]) in (response, None)  # None: is made again


@pytest.mark.slow
def test_a_damaged_checkpoint_or_report_of_rows_is_named(
    recipe: Recipe, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = recipe({}, max_steps=2, save_steps=1)
    train(settings)
    resumed = settings | {"auto_resume_from_checkpoints": True}
    file = tmp_path / "out" / "checkpoint-2" / "dwakd" / "projectors.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit):
        train(resumed)
    assert f"{file} are damaged: their checksum does not match" in caplog.text
    (rows,) = (tmp_path / "prepared").glob("dwakd-*/rows.json")
    rows.write_text(rows.read_text()[:-9])
    with pytest.raises(SystemExit):
        train(resumed)
    assert f"{rows} is damaged" in caplog.text


# Full disks ---------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_nothing_half_written_stays(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 900_000)
    file = small_disk / "projectors.safetensors"
    save_projectors({"small": torch.ones(10)}, file, {})
    content = file.read_bytes()
    with pytest.raises(UserError, match=r"projectors\.safetensors cannot be written: the disk is"):
        save_projectors({"large": torch.ones(100_000)}, file, {})
    assert file.read_bytes() == content

    store = ResponseStore(small_disk / "responses.jsonl", {"weights": "abc"})
    store.add([(10, 0, [1], Response("short", 1, True))])
    with pytest.raises(UserError, match=r"responses\.jsonl cannot be written: the disk is full"):
        store.add([(10, 1, [1], Response("long" * 100_000, 1, True))])
    assert len(ResponseStore(store.file, {"weights": "abc"})) == 1
    with (
        pytest.raises(UserError, match=r"the disk is full\. Remedy\."),
        explaining_writes(small_disk, "Remedy."),
    ):
        append_lines(small_disk / "lines", "head", ["x" * 400_000])
    with (
        pytest.raises(UserError, match=r"the disk is full\. Remedy\."),
        explaining_writes(small_disk, "Remedy."),
    ):
        torch.save(torch.ones(100_000), small_disk / "optimizer.pt")
    (small_disk / "optimizer.pt").unlink()
    left = sorted(path.name for path in small_disk.iterdir())
    assert left == ["filler", "lines", "projectors.safetensors", "responses.jsonl"]
    assert (small_disk / "lines").read_bytes() == b""


@pytest.mark.slow
def test_a_disk_that_fills_up_in_training(
    recipe: Recipe, train: Train, tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = recipe({}, max_steps=4, save_steps=1)
    train(settings)
    full = settings | {"output_dir": str(small_disk / "out")}
    with pytest.raises(SystemExit):
        train(full)
    assert "cannot be written: the disk is full" in caplog.text
    whole = list((small_disk / "out").glob("checkpoint-*/trainer_state.json"))
    assert 0 < len(whole) < 4

    # Room again: it goes on to the same end. Then none for the final student.
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    caplog.clear()
    resumed = full | {"auto_resume_from_checkpoints": True}
    train(resumed)
    for file in ("model.safetensors", "dwakd/projectors.safetensors"):
        expected, found = load_file(tmp_path / "out" / file), load_file(small_disk / "out" / file)
        assert all(torch.equal(expected[name], found[name]) for name in expected), file
    (small_disk / "out" / "model.safetensors").unlink()
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"x" * (free - 40_000))
    with pytest.raises(SystemExit):
        train(resumed)
    assert "the last checkpoint has all that was trained" in caplog.text
    assert not (small_disk / "out" / "model.safetensors").exists()


# A teacher that is gone, and NaN ------------------------------------------------------------


@pytest.mark.slow
def test_a_teacher_that_vanishes_in_the_middle(
    recipe: Recipe,
    train: Train,
    lab: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from dwakd_plugin.train.trainer import DWAKDTrainer

    teacher = tmp_path / "teacher"
    shutil.copytree(lab / "teacher", teacher)
    settings = recipe({"teacher": {"base_model": str(teacher)}})
    train(settings)
    compute = DWAKDTrainer.compute_loss

    def vanishing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            shutil.rmtree(teacher, ignore_errors=True)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(DWAKDTrainer, "compute_loss", vanishing)
    alone = tmp_path / "alone"
    train(settings | {"output_dir": str(alone)})
    monkeypatch.undo()
    assert not teacher.exists()
    expected = load_file(tmp_path / "out" / "model.safetensors")
    found = load_file(alone / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for change in ({"auto_resume_from_checkpoints": True}, {"output_dir": str(tmp_path / "new")}):
        caplog.clear()
        with pytest.raises(SystemExit):
            train(settings | change)
        assert f"The teacher `{teacher}` cannot be found" in caplog.text


def broken(model: Path, to: Path, name: str) -> str:
    """A copy of a model with one NaN in one of its weights."""
    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    weights[name].view(-1)[5] = float("nan")
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return str(to)


def test_a_cache_takes_no_states_that_are_not_finite(lab: Path, tmp_path: Path) -> None:
    teacher = broken(lab / "teacher", tmp_path / "broken", "model.norm.weight")
    config = TeacherConfig(base_model=teacher, cache=str(tmp_path / "states"))  # type: ignore[call-arg]
    cache = open_cache(config, "cpu", load_teacher_tokenizer(config))
    row = (torch.tensor([5, 6, 7, 8]), torch.tensor([-100, -100, 7, 8]))
    with pytest.raises(UserError, match=r"hidden states are not finite .* cannot teach"):
        fill(config, "cpu", cache, missing_rows(cache, [row]))
    assert len(TeacherCache(cache.folder, cache.identity)) == 0


@pytest.mark.slow
def test_nan_is_named_where_it_is(
    recipe: Recipe,
    train: Train,
    lab: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from dwakd_plugin.train.trainer import DWAKDTrainer

    def said(settings: dict[str, Any]) -> str:
        caplog.clear()
        with pytest.raises(SystemExit):
            train(settings)
        return str(caplog.text)

    random = {"projectors": {"init": "random"}}
    teacher = broken(lab / "teacher", tmp_path / "teacher", "model.layers.1.mlp.up_proj.weight")
    text = said(recipe({"teacher": {"base_model": teacher}, **random}))
    assert "t2s_ce = nan" in text and "rows.jsonl" in text
    assert "The teacher's hidden states are not finite there: check its weights." in text

    student = broken(lab / "student", tmp_path / "student", "model.layers.0.mlp.up_proj.weight")
    text = said(recipe(random, base_model=student))
    assert "The loss is not finite at step 1" in text
    assert "The student's model.layers.0.mlp.up_proj.weight is not finite" in text

    # After a step, when a checkpoint is due: it is not written.
    save = DWAKDTrainer._save_checkpoint

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.model.dwakd_projectors.query.bias[0] = float("inf")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(DWAKDTrainer, "_save_checkpoint", spoilt)
    text = said(recipe(random, output_dir=str(tmp_path / "spoilt")))
    assert "The projectors' query.bias is not finite after step 2" in text
    assert not list((tmp_path / "spoilt").glob("checkpoint-*"))


def test_a_loss_is_read_before_its_step_is_taken_and_not_sooner() -> None:
    from dwakd_plugin.train.non_finite import LossWatch, NonFiniteLoss

    def watch() -> LossWatch:
        return LossWatch(lambda inputs: f"row {inputs['row']}", at_once=False)

    good, bad = torch.tensor(1.0, requires_grad=True), torch.tensor(torch.inf)
    step = watch()
    with NoWaiting():
        for row, loss in enumerate((good, good, bad, good, bad)):
            step.hear(loss, {"row": row}, training=True)
    with pytest.raises(NonFiniteLoss, match="row 2"):
        step.on_pre_optimizer_step()
    step.on_pre_optimizer_step()  # the next step has losses of its own

    evaluation = watch()
    evaluation.hear(bad, {"row": 0}, training=False)
    with pytest.raises(NonFiniteLoss, match="row 0"):
        evaluation.hear(good, {"row": 1}, training=False)
    evaluation.hear(bad, {"row": 2}, training=False)
    with pytest.raises(NonFiniteLoss, match="row 2"):
        evaluation.on_evaluate()
    with pytest.raises(NonFiniteLoss, match="row 3"):
        LossWatch(lambda _: "row 3", at_once=True).hear(bad, {}, training=True)


# Long runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_short_form_of_the_long_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.long_run", "--results", str(tmp_path)]
    short = ["--steps", "40", "--every", "5", "--check-every", "20"]
    subprocess.run([*command, *short], cwd=ROOT, check=True, capture_output=True, timeout=400)
    report = json.loads((tmp_path / "long_run.json").read_text())
    assert report["results"]["runs"].keys() == {"live", "cached"}
    for run in report["results"]["runs"].values():
        assert [sample[0] for sample in run["samples"]] == list(range(5, 41, 5))
        assert [line["step"] for line in run["drift"]] == [20, 40]
        assert 0 <= run["largest_drift"] < 1e-4
        assert run["handles_gained"] <= 0


def test_packed_weights_are_no_numbers_to_look_at() -> None:
    """4-bit weights may be kept as floats (bnb_4bit_quant_storage), whose bits are packed codes."""
    from bitsandbytes.nn import Params4bit

    from dwakd_plugin.train.non_finite import non_finite_parameter

    model = torch.nn.Linear(4, 4)
    assert non_finite_parameter(model) is None
    packed = torch.full((8, 1), torch.nan, dtype=torch.bfloat16)
    model.weight = Params4bit(packed, requires_grad=False, bnb_quantized=True)
    assert non_finite_parameter(model) is None
    with torch.no_grad():
        model.bias[0] = torch.inf
    assert non_finite_parameter(model) == "The student's bias"
