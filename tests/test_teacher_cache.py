"""The teacher's states on disk: what is read back, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from dwakd_plugin.config import TeacherConfig
from dwakd_plugin.errors import UserError
from dwakd_plugin.cached_teacher import cached_teacher
from dwakd_plugin.teacher import Teacher, load_teacher
from dwakd_plugin.teacher_cache import TeacherCache, row_key

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
    for again in (cache, TeacherCache(cache.folder, IDENTITY), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(again.read(IDS, LABELS), states)
    assert row_key(IDS, LABELS) in cache
    other_labels = torch.tensor([-100, 6, 7, 8])  # other response positions are another row
    assert row_key(IDS, other_labels) not in cache
    with pytest.raises(UserError, match="lacks a row"):
        cache.read(IDS, other_labels)
    assert cache.read(IDS, torch.full_like(IDS, -100)).shape == (0, 4)


def test_a_foreign_or_damaged_cache_is_refused(cache: TeacherCache, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'big' in the cache, 'huge' in this run"):
        TeacherCache(cache.folder, IDENTITY | {"teacher": "huge"})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UserError, match="is no teacher cache"):
        TeacherCache(tmp_path / "photos", IDENTITY)

    shard = next(cache.folder.glob("states-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="checksum does not match"):
        TeacherCache(cache.folder, IDENTITY)
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        TeacherCache(cache.folder, IDENTITY)
    (cache.folder / "index.json").write_text('{"format": 1')
    with pytest.raises(UserError, match="is damaged"):
        TeacherCache(cache.folder, IDENTITY)


def test_an_index_cannot_point_out_of_its_folder(cache: TeacherCache, tmp_path: Path) -> None:
    index = json.loads((cache.folder / "index.json").read_text())
    shard = cache.folder / index["shards"][0]["file"]
    shard.rename(tmp_path / shard.name)
    index["shards"][0]["file"] = f"../{shard.name}"
    (cache.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is missing"):
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
    teacher, cache = cached_teacher(
        config, "cpu", rows(5), lambda done, total: heard.append((done, total))
    )
    assert len(cache) == 5 and heard[-1] == (5, 5)
    assert teacher.model is None
    live = load_teacher(config, "cpu")
    for ids, labels in rows(5):
        expected = live_states(live, ids, labels)
        assert torch.allclose(cache.read(ids, labels), expected, atol=1e-5)  # batched otherwise

    heard.clear()
    full, cache = cached_teacher(config, "cpu", rows(5), lambda *step: heard.append(step))
    assert not heard
    assert torch.equal(full.head.weight, live.head.weight)
    assert torch.equal(full.embeddings.weight, live.embeddings.weight)
    assert full.parameters == live.parameters

    _, cache = cached_teacher(config, "cpu", rows(7), lambda *step: heard.append(step))
    assert heard[-1] == (2, 2) and len(cache) == 7


def live_states(teacher: Teacher, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert teacher.model is not None
    with torch.no_grad():
        hidden = teacher.model.model(input_ids=ids[None]).last_hidden_state[0]
    return hidden[torch.nonzero(labels[1:] != -100).squeeze(1)]
