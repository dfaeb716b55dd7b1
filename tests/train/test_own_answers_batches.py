"""The student's own answers in packed rows, in several processes, and beside a cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dwakd_plugin.data.collator import split_batch
from dwakd_plugin.data.sampled_rows import OWN_ROWS, given_labels, rows_of
from tests.own_answers_pair import OWN, Pair
from tests.runs import losses, weights

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


# Packed rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed_len", [None, 150])
def test_packed_rows_have_the_loss_and_gradients_of_unpacked_ones(
    lab: Path, packed_len: int | None
) -> None:
    """In one sequence, as flash attention has them, or in several."""
    plain = Pair(lab / "student", 12, share=0.75, max_new_tokens=2)
    packed = Pair(lab / "student", 12, packed_len=packed_len, share=0.75, max_new_tokens=2)
    features = [row.feature() for row in rows_of(packed.batch)]
    before = dict(packed.collator([features[:5], features[5:]]))
    assert rows_of(before) == rows_of(plain.batch)
    (expected,) = plain.own.put_into([plain.batch], 0, plain.student)
    (found,) = packed.own.put_into([before], 0, packed.student)
    assert "position_ids" in found and "attention_mask" not in found
    made, wanted = (
        sorted(rows_of(batch), key=lambda row: row.source) for batch in (found, expected)
    )
    assert made == wanted and 2 < sum(row.own for row in made) <= 9
    sequences = len(found["input_ids"])
    assert sequences == 1 if packed_len is None else sequences > 1

    figures = []
    for pair, batch in ((plain, expected), (packed, found)):
        student, _, own = pair.sides(batch, batch[OWN_ROWS].tolist())
        logits = student.head.logits(student.hidden)
        assert student.labels is not None
        given = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), student.labels.flatten(), reduction="sum"
        )
        gradients = torch.autograd.grad(own + given, [*pair.student.parameters()])
        labels = given_labels(batch)[:, 1:].ne(-100).sum()
        figures.append([own.detach(), given.detach(), labels, *gradients])
    for one, other in zip(*figures, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_longer_answers_make_more_packs(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(lab / "student", 12, packed_len=150, share=1.0, max_new_tokens=90)
    features = [row.feature() for row in rows_of(pair.batch)]
    before = dict(pair.collator([features[:6], features[6:]]))
    answer = [*pair.tokenizer("the cat sat on the mat. " * 8)["input_ids"]]
    answer = [*answer[:80], pair.tokenizer.eos_token_id]
    monkeypatch.setattr(
        pair.own, "_sample", lambda flat, chosen, *_: dict.fromkeys(chosen, (answer, True))
    )
    (found,) = pair.own.put_into([before], 0, pair.student)
    rows = rows_of(found)
    assert sorted(row.source for row in rows) == sorted(row.source for row in rows_of(before))
    own = [row for row in rows if row.own]
    assert len(own) > 5 and all(row.student_ids[-len(answer) :] == answer for row in own)
    assert found["input_ids"].shape[0] > before["input_ids"].shape[0]
    assert found["input_ids"].shape[1] <= max(150, *(len(row.student_ids) for row in rows))


@pytest.mark.slow
def test_a_packed_run_samples_and_resumes_exactly(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    keys = recipe(
        {"variant": "mapped", "own_answers": OWN, "teacher": {"cache": str(tmp_path / "states")}},
        sample_packing=True, micro_batch_size=1, attn_implementation="sdpa", sequence_len=512,
    )  # fmt: skip
    log = [line for line in train(keys) if "loss" in line]
    assert any("own_divergence" in line for line in log[1:])
    whole, resumed = Path(keys["output_dir"]), tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(keys | {"output_dir": str(resumed), "auto_resume_from_checkpoints": True})
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# Several processes --------------------------------------------------------------------------------


def test_no_two_processes_draw_alike(lab: Path) -> None:
    drawn, chosen = [], []
    for rank in range(2):
        pair = Pair(lab / "student", 12, rank=(rank, 2), share=0.5, max_new_tokens=2)
        (batch,) = pair.own.put_into([pair.batch], 0, pair.student)
        chosen.append(batch[OWN_ROWS].tolist())
        whole = Pair(lab / "student", 12, rank=(rank, 2), share=1.0, max_new_tokens=2)
        (batch,) = whole.own.put_into([whole.batch], 0, whole.student)
        drawn.append([row.student_ids for row in rows_of(batch)])
    assert chosen[0] != chosen[1] and drawn[0] != drawn[1]


# A cache of the given answers --------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_says_the_given_rows_and_the_teacher_reads_its_own(lab: Path, whole: bool) -> None:
    """Of a whole batch, and of one with own answers alone."""
    live = Pair(lab / "student", 12, share=0.5, max_new_tokens=2)
    asked: list[Tensor] = []

    def kept(ids: Tensor, labels: Tensor) -> Tensor:
        asked.append(ids)
        states = live.model.model(input_ids=ids[None]).last_hidden_state[0]
        return states[:-1][labels[1:] != -100].detach()

    cached = Pair(lab / "student", 12, kept, share=0.5, max_new_tokens=2)
    asked.clear()
    (expected,) = live.own.put_into([live.batch], 0, live.student)
    (found,) = cached.own.put_into([cached.batch], 0, cached.student)
    assert rows_of(found) == rows_of(expected)
    assert [ids.tolist() for ids in asked] == [
        row.teacher_ids for row in rows_of(found) if not row.own
    ]
    if not whole:
        features = [row.feature() for row in rows_of(found) if row.own]
        expected, found = (pair.collator([*map(dict, features)]) for pair in (live, cached))
        assert "teacher_hidden" not in found
    own = found[OWN_ROWS].tolist()
    assert len(own) > 2
    read = found["teacher_live"]
    assert read["rows"].tolist() == own and len(read["teacher_input_ids"]) == len(own)
    runs = (live, expected), (cached, found)
    read_by = [pair.teacher.states(split_batch(batch)[0]) for pair, batch in runs]
    hidden = (states.hidden for states in read_by)
    for length, one, other in zip(read_by[0].lengths.tolist(), *hidden, strict=True):
        torch.testing.assert_close(one[:length], other[:length], rtol=1e-12, atol=1e-12)
    losses = [pair.judged(batch, own) for pair, batch in runs]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_a_run_with_a_cache_learns_the_same(
    recipe: Recipe, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, own: dict[str, Any], **teacher: Any) -> list[float]:
        block = {"own_answers": own, "teacher": teacher, "variant": "mapped"}
        return losses(train(recipe(block, output_dir=str(tmp_path / name), max_steps=3)))

    own, cache = OWN | {"start_after": 0}, str(tmp_path / "states")
    live = run("live", own)
    first, again = run("first", own, cache=cache), run("again", own, cache=cache)
    assert first == pytest.approx(live, rel=1e-5)  # other batches in the teacher's forward
    assert again == first
    assert f"{cache}, for given answers; the teacher is loaded all the same" in caplog.text
    assert "serves next to nothing" not in caplog.text
    run("all", own | {"share": 1.0}, cache=cache)
    assert "serves next to nothing" in caplog.text
