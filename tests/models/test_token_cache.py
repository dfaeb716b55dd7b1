"""The teacher's likeliest tokens on disk, in place of its states."""

from __future__ import annotations

import json
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

import dwakd_plugin.models.teacher.cached as cached_teacher_module
from dwakd_plugin.data.collator import said_of_rows
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.errors import UserError
from dwakd_plugin.models.batches import teacher_batch
from dwakd_plugin.models.teacher.cache import TeacherCache
from dwakd_plugin.models.teacher.cached import (
    cached_teacher,
    fill_by,
    missing_rows,
    open_cache,
    weights_of_probabilities,
)
from dwakd_plugin.models.teacher.kept_states import row_key
from dwakd_plugin.models.teacher.loaded import load_teacher
from dwakd_plugin.models.teacher.top_tokens import TopTokens
from dwakd_plugin.recipe.schema import TeacherConfig
from tests.models.test_teacher_cache import IDENTITY, IDS, LABELS, rows, run_cache


def tokens(k: int) -> TopTokens:
    log_probs = torch.randn(2, 300, generator=torch.manual_seed(0)).log_softmax(-1).sort(-1).values
    return TopTokens(torch.arange(2 * k).int().view(2, k), log_probs.flip(-1)[:, :k])


def test_likeliest_tokens_come_back(tmp_path: Path) -> None:
    top = tokens(64)
    cache = TeacherCache(tmp_path / "tokens", {"teacher": "served"}, "top_64")
    cache.append({row_key(IDS, LABELS): top})
    shard = next(cache.folder.glob("states-*"))
    assert shard.stat().st_size < 2 * 64 * 6 + 200  # 6 bytes each, and a header
    again = ForkingPickler.loads(
        ForkingPickler.dumps(TeacherCache(cache.folder, {"teacher": "served"}, "top_64"))
    )
    found = again.read(IDS, LABELS)
    assert again.top_k == 64 and torch.equal(found.token_ids, top.token_ids)
    assert torch.allclose(found.log_probs, top.log_probs, rtol=0, atol=2e-6)
    nothing = again.read(IDS, torch.full_like(IDS, -100))
    assert nothing.token_ids.shape == nothing.log_probs.shape == (0, 64)
    again.verify()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        again.read(IDS, LABELS)


def test_states_and_tokens_are_not_mixed_up(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "states", IDENTITY)
    cache.append({row_key(IDS, LABELS): torch.ones(2, 4)})
    with pytest.raises(
        UserError, match=r"keeps hidden states .* asks for 64 tokens .*remove top_k"
    ):
        TeacherCache(cache.folder, IDENTITY, "top_64")
    other = TeacherCache(tmp_path / "tokens", IDENTITY, "top_64")
    other.append({row_key(IDS, LABELS): tokens(64)})
    for form, wanted in (("auto", "states"), ("float16", "states"), ("top_32", "32 tokens")):
        with pytest.raises(
            UserError, match=rf"the 64 likeliest tokens .* asks for {wanted}"
        ) as found:
            TeacherCache(other.folder, IDENTITY, form)
        assert "set dwakd.teacher.top_k: 64" in str(found.value)
    index = other.folder / "index.jsonl"
    for form in ("top_0", "top_x", "top_", "tops", "-1", 7):
        index.write_text(json.dumps({"format": 2, "identity": IDENTITY, "dtype": form}) + "\n")
        with pytest.raises(UserError, match="is damaged"):
            TeacherCache(other.folder, IDENTITY, "top_64")


@pytest.mark.parametrize("shape", [(2, 64), (3, 64, 6), (2, 65, 6), (2, 64, 5), (2, 0, 6), (768,)])
def test_tokens_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    cache = TeacherCache(tmp_path / "tokens", IDENTITY, "top_64")
    cache._add("states-0.safetensors", {row_key(IDS, LABELS): torch.zeros(shape).byte()})
    with pytest.raises(UserError, match="isn't the shape of 2 times 64 tokens"):
        TeacherCache(cache.folder, IDENTITY, "top_64").read(IDS, LABELS)


