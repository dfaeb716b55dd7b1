"""Projectors: what shared tokens say of them, and how they are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.projectors import (
    T2S_SCALE,
    HeadFollower,
    Projectors,
    load_projectors,
    save_projectors,
    shared_vocabulary_init,
)
from dwakd_plugin.tokenizers.pair import shared_vocabulary, token_bytes
from tests.conftest import SHARED


def test_shared_vocabulary_init_recovers_maps_that_exist() -> None:
    """Where one model's rows are a linear map of the other's, up to a mean, the fit finds it."""
    generator = torch.manual_seed(0)
    student = torch.randn(500, 6, generator=generator)
    up = torch.randn(6, 9, generator=generator)
    teacher = student @ up + 3.0
    projectors = Projectors(6, 9)
    shared_vocabulary_init(
        projectors,
        student_head=student,
        teacher_head=teacher,
        student_embeddings=student,
        teacher_embeddings=teacher,
    )
    hidden = torch.randn(4, 9, generator=generator)
    with torch.no_grad():
        student_logits = projectors.t2s(hidden) @ student.T / T2S_SCALE
        teacher_logits = hidden @ teacher.T
        # The ridge shrinks the map by a thousandth.
        assert torch.allclose(
            student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), rtol=0.02, atol=0.1
        )
        read = torch.cat([student[:3], student[3:6]], 1)
        key = torch.cat([teacher[:3], teacher[3:6]], 1) - 3.0
        assert torch.allclose(projectors.query(read) * teacher.std(), key, rtol=0.02, atol=0.2)


def test_projector_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    projectors, pair = Projectors(4, 6), {"student": "small", "teacher": "big"}
    file = tmp_path / "dwakd" / "projectors.safetensors"
    save_projectors(projectors.state_dict(), file, pair)
    other = Projectors(4, 6)
    load_projectors(other, file, pair)
    for name, tensor in projectors.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    with pytest.raises(UserError, match="teacher: big in the file, other in this run"):
        load_projectors(other, file, {"student": "small", "teacher": "other"})
    with pytest.raises(UserError, match="shapes"):
        load_projectors(Projectors(5, 6), file, pair)
    with pytest.raises(UserError, match="cannot be read"):
        load_projectors(other, tmp_path / "none.safetensors", pair)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_projectors(other, file, pair)


def test_token_bytes() -> None:
    assert token_bytes("Ã©", byte_level=True) == "é".encode()
    assert token_bytes("é", byte_level=False) == "é".encode()
    assert token_bytes("Ċ", byte_level=True) == token_bytes("<0x0A>", byte_level=False) == b"\n"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real tokenizers, which are not part of this")
def test_shared_vocabulary_of_real_pairs() -> None:
    from transformers import AutoTokenizer

    truth = json.loads((SHARED / "pairs_truth.json").read_text())
    for pair in truth["pairs"]:
        teacher, student = (
            AutoTokenizer.from_pretrained(
                SHARED / ("stories260K" if name == "stories260k" else f"tokenizers/{name}")
            )
            for name in (pair["teacher"], pair["student"])
        )
        assert len(shared_vocabulary(teacher, student)) == pair["byte_overlap"]


def test_s2t_follows_the_head() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(700, size, generator=generator) for size in (6, 9))
    shared = [(index, (7 * index) % 700) for index in range(0, 700, 2)]
    follower = HeadFollower(shared, teacher)
    followed, fitted = Projectors(6, 9), Projectors(6, 9)
    teacher_ids, student_ids = torch.tensor(shared).T
    for head in (student, student * 2 + torch.randn(6, generator=generator)):
        follower.update(followed.s2t, head)
        shared_vocabulary_init(
            fitted,
            student_head=head[student_ids],
            teacher_head=teacher[teacher_ids],
            student_embeddings=head[student_ids],
            teacher_embeddings=teacher[teacher_ids],
        )
        torch.testing.assert_close(followed.s2t.weight, fitted.s2t.weight, rtol=1e-4, atol=1e-6)
        assert not followed.s2t.bias.any()
