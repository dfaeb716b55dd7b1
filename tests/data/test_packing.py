"""Sample packing: the same loss as unpacked, rows that do not see each other, whole runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from dwakd_plugin.data.collator import DISTILLATION_KEYS, DualCollator
from dwakd_plugin.data.packing import check_packing, pair_lengths
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import dwakd_loss
from dwakd_plugin.models.batches import pack
from dwakd_plugin.models.causal_lm import embedding_table, output_head
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.models.student import student_states
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.recipe.schema import LossConfig, SoftDTWConfig
from tests.runs import TERMS, losses, weights

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


def made_rows(count: int, student_vocab: int, teacher_vocab: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)

    def ids(length: int, vocab: int) -> list[int]:
        return torch.randint(1, vocab, (length,), generator=generator).tolist()

    rows = []
    for index in range(count):
        student = ids(6 + 5 * (index % 4), student_vocab)
        teacher = ids(9 + 4 * (index % 3), teacher_vocab)
        # Every third row has no prompt: its first token has a label, which nothing predicts.
        prompt = 0 if index % 3 == 0 else 3
        rows.append(
            {
                "input_ids": student,
                "attention_mask": [1] * len(student),
                "labels": [-100] * prompt + student[prompt:],
                "teacher_input_ids": teacher,
                "teacher_labels": [-100] * prompt + teacher[prompt:],
                "source_row": index,
            }
        )
    return rows


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("teacher_sequence_len", [None, 40])
def test_loss_and_gradients_are_those_of_unpacked_rows(
    lab: Path, padding_side: str, teacher_sequence_len: int | None
) -> None:
    student = AutoModelForCausalLM.from_pretrained(lab / "student", dtype=torch.float64)
    teacher_model = AutoModelForCausalLM.from_pretrained(lab / "teacher", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(lab / "student")
    tokenizer.padding_side = padding_side
    teacher = Teacher(
        embedding_table(teacher_model),
        output_head(teacher_model),
        teacher_model,
        parameters=0,
        attention="",
        precision="",
    )
    torch.manual_seed(0)
    projectors = Projectors(24, 40).double()
    collator = DualCollator(tokenizer, teacher_sequence_len=teacher_sequence_len)
    rows = made_rows(7, 300, 300)

    def loss(features: list[Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
        batch = collator(features)
        own = {key: batch.pop(key) for key in DISTILLATION_KEYS if key in batch}
        labels = int((batch["labels"][:, 1:] != -100).sum())
        student.zero_grad()
        projectors.zero_grad()
        terms = dwakd_loss(
            student_states(student, own, **batch),
            teacher.states(own),
            projectors,
            loss=LossConfig(),
            soft_dtw=SoftDTWConfig(),
            gamma=1.0,
        )
        assert labels == int(terms.student_tokens)  # what the trainer divides by
        terms.total(LossConfig(), 1.0).backward()
        parameters = [*student.parameters(), *projectors.parameters()]
        return (
            {name: value.detach() for name, value in vars(terms).items()},
            [torch.zeros(()) if p.grad is None else p.grad.clone() for p in parameters],
        )

    terms, gradients = loss(rows)
    for sequences in ([rows], [rows[:3], rows[3:]], [rows[::2], rows[1::2]]):
        packed_terms, packed_gradients = loss(sequences)
        for name, value in terms.items():
            torch.testing.assert_close(packed_terms[name], value, rtol=1e-9, atol=1e-9, msg=name)
        for ours, theirs in zip(packed_gradients, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@given(
    st.lists(st.integers(1, 50), max_size=40),
    st.integers(10, 60),
)
@settings(deadline=None)
def test_packing_keeps_each_row_once_within_the_sequence(lengths: list[int], capacity: int) -> None:
    sequences = pack(lengths, capacity)
    assert sorted(place for places in sequences for place in places) == list(range(len(lengths)))
    for places in sequences:
        total = sum(lengths[place] for place in places)
        assert total <= capacity or len(places) == 1
    # Two sequences of which each is half empty would have been one.
    halves = [1 for places in sequences if 2 * sum(lengths[p] for p in places) <= capacity]
    assert len(halves) <= 1


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 48)), min_size=1, max_size=30),
)
@settings(deadline=None)
def test_pairs_that_fit_the_students_sequence_fit_the_teachers(
    sizes: list[tuple[int, int]],
) -> None:
    rows = Dataset.from_dict(
        {
            "input_ids": [[1] * student for student, _ in sizes],
            "teacher_input_ids": [[1] * teacher for _, teacher in sizes],
            "length": [0] * len(sizes),
        }
    )
    lengths = pair_lengths(rows, 64, 48)["length"]
    assert list(lengths) == [max(one, math.ceil(other * 64 / 48)) for one, other in sizes]
    assert max(lengths) <= 64
    for places in pack(list(lengths), 64):
        assert sum(sizes[place][0] for place in places) <= 64
        assert sum(sizes[place][1] for place in places) <= 48


def gpt2(attention: str) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
            attn_implementation=attention,
        )
    )  # fmt: skip


def mistral(attention: str) -> Any:
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, sliding_window=6, initializer_range=0.3,
            attn_implementation=attention,
        )
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gpt2, mistral])
def test_models_that_keep_packed_rows_apart_pass(make: Any, attention: str) -> None:
    torch.manual_seed(0)
    model = make(attention).train()
    check_packing(model, "The student", "", sequences=2)
    assert model.training


def test_a_model_that_mixes_packed_rows_is_refused() -> None:
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3,
        )
    )  # fmt: skip
    with pytest.raises(UserError, match=r"OPTForCausalLM, attention sdpa\) mixes.*Do this"):
        check_packing(model, "The student", "Do this.")


@pytest.mark.slow
def test_a_packed_run_trains_evaluates_and_resumes_exactly(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    settings = recipe(
        {},
        sample_packing=True,
        micro_batch_size=1,
        attn_implementation="sdpa",
        val_set_size=0.3,
        eval_steps=2,
        sequence_len=512,
        max_steps=6,
    )
    log = train(settings)
    assert set(next(line for line in log if "loss" in line)) >= TERMS
    assert [line for line in log if "eval_loss" in line]
    whole = weights(tmp_path / "out")

    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    again = train(settings | {"auto_resume_from_checkpoints": True})
    assert losses(again) == pytest.approx(losses(log), rel=1e-6)
    resumed = weights(tmp_path / "out")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
