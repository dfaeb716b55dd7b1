"""Answers: drawn from the model's own distribution, the same in any batch, kept if interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate import generation
from dwakd_plugin.evaluate.generation import batches, respond
from dwakd_plugin.evaluate.responses import ResponseStore
from dwakd_plugin.evaluate.rows import Encoded
from dwakd_plugin.models.sampling import NaNLogits, Sampling, draw, uniforms, with_transformers

IDENTITY = {"weights": "abc", "temperature": 1.0}


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    logits = torch.tensor([[2.0, -torch.inf, 0.0, 1.0, -1.0]])
    numbers = torch.tensor(uniforms(10, 3, 20_000))
    for temperature, top_p, expected in (
        (1.0, 1.0, logits.double().softmax(-1)[0]),
        (0.5, 1.0, (logits.double() / 0.5).softmax(-1)[0]),
        # 0.65 and 0.24 are needed to reach 0.8.
        (1.0, 0.8, torch.tensor([[2.0, -torch.inf, -torch.inf, 1.0, -torch.inf]]).softmax(-1)[0]),
    ):
        drawn = draw(logits.expand(len(numbers), -1), numbers, temperature, top_p)
        shares = torch.bincount(drawn, minlength=5) / len(numbers)
        assert shares[1] == 0
        torch.testing.assert_close(shares, expected.float(), atol=0.012, rtol=0)  # 3.5 sigma
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), edges, 1.0, 1.0).tolist() == [0, 4]
    assert draw(logits, edges[1:], 0.0, 1.0).tolist() == [0]


def test_a_model_whose_logits_are_nan_does_not_answer(lab: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab / "student")
    generate = with_transformers(model, Sampling(), [0])
    assert generate([[5, 6]], [(1, 2)], 3)[0].tokens
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(NaNLogits, match="NaN, so it cannot answer"):
        generate([[5, 6]], [(1, 2)], 3)


def test_numbers_depend_on_seed_and_row_and_not_on_how_many_are_asked_for() -> None:
    assert uniforms(10, 3, 50)[:20].tolist() == uniforms(10, 3, 20).tolist()
    assert uniforms(10, 3, 5).tolist() != uniforms(10, 4, 5).tolist()
    assert uniforms(10, 3, 5).tolist() != uniforms(20, 3, 5).tolist()


def test_batches_hold_every_row_once_and_one_limit_each() -> None:
    prompts = {row: [0] * length for row, length in enumerate((3, 9, 4, 9, 7))}
    limits = dict(enumerate((20, 11, 20, 11, 20)))
    plan = batches(prompts, limits, 2)
    assert sorted(row for batch in plan for row in batch) == [0, 1, 2, 3, 4]
    assert all(len({limits[row] for row in batch}) == 1 for batch in plan)
    assert plan == [[4, 2], [0], [1, 3]]


Answer = Callable[..., list[list[generation.Response]]]


@pytest.fixture
def answer(student: tuple[Any, Any], encoded: list[Encoded]) -> Answer:
    """Answers the six prompts under two seeds into a file."""
    model, tokenizer = student
    stop = [tokenizer.eos_token_id]
    sample = with_transformers(model, Sampling(max_new_tokens=12), stop)

    def run(
        file: Path, batch_size: int = 2, generate: Any = sample, identity: Any = IDENTITY
    ) -> list[list[generation.Response]]:
        prompts = {row: one.prompt for row, one in enumerate(encoded)}
        limits = dict(enumerate((12, 12, 12, 12, 5, 12)))
        store = ResponseStore(file, identity)
        return respond(store, generate, tokenizer, prompts, limits, (10, 20), stop, batch_size)

    run.generate = sample  # type: ignore[attr-defined]
    return run


def test_answers_do_not_depend_on_the_batch(tmp_path: Path, answer: Answer) -> None:
    two, whole = (answer(tmp_path / f"{size}.jsonl", size) for size in (2, 6))
    assert two == whole
    assert two[0] != two[1]
    assert two[0][4].tokens <= 5
    assert all(one.tokens == 12 or one.ended for one in two[0][:4])


def test_what_is_drawn_is_the_models_own_distribution(
    student: tuple[Any, Any], encoded: list[Encoded], answer: Answer, tmp_path: Path
) -> None:
    """Token by token, without cache, padding or batch: the first one that passes the number."""
    model, tokenizer = student
    texts = [one.text for one in answer(tmp_path / "answers.jsonl")[1]]
    for row in (0, 3):
        ids = list(encoded[row].prompt)
        for number in uniforms(20, row, 12):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            reached = logits.double().softmax(-1).cumsum(-1)
            ids.append(int((reached <= number).sum()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        new = [i for i in ids[len(encoded[row].prompt) :] if i != tokenizer.eos_token_id]
        assert tokenizer.decode(new, skip_special_tokens=True) == texts[row]


def test_interrupted_answers_end_as_undisturbed_ones(tmp_path: Path, answer: Answer) -> None:
    undisturbed = answer(tmp_path / "whole.jsonl")
    calls = []

    def stops(*arguments: Any) -> Any:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(arguments)
        return answer.generate(*arguments)  # type: ignore[attr-defined]

    file = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(file, generate=stops)
    lines = file.read_bytes().splitlines(keepends=True)
    assert 1 < len(lines) < 13
    # Killed in the midst of a line: of the last batch one row is whole, the other is not.
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert answer(file) == undisturbed
    assert sorted(file.read_bytes().splitlines()[1:]) == sorted(
        (tmp_path / "whole.jsonl").read_bytes().splitlines()[1:]
    )

    def never(*_: Any) -> Any:
        raise AssertionError("all answers are there")

    assert answer(file, generate=never) == undisturbed


def test_memory_that_runs_out_halves_the_batch(tmp_path: Path, answer: Answer) -> None:
    def small(prompts: Any, *more: Any) -> Any:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError
        return answer.generate(prompts, *more)  # type: ignore[attr-defined]

    expected = answer(tmp_path / "one.jsonl", 1)
    assert answer(tmp_path / "halved.jsonl", 6, generate=small) == expected

    def none(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="one row at a time"):
        answer(tmp_path / "none.jsonl", 2, generate=none)


def test_answers_of_another_model_or_data_are_refused(
    tmp_path: Path, answer: Answer, encoded: list[Encoded]
) -> None:
    file = tmp_path / "answers.jsonl"
    answer(file)
    with pytest.raises(UserError, match="weights: 'abc' there, 'xyz' here"):
        answer(file, identity=IDENTITY | {"weights": "xyz"})
    store = ResponseStore(file, IDENTITY)
    assert store.get(10, 0, encoded[0].prompt) is not None
    with pytest.raises(UserError, match="other prompts: row 1 "):
        store.get(10, 0, encoded[1].prompt)
    with (
        store.writing(),
        pytest.raises(UserError, match="Another process"),
        ResponseStore(file, IDENTITY).writing(),
    ):
        pass
    content = file.read_text()
    damaged = content.replace('"ended": false', '"ended": true', 1)
    assert damaged != content
    file.write_text(damaged)
    with pytest.raises(UserError, match=r"damaged in line \d"):
        ResponseStore(file, IDENTITY)
    file.write_text("{}\n")
    with pytest.raises(UserError, match="says nothing of a model"):
        ResponseStore(file, IDENTITY)