def test_a_full_cache_of_tokens_needs_nothing_of_the_teacher(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TeacherConfig(base_model=str(lab / "teacher"), cache=str(tmp_path / "t"), top_k=20)  # type: ignore[call-arg]
    tokenizer = load_teacher_tokenizer(config)
    cache = open_cache(config, "cpu", tokenizer)
    need = cached_teacher_module.disk_need(config, "cpu", cache, missing_rows(cache, rows(5)))
    cached_teacher(config, "cpu", rows(5), tokenizer)
    live = load_teacher(config, "cpu")
    assert live.top_k == 20

    def nothing(*_: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(cached_teacher_module, "load_teacher", nothing)
    teacher, cache = cached_teacher(config, "cpu", rows(5), tokenizer)
    assert teacher.model is None and teacher.head.weight.numel() == 0
    assert teacher.head.weight.shape[0] == live.head.weight.shape[0]
    assert teacher.parameters == live.parameters and "nothing loaded" in teacher.precision
    assert 21 * 20 * 6 < cache.bytes < need < 21 * 20 * 6 + 5 * 250  # response tokens, rows
    assert cached_teacher_module.token_bytes(config, "cpu", cache) == 120
    # What a step gets of the batch is what the loaded teacher gives it, but for the last bits.
    ids, labels = map(list, zip(*rows(5), strict=True))
    batch = teacher_batch(ids, labels)
    kept = teacher.states(batch | said_of_rows(map(cache.read, ids, labels))).top
    given = live.states(batch).top
    assert kept is not None and given is not None
    index = batch["teacher_index"]
    near = [top.log_probs.flatten(0, 1)[index] for top in (kept, given)]
    assert torch.allclose(*near, rtol=0, atol=1e-4)
    same = [top.token_ids.flatten(0, 1)[index] for top in (kept, given)]
    assert same[0].eq(same[1]).float().mean() > 0.95  # those of almost the same probability


def test_an_interrupted_filling_of_tokens_goes_on(tmp_path: Path) -> None:
    """By whatever says what is kept: a server does, too."""
    cache = TeacherCache(tmp_path / "tokens", IDENTITY, "top_4")
    asked: list[int] = []

    def said(some: Any) -> list[TopTokens]:
        asked.extend(len(ids) for ids, _ in some)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return [
            TopTokens(ids[1:][labels[1:] != -100, None].expand(-1, 4), torch.zeros(n, 4) - n)
            for ids, labels in some
            for n in [int(labels[1:].ne(-100).sum())]
        ]

    def filled() -> None:
        missing, weights = missing_rows(cache, rows(12)), weights_of_probabilities(300, None)
        fill_by(said, cache, missing, weights, lambda rows: 0, batch_tokens=1)

    with pytest.raises(KeyboardInterrupt):
        filled()
    assert len(cache) == 6
    cache = TeacherCache(cache.folder, IDENTITY, "top_4")
    filled()
    assert len(cache) == 12 and asked == [*range(6, 13), *range(12, 18)]
    for ids, labels in rows(12):
        found = cache.read(ids, labels)
        assert isinstance(found, TopTokens)
        assert torch.equal(found.token_ids[:, 0].long(), ids[1:][labels[1:] != -100])


# Kills, locks, full disks ------------------------------------------------------------------------


@pytest.mark.slow
def test_training_from_a_cache_of_every_token_is_training_with_the_teacher(
    recipe: Callable[..., dict[str, Any]],
    write: Callable[[dict[str, Any]], Path],
    train: Callable[[dict[str, Any]], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = recipe({}, max_steps=2, val_set_size=0.2, eval_steps=2)
    teacher = settings["dwakd"]["teacher"]
    # A teacher that is there spells the student's tokens too, which likeliest tokens don't say.
    method = {"variant": "mapped", "loss": {"inside_tokens": "label"}}
    settings |= {"dwakd": {"teacher": teacher} | method}
    report = run_cache(write(settings), "--top-k", "5000")
    assert (report["top_k"], report["dtype"], report["rows_computed"]) == (5000, None, 40)
    live = train(settings)

    def nothing(*_: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(cached_teacher_module, "load_teacher", nothing)
    block = {"teacher": teacher | {"cache": report["folder"], "top_k": 5000}} | method
    cached = train(settings | {"dwakd": block, "output_dir": str(tmp_path / "cached")})
    compared = 0
    for line, other in zip(cached, live, strict=True):
        for name in ("loss", "student_kd", "eval_student_kd", "teacher_ce", "gate"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-4), name
                compared += 1
        assert line.get("label_in_top_k", 1.0) == 1.0 and "label_in_top_k" not in other
    assert compared >= 5 and any("label_in_top_k" in line for line in cached)
