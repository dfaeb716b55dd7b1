"""The teacher's states on disk: what is read back, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import dwakd_plugin.models.teacher.cached as cached_teacher_module
from dwakd_cli.main import app
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import DiskFull
from dwakd_plugin.models.batches import teacher_batch
from dwakd_plugin.models.teacher import cache as teacher_cache
from dwakd_plugin.models.teacher.cache import TeacherCache
from dwakd_plugin.models.teacher.cached import (
    batches_of,
    cached_teacher,
    fill,
    missing_rows,
    open_cache,
)
from dwakd_plugin.models.teacher.kept_states import encode, row_key
from dwakd_plugin.models.teacher.loaded import Teacher, load_teacher
from dwakd_plugin.recipe.schema import TeacherConfig
from tests.conftest import ROWS, write_rows

IDENTITY = {"teacher": "big", "precision": "float32", "hidden_size": 4}
IDS = torch.tensor([5, 6, 7, 8])
LABELS = torch.tensor([-100, -100, 7, 8])


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    cache = TeacherCache(tmp_path / "states", IDENTITY)
    cache.append({row_key(IDS, LABELS): torch.randn(2, 4, generator=torch.manual_seed(0))})
    return cache


def test_rows_come_back_as_they_were_written(cache: TeacherCache) -> None:
    states = torch.randn(2, 4, generator=torch.manual_seed(0))
    # As a data loader hands it to a worker: no file is pickled.
    at_a_worker = ForkingPickler.loads(ForkingPickler.dumps(cache))
    for again in (cache, TeacherCache(cache.folder, IDENTITY), at_a_worker):
        assert torch.equal(again.read(IDS, LABELS), states)
    assert row_key(IDS, LABELS) in cache
    other_labels = torch.tensor([-100, 6, 7, 8])  # other response positions are another row
    assert row_key(IDS, other_labels) not in cache
    assert row_key(IDS, torch.tensor([5, -100, 7, 8])) in cache  # nothing predicts the first token
    with pytest.raises(UserError, match="lacks a row"):
        cache.read(IDS, other_labels)
    assert cache.read(IDS, torch.full_like(IDS, -100)).shape == (0, 4)


def test_a_foreign_or_damaged_cache_is_refused(cache: TeacherCache, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'big' in the cache, 'huge' in this run"):
        TeacherCache(cache.folder, IDENTITY | {"teacher": "huge"})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UserError, match="isn't a teacher cache"):
        TeacherCache(tmp_path / "photos", IDENTITY)

    shard = next(cache.folder.glob("states-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    again = TeacherCache(cache.folder, IDENTITY)  # sizes at once, checksums where it is read
    for use in (lambda: again.read(IDS, LABELS), again.verify):
        with pytest.raises(UserError, match=rf"{shard}: the checksum of .* does not match"):
            use()
    for position in (6, 30):  # in the header's length, and in the header
        broken = bytearray(content)
        broken[position] ^= 255
        shard.write_bytes(broken)
        with pytest.raises(UserError, match=rf"damaged: {shard}: "):
            TeacherCache(cache.folder, IDENTITY).read(IDS, LABELS)
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{shard}: it has \d+ bytes, the index \d+"):
        TeacherCache(cache.folder, IDENTITY)
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        TeacherCache(cache.folder, IDENTITY)
    (cache.folder / "index.jsonl").write_text('{"format": 1\n')
    with pytest.raises(UserError, match="is damaged"):
        TeacherCache(cache.folder, IDENTITY)


def test_an_index_cannot_point_out_of_its_folder(cache: TeacherCache, tmp_path: Path) -> None:
    shard = next(cache.folder.glob("states-*"))
    shard.rename(tmp_path / shard.name)
    index = cache.folder / "index.jsonl"
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(UserError, match="isn't part of the cache"):
        TeacherCache(cache.folder, IDENTITY)


def rows(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.manual_seed(1)
    result = []
    for length in range(6, 6 + count):
        ids = torch.randint(0, 300, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = -100
        result.append((ids, labels))
    return result


def test_missing_rows_are_computed_and_a_full_cache_needs_no_teacher(
    lab: Path, tmp_path: Path
) -> None:
    config = TeacherConfig(base_model=str(lab / "teacher"), cache=str(tmp_path / "states"))  # type: ignore[call-arg]
    heard: list[tuple[int, int]] = []
    tokenizer = load_teacher_tokenizer(config)
    teacher, cache = cached_teacher(
        config, "cpu", rows(5), tokenizer, lambda done, total: heard.append((done, total))
    )
    assert len(cache) == 5 and heard[-1] == (21, 21)  # response tokens
    assert teacher.model is None
    live = load_teacher(config, "cpu")
    for ids, labels in rows(5):
        expected = live_states(live, ids, labels)
        assert torch.allclose(cache.read(ids, labels), expected, atol=1e-5)  # batched otherwise

    heard.clear()
    full, cache = cached_teacher(
        config, "cpu", rows(5), tokenizer, lambda *step: heard.append(step)
    )
    assert not heard
    assert torch.equal(full.head.weight, live.head.weight)
    assert torch.equal(full.embeddings.weight, live.embeddings.weight)
    assert full.parameters == live.parameters

    said: list[str] = []
    _, cache = cached_teacher(
        config, "cpu", rows(7), tokenizer, lambda *step: heard.append(step), said.append
    )
    assert heard[-1] == (12, 12) and len(cache) == 7 and not said
    # As on the next day, where a template prints it.
    cached_teacher(config, "cpu", rows(8)[7:], tokenizer, on_wait=said.append)
    (line,) = said
    assert line.startswith("None of the 1 rows is among the 7 of the teacher cache")


def live_states(teacher: Teacher, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert teacher.model is not None
    with torch.no_grad():
        hidden = teacher.model.model(input_ids=ids[None]).last_hidden_state[0]
    return hidden[torch.nonzero(labels[1:] != -100).squeeze(1)]


def test_reading_holds_no_more_than_what_was_read(tmp_path: Path) -> None:
    """Pages of a map would count as the process's own, an epoch's worth of them."""
    cache = TeacherCache(tmp_path / "states", IDENTITY | {"hidden_size": 1024})
    keys = [row_key(torch.tensor([index, 1]), torch.tensor([-100, 1])) for index in range(64)]
    cache.append({key: torch.ones(1, 1024).expand(256, -1) for key in keys})  # 64 MiB
    before = resident_file_bytes()
    for key in keys:
        cache._tensor(cache._shard_of[key], key)
    assert resident_file_bytes() - before < 2**20


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("RssFile:"))
    return int(line.split()[1]) * 1024


# What is written in which dtype ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "size", "largest"),
    [("float16", 8, 2**-10), ("bfloat16", 8, 2**-7), ("float8_e4m3", 8, 2**-3)],
)
def test_states_are_kept_in_fewer_bytes(
    tmp_path: Path, dtype: str, size: int, largest: float
) -> None:
    states = torch.randn(2, 4, generator=torch.manual_seed(0))
    states[1] *= 1000  # a token of another scale loses nothing
    assert encode(states, dtype).nbytes == 2 * size
    cache = TeacherCache(tmp_path / "states", IDENTITY, dtype)
    cache.append({row_key(IDS, LABELS): states})
    again = TeacherCache(cache.folder, IDENTITY)  # it takes the folder's own dtype
    assert again.dtype == dtype
    error = (again.read(IDS, LABELS).float() - states).abs().amax(1) / states.abs().amax(1)
    assert 0 < error.max() < largest
    with pytest.raises(UserError, match="cache_dtype asks for"):
        TeacherCache(cache.folder, IDENTITY, "float16" if dtype != "float16" else "bfloat16")


def test_float16_says_where_it_ends(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "states", IDENTITY, "float16")
    with pytest.raises(UserError, match=r"reach 7e\+04, beyond float16's range"):
        cache.append({row_key(IDS, LABELS): torch.full((2, 4), 7e4)})


# Likeliest tokens instead of states --------------------------------------------------------------


def test_what_a_kill_leaves_is_no_harm(cache: TeacherCache) -> None:
    states = cache.read(IDS, LABELS)
    with (cache.folder / "index.jsonl").open("ab") as index:
        index.write(b'{"file": "states-00007-1.safe')
    (cache.folder / "states-00007-1.safetensors").write_bytes(b"never named")
    (cache.folder / "states-00008-1.safetensors.partial-1").write_bytes(b"half")
    again = TeacherCache(cache.folder, IDENTITY)
    assert torch.equal(again.read(IDS, LABELS), states)
    with again.writing(wait=False):
        again.append({"second": torch.ones(1, 4)})
    third = TeacherCache(cache.folder, IDENTITY)
    assert len(third) == 2 and torch.equal(third.read(IDS, LABELS), states)
    assert len(list(cache.folder.glob("states-*"))) == 2
    third.verify()


def test_one_writer_at_a_time(cache: TeacherCache) -> None:
    other = TeacherCache(cache.folder, IDENTITY)
    with cache.writing(wait=False):
        with pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on"):  # noqa: SIM117
            with other.writing(wait=False):
                pass
        cache.append({"second": torch.ones(1, 4)})
    with other.writing(wait=False):  # what the first wrote is known
        assert "second" in other
    # A process that dies with the lock does not keep it.
    script = (
        "import os, pathlib; from dwakd_plugin.models.teacher.cache import TeacherCache\n"
        f"cache = TeacherCache(pathlib.Path({str(cache.folder)!r}), {IDENTITY!r})\n"
        "with cache.writing(wait=False): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    with other.writing(wait=False):
        pass


def test_an_interrupted_filling_goes_on_to_the_same_states(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(name: str) -> tuple[TeacherConfig, TeacherCache]:
        config = TeacherConfig(base_model=str(lab / "teacher"), cache=str(tmp_path / name))  # type: ignore[call-arg]
        return config, open_cache(config, "cpu", load_teacher_tokenizer(config))

    config, whole = begin("whole")
    fill(config, "cpu", whole, missing_rows(whole, rows(12)), batch_tokens=30)

    config, cache = begin("stopped")
    hidden, calls = Teacher.hidden, []

    def stop_in_the_middle(self: Teacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return hidden(self, batch)

    monkeypatch.setattr(Teacher, "hidden", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        fill(config, "cpu", cache, missing_rows(cache, rows(12)), batch_tokens=30)
    monkeypatch.undo()
    config, cache = begin("stopped")
    assert 0 < len(cache) < 12
    fill(config, "cpu", cache, missing_rows(cache, rows(12)), batch_tokens=30)
    for row in rows(12):
        assert torch.equal(cache.read(*row), whole.read(*row))


def test_batches_hold_no_more_tokens_than_asked_for() -> None:
    lengths = [7, 2, 9, 40, 2, 3, 8, 8, 5, 2]
    missing = {f"{place}": (torch.zeros(n), torch.zeros(n)) for place, n in enumerate(lengths)}
    found = list(batches_of(missing, 24))
    sizes = [[lengths[int(key)] for key in keys] for keys in found]
    assert sizes == [[2, 2, 2, 3], [5, 7, 8], [8, 9], [40]]  # a long row is read all the same
    left = {key: row for key, row in missing.items() if key not in found[0]}
    assert list(batches_of(left, 24)) == found[1:]
    assert list(batches_of({})) == []


def test_live_and_cached_are_the_same_bits_where_batches_are(lab: Path, tmp_path: Path) -> None:
    config = TeacherConfig(base_model=str(lab / "teacher"), cache=str(tmp_path / "states"))  # type: ignore[call-arg]
    teacher, cache = cached_teacher(config, "cpu", rows(5), load_teacher_tokenizer(config))
    live = load_teacher(config, "cpu")
    batch = teacher_batch(*map(list, zip(*rows(5), strict=True)))
    expected = live.hidden(batch).flatten(0, 1)[batch["teacher_index"]]
    stored = torch.cat([cache.read(*row) for row in rows(5)])
    assert torch.equal(stored, expected)
    assert teacher.model is None
    assert "only head and embeddings loaded" in teacher.precision


def test_a_full_disk_keeps_what_was_written_and_says_how_much_is_missing(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TeacherConfig(base_model=str(lab / "teacher"), cache=str(tmp_path / "states"))  # type: ignore[call-arg]
    cache = open_cache(config, "cpu", load_teacher_tokenizer(config))
    missing = missing_rows(cache, rows(12))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"will take .* MiB more, and 0.0 MiB are free"):
        fill(config, "cpu", cache, missing)
    assert not cache.folder.exists()
    monkeypatch.undo()

    save, saved = teacher_cache.save_tensors, []

    def full_after_two(tensors: dict[str, torch.Tensor], file: Path) -> None:
        saved.append(file)
        if len(saved) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(teacher_cache, "save_tensors", full_after_two)
    monkeypatch.setattr(cached_teacher_module, "SHARD_BYTES", 1)
    with pytest.raises(UserError, match=r"is full\. \d+ of 12 rows .* the same command goes on"):
        fill(config, "cpu", cache, missing, batch_tokens=30)
    monkeypatch.undo()
    again = open_cache(config, "cpu", load_teacher_tokenizer(config))
    assert 0 < len(again) < 12
    fill(config, "cpu", again, missing_rows(again, rows(12)))
    assert len(again) == 12
    again.verify()


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    cache = TeacherCache(small_disk / "states", IDENTITY)
    cache.append({"first": torch.ones(1000, 4)})
    with pytest.raises(DiskFull, match="is full"):
        cache.append({"second": torch.ones(90_000, 4)})
    again = TeacherCache(small_disk / "states", IDENTITY)
    assert len(again) == 1
    again.verify()


# The command -------------------------------------------------------------------------------------


def run_cache(file: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(
        app, ["cache", str(file), "--json", *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.slow
def test_the_command_fills_the_caches_of_several_teachers_one_after_another(
    recipe: Callable[..., dict[str, Any]], write: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    parts = {"maths": ROWS[:9], "code": ROWS[9:21]}
    files = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in parts.items()
    }
    kept, live = (
        [{"name": name, "datasets": [file]} | own for name, file in files.items()]
        for own in ({"top_k": 8}, {})
    )
    for one in kept:
        one["cache"] = str(tmp_path / f"{one['name']}-says")
    given = recipe({"variant": "mapped", "teachers": [*kept, {"name": "both"}]}, val_set_size=4)
    given["datasets"] = [{"path": file, "type": "alpaca"} for file in files.values()]
    found = run_cache(write(given))["teachers"]
    assert {name: each["rows_computed"] for name, each in found.items()} == {"maths": 9, "code": 12}
    assert found["code"]["folder"] == kept[1]["cache"]
    by_name = run_cache(write(given), "--teacher", "code")
    assert (by_name["rows"], by_name["rows_computed"]) == (12, 0)
    with pytest.raises(UserError, match="has several teachers"):
        run_cache(write(given), "--dtype", "float16")

    # Where none names a cache, all.
    given = recipe({"variant": "mapped", "teachers": live}) | {"datasets": given["datasets"]}
    result = CliRunner().invoke(app, ["cache", str(write(given))], catch_exceptions=False)
    lines = result.output.partition("dwakd:\n")[2]
    teachers = yaml.safe_load(f"dwakd:\n{lines}")["dwakd"]["teachers"]
    assert teachers == [
        {"name": name, "cache": str(tmp_path / f"out-{name}-cache")} for name in files
    ]


@pytest.mark.slow
def test_the_command_fills_what_training_reads_without_a_teacher(
    recipe: Callable[..., dict[str, Any]],
    write: Callable[[dict[str, Any]], Path],
    train: Callable[[dict[str, Any]], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = recipe({}, val_set_size=0.2, dataloader_num_workers=2, max_steps=3, eval_steps=3)
    file = write(settings)
    report = run_cache(file, "--batch-tokens", "500")
    folder = tmp_path / "out-teacher-cache"
    assert report["folder"] == str(folder)
    assert report["rows"] == report["rows_computed"] == 40
    again = run_cache(file)
    assert again["rows_computed"] == 0 and again["bytes"] == report["bytes"]
    assert run_cache(file, "--verify")["verified"]
    live = train(settings)

    def no_body(*_: Any) -> None:
        raise AssertionError("the teacher's body was loaded")

    monkeypatch.setattr(cached_teacher_module, "load_teacher", no_body)
    teacher = settings["dwakd"]["teacher"] | {"cache": str(folder)}
    block = settings["dwakd"] | {"teacher": teacher}
    cached = train(settings | {"dwakd": block, "output_dir": str(tmp_path / "cached")})
    assert [line["loss"] for line in cached if "loss" in line] == pytest.approx(
        [line["loss"] for line in live if "loss" in line], rel=1e-5
    )
    live_eval, cached_eval = (
        [line for line in log if "eval_student_kd" in line][-1] for log in (live, cached)
    )
    assert cached_eval["eval_student_kd"] == pytest.approx(live_eval["eval_student_kd"], rel=1e-5)

    # A corrupted shard is found where it is read.
    shard = next(folder.glob("states-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = CliRunner().invoke(app, ["cache", str(file), "--verify"])
    assert isinstance(result.exception, UserError)
    assert f"{shard}: the checksum of" in str(result.exception)
    # Another tokenizer's template is another cache.
    other = settings | {"dwakd": {"teacher": teacher | {"chat_template": "{{ messages }}"}}}
    result = CliRunner().invoke(app, ["cache", str(write(other))])
    assert isinstance(result.exception, UserError)
    assert "chat_template:" in str(result.exception)
