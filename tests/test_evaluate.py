"""`dwakd evaluate`: every figure against another way of computing it, and answers that survive."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dwakd_cli import evaluate as command
from dwakd_cli.main import app, main
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate import figures as evaluation
from dwakd_plugin.evaluate import generation
from dwakd_plugin.evaluate.figures import (
    Amounts,
    bits_per_byte,
    common_places,
    interval,
    jensen_shannon,
    mean_of,
    nearness,
    read,
    rouge_l,
    structure_distance,
    symbols_of,
    without_words,
)
from dwakd_plugin.evaluate.generation import (
    Sampling,
    batches,
    draw,
    respond,
    uniforms,
    with_transformers,
)
from dwakd_plugin.evaluate.held_out import held_out_bits_per_byte
from dwakd_plugin.evaluate.model import Held, find_model, load_config, load_model
from dwakd_plugin.evaluate.responses import ResponseStore
from dwakd_plugin.evaluate.rows import (
    Encoded,
    Format,
    bytes_of_tokens,
    choose_format,
    encode,
    prompt_text,
    read_rows,
    recipe_rows,
    token_ends,
)
from tests.conftest import CHAT_TEMPLATE, ROWS, write_rows

ALPACA = Format("alpaca", "as asked")
IDENTITY = {"weights": "abc", "temperature": 1.0}

evaluation.keep_stderr_open()  # rouge-score's scorer is imported above


@pytest.fixture(scope="module")
def student(lab: Path) -> tuple[Any, Any]:
    """The tiny student and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(lab / "student", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(lab / "student")


@pytest.fixture(scope="module")
def encoded(lab: Path, student: tuple[Any, Any]) -> list[Encoded]:
    tokenizer = student[1]
    return [
        encode(row, ALPACA, tokenizer, [tokenizer.eos_token_id])
        for row in read_rows(lab / "test.jsonl")
    ]


TEXTS = [str(row["output"]) for row in ROWS[:6]]


# ROUGE-L ------------------------------------------------------------------------------------


def test_rouge_l_is_rouge_scores_own_with_the_best_reference() -> None:
    responses = ["The cats were running fast.", "", "nothing alike", "Größe 数"]
    references = [
        ("A dog.", "the cat runs fast", "fast cats"),
        ("some text",),
        ("nothing alike",),
        ("größe",),
    ]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        100 * max(scorer.score(text, response)["rougeL"].fmeasure for text in texts)
        for response, texts in zip(responses, references, strict=True)
    ]
    assert rouge_l(responses, references).tolist() == expected
    assert expected[1] == 0 and expected[2] == 100
    assert without_words([("数据",), ("数", "two")]) == 1


# Reading ------------------------------------------------------------------------------------


def test_bits_are_those_of_one_row_at_a_time(
    student: tuple[Any, Any], encoded: list[Encoded]
) -> None:
    model, _ = student
    together = read(model, encoded, batch_tokens=4096)
    alone = read(model, encoded, batch_tokens=1)
    for (prompt, response), one, other in zip(encoded, together, alone, strict=True):
        ids = [*prompt, *response]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        expected = [
            -math.log2(logits[place - 1].softmax(-1)[ids[place]].item())
            for place in range(len(prompt), len(ids))
        ]
        # float32 through two layers; a batch's shape changes the order of its sums
        np.testing.assert_allclose(one.bits, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.bits, other.bits, rtol=1e-4, atol=1e-5)
        assert one.similarities is None and one.next_bytes is None


def test_bits_per_byte_is_the_quickstarts(
    lab: Path, student: tuple[Any, Any], encoded: list[Encoded]
) -> None:
    readings = read(student[0], encoded)
    found = bits_per_byte(readings, TEXTS)
    assert found.value == pytest.approx(held_out_bits_per_byte(lab / "student", ROWS[:6]), rel=1e-5)
    without = bits_per_byte(readings, TEXTS, end=False)
    ends = sum(each.bits[-1] for each in readings)
    assert found.value - without.value == pytest.approx(ends / found.below.sum())


def test_the_next_byte_sums_the_tokens_that_begin_with_it(
    student: tuple[Any, Any], encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = student
    table = bytes_of_tokens(tokenizer)
    symbols = symbols_of(table, [tokenizer.eos_token_id], model.config.vocab_size)
    monkeypatch.setattr(evaluation, "_LOGITS", 3 * model.config.vocab_size)  # several chunks
    reading = read(model, encoded[:1], symbols)[0]
    prompt, response = encoded[0]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True)
    place = 4  # after the fifth token
    probabilities = output.logits[0, len(prompt) + place].softmax(-1)
    expected = np.zeros(evaluation.SYMBOLS)
    for index, probability in enumerate(probabilities.tolist()):
        if index == tokenizer.eos_token_id:
            expected[evaluation.END] += probability
        elif index < len(table) and table[index]:
            expected[table[index][0]] += probability
        else:
            expected[evaluation.OTHER] += probability
    assert reading.next_bytes is not None and reading.similarities is not None
    np.testing.assert_allclose(reading.next_bytes[place], expected, atol=1e-6)
    assert reading.next_bytes.shape == (len(response) - 1, evaluation.SYMBOLS)
    states = output.hidden_states[-1][0, len(prompt) : -1]
    np.testing.assert_allclose(reading.similarities, states @ states.T, rtol=1e-3, atol=1e-4)


def test_a_padded_head_and_unknown_stops_have_symbols() -> None:
    symbols = symbols_of([b"a", b" b", b"", b"\xc3"], [2, 99], head_rows=6)
    assert symbols.tolist() == [97, 32, evaluation.END, 0xC3, evaluation.OTHER, evaluation.OTHER]


# Student and teacher ------------------------------------------------------------------------


def plain_structure_distance(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """Both distances by loops over the states themselves."""

    def dot(x: Sequence[float], y: Sequence[float]) -> float:
        return sum(a * b for a, b in zip(x, y, strict=True))

    def cosine(x: Sequence[float], y: Sequence[float]) -> float:
        return dot(x, y) / math.sqrt(dot(x, x)) / math.sqrt(dot(y, y))

    n = len(ours)
    by_cosine = by_product = 0.0
    for i in range(n):
        our_sum = sum(dot(ours[i], ours[k]) for k in range(n))
        their_sum = sum(dot(theirs[i], theirs[k]) for k in range(n))
        for j in range(n):
            by_cosine += abs(cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) / n / n
            by_product += (
                abs(dot(ours[i], ours[j]) / our_sum - dot(theirs[i], theirs[j]) / their_sum) / n
            )
    return by_cosine, by_product


def test_structure_distance_is_the_plain_loops() -> None:
    random = np.random.default_rng(0)
    ours, theirs = random.normal(1, 1, (5, 3)), random.normal(1, 1, (5, 8))
    found = structure_distance(ours @ ours.T, theirs @ theirs.T)
    assert found == pytest.approx(plain_structure_distance(ours.tolist(), theirs.tolist()))
    rotation = np.linalg.qr(random.normal(size=(3, 3)))[0]
    turned = 7 * ours @ rotation  # the same structure, larger and turned
    same = structure_distance(ours @ ours.T, turned @ turned.T)
    assert same == pytest.approx((0, 0), abs=1e-12)


def test_jensen_shannon_is_between_0_and_1_bit() -> None:
    p = np.array([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]])
    q = np.array([[0.0, 1.0], [0.5, 0.5], [0.75, 0.25]])
    third = 0.25 * math.log2(0.5) + 0.75 * math.log2(1.5)
    assert jensen_shannon(p, q).tolist() == pytest.approx([1, 0, third])


def test_places_in_common_are_the_same_bytes(lab: Path) -> None:
    text = "größte Liste, 数 and 数据."
    ends = []
    for name in ("student", "teacher"):
        tokenizer = AutoTokenizer.from_pretrained(lab / name)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        table = bytes_of_tokens(tokenizer)
        own = token_ends([*ids, tokenizer.eos_token_id], text, table)
        assert own is not None
        for end, count in zip(own, range(1, len(ids) + 1), strict=True):
            assert text.encode()[:end] == b"".join(table[index] for index in ids[:count])
        ends.append(own)
    places = common_places(*ends, len(text.encode()))
    assert [ends[0][ours] for ours, _ in places] == sorted(set(ends[0]) & set(ends[1]))
    assert ends[0][places[-1][0]] == len(text.encode())


def test_what_a_template_or_a_tokenizer_adds_is_no_place() -> None:
    # A space put before the text, one token of the template after it, and a normalised text.
    assert token_ends([0, 1, 2, 3], "ab", [b" ", b"ab", b"\n", b""]) == [0, 2, 3]
    assert common_places([0, 2, 3], [1, 2], 2) == [(1, 1)]
    assert token_ends([0, 1], "AB", [b"ab", b""]) is None
    assert common_places(None, [1], 1) == []


def test_a_model_is_next_to_itself(student: tuple[Any, Any], encoded: list[Encoded]) -> None:
    model, tokenizer = student
    table = bytes_of_tokens(tokenizer)
    symbols = symbols_of(table, [tokenizer.eos_token_id], model.config.vocab_size)
    side = [
        (reading, token_ends(row.response, text, table))
        for reading, row, text in zip(read(model, encoded, symbols), encoded, TEXTS, strict=True)
    ]
    found = nearness(side, side, TEXTS)
    assert found is not None and found.rows_left_out == 0
    assert found.agreement.value == 1
    assert found.divergence.value == pytest.approx(0, abs=1e-12)
    assert found.cosine.max() == found.inner.max() == 0
    assert nearness([(side[0][0], None)], side[:1], TEXTS[:1]) is None


# Uncertainty --------------------------------------------------------------------------------


def test_intervals_cover_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "RESAMPLES", 500)
    random = np.random.default_rng(1)
    covered = {"mean": 0, "quotient": 0}
    tries = 300
    for _ in range(tries):
        low, high = interval(mean_of(random.exponential(2.0, 80)))
        covered["mean"] += low <= 2 <= high
        below = random.uniform(50, 200, 80)
        low, high = interval(Amounts(1.5 * below + random.normal(0, 20, 80), below))
        covered["quotient"] += low <= 1.5 <= high
    # 95 %, less what percentiles of 80 skewed values lose; 300 tries are within 3 % (2 sigma).
    assert all(0.90 <= count / tries <= 0.985 for count in covered.values()), covered


def test_a_paired_interval_sees_what_two_intervals_hide() -> None:
    random = np.random.default_rng(2)
    hard = random.normal(20, 10, 200)
    first, second = mean_of(hard + random.normal(0.5, 1, 200)), mean_of(hard)
    low, high = interval(first, second)
    assert 0 < low < first.value - second.value < high < 1
    assert interval(first)[0] < interval(second)[1]  # they overlap
    assert interval(first, second) == (low, high)


# Drawing ------------------------------------------------------------------------------------


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


# Answers ------------------------------------------------------------------------------------

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
        pytest.raises(UserError, match="Another evaluation"),
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


# Rows ---------------------------------------------------------------------------------------


def test_rows_of_every_kind_are_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Why?", "output": ["Because.", "So."]},
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "Goodbye"},
            ]
        },
    ]
    one, two, three = read_rows(write_rows(tmp_path / "rows.jsonl", rows))
    assert one.references == ("Because.", "So.")
    assert two.messages == ({"role": "user", "content": "Add\n\n1 2"},)
    assert [m["content"] for m in three.messages] == ["Hi", "Hello", "Bye"]
    assert three.references == ("Goodbye",)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert read_rows(tmp_path / "rows.json") == [one, two, three]
    form = Format("text", "as asked", "Q: {instruction} [{input}]\nA:")
    odd = read_rows(
        write_rows(
            tmp_path / "odd.jsonl", [{"instruction": "{input}?", "input": "{x}", "output": "y"}]
        )
    )[0]
    assert prompt_text(odd, form, None) == "Q: {input}? [{x}]\nA:"


def test_a_prompts_format_is_the_one_that_was_trained_on(lab: Path, tmp_path: Path) -> None:
    rows = read_rows(lab / "test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(lab / "student")
    chatty = AutoTokenizer.from_pretrained(lab / "teacher")
    plain = find_model(str(lab / "student"))
    assert choose_format("auto", rows, plain, tokenizer).kind == "alpaca"
    assert choose_format("auto", rows, plain, chatty).kind == "chat"
    run = tmp_path / "run"
    shutil.copytree(lab / "teacher", run / "checkpoint-3")
    (run / "dwakd").mkdir()
    for data, expected in ((["a (alpaca)"], "alpaca"), (["a (chat_template)"], "chat")):
        (run / "dwakd" / "run.json").write_text(json.dumps({"data": data}))
        form = choose_format("auto", rows, find_model(str(run / "checkpoint-3")), chatty)
        assert form.kind == expected and "trained" in form.why
    (run / "dwakd" / "run.json").write_text(json.dumps({"data": ["a (input_output)"]}))
    with pytest.raises(UserError, match="Give the recipe itself"):
        choose_format("auto", rows, find_model(str(run / "checkpoint-3")), chatty)
    with pytest.raises(UserError, match="has no chat template"):
        choose_format("chat", rows, plain, tokenizer)
    with pytest.raises(UserError, match=r"no \{input\}"):
        choose_format("Q: {instruction}", rows, plain, tokenizer)
    with pytest.raises(UserError, match="nor a file"):
        choose_format("alpca", rows, plain, tokenizer)


def test_a_recipes_rows_are_those_that_training_sees(
    lab: Path, recipe: Callable[..., dict[str, Any]], encoded: list[Encoded]
) -> None:
    settings = recipe(
        {}, test_datasets=[{"path": str(lab / "test.jsonl"), "type": "alpaca", "split": "train"}]
    )
    readers = [
        (find_model(str(lab / name)), tokenizer, [tokenizer.eos_token_id])
        for name in ("student", "teacher")
        for tokenizer in [AutoTokenizer.from_pretrained(lab / name)]
    ]
    texts, (students, teachers) = recipe_rows(settings, readers)
    assert texts == TEXTS
    assert students == encoded
    rows = read_rows(lab / "test.jsonl")
    assert teachers == [encode(row, ALPACA, readers[1][1], readers[1][2]) for row in rows]


def test_held_out_rows_of_a_chat_recipe_without_a_teacher(
    lab: Path, tmp_path: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in ROWS
    ]
    file = write_rows(tmp_path / "chats.jsonl", chats)
    settings = recipe(
        None,
        base_model=str(lab / "teacher"),
        datasets=[{"path": str(file), "type": "chat_template"}],
        val_set_size=5,
        train_on_inputs=True,
    )
    source = find_model(str(lab / "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(lab / "teacher")
    texts, (rows,) = recipe_rows(settings, [(source, tokenizer, [tokenizer.eos_token_id])])
    assert len(texts) == 5
    plain = {row.references[0]: row for row in read_rows(file)}
    for text, row in zip(texts, rows, strict=True):
        assert row == encode(plain[text], Format("chat", ""), tokenizer, [tokenizer.eos_token_id])
        assert tokenizer.decode(row.prompt).endswith("<|im_start|>assistant\n")
    with pytest.raises(UserError, match="no evaluation rows"):
        recipe_rows(settings | {"val_set_size": 0}, [(source, tokenizer, [0])])


# Models -------------------------------------------------------------------------------------


def test_an_adapter_is_its_base_model_with_it(lab: Path, tmp_path: Path, encoded: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(lab / "student", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    source = find_model(str(tmp_path / "adapter"))
    assert source.tokenizer == str(lab / "student")
    held = Held(device="cpu")
    loaded = load_model(source, load_config(source, trust_remote_code=False), held)
    expected = read(adapted.eval(), encoded)
    for one, other in zip(read(loaded, encoded), expected, strict=True):
        np.testing.assert_allclose(one.bits, other.bits, rtol=1e-3, atol=1e-4)


def test_names_are_as_short_as_they_can_be() -> None:
    assert command.short_names(["a/sft", "a/dwakd/", "gpt2"]) == ["sft", "dwakd", "gpt2"]
    assert command.short_names(["a/checkpoint-5", "b/checkpoint-5"]) == [
        "a/checkpoint-5",
        "b/checkpoint-5",
    ]


# The command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worse(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with other weights."""
    folder = tmp_path_factory.mktemp("models") / "worse"
    shutil.copytree(lab / "student", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def arguments(lab: Path, output: Path, *more: str) -> list[str]:
    return [
        *("evaluate", str(lab / "student"), str(lab / "test.jsonl"), "--output", str(output)),
        *("--max-new-tokens", "8", "--seeds", "10,20", *more),
    ]


def test_the_report_is_one_json_object(lab: Path, tmp_path: Path, worse: Path) -> None:
    more = ["--against", str(worse), "--teacher", str(lab / "teacher"), "--json"]
    result = CliRunner().invoke(app, arguments(lab, tmp_path / "out", *more))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert report["rows"] == 6 and report["rows_left_out"] == 0
    assert report["prompt_template"]["kind"] == "alpaca"
    assert report["first_prompt"].startswith("Below is an instruction")
    assert "Below is an instruction" in result.stderr
    student, other, teacher = report["models"]
    assert [one["role"] for one in report["models"]] == ["model", "against", "teacher"]
    for one in (student, other):
        per_seed = one["rouge_l"]["per_seed"]
        assert list(per_seed) == ["10", "20"]
        assert one["rouge_l"]["mean"] == pytest.approx(sum(per_seed.values()) / 2)
        assert one["rouge_l"]["std"] == pytest.approx(np.std(list(per_seed.values()), ddof=1))
        low, high = one["bits_per_byte"]["interval"]
        assert low < one["bits_per_byte"]["value"] < high
        near = one["to_teacher"]
        assert near["rows_compared"] == 6
        assert 0 <= near["next_byte_agreement"]["value"] <= 1
        assert 0 < near["next_byte_divergence_bits"]["value"] < 1
        assert near["structure_cosine"]["q1"] <= near["structure_cosine"]["q3"]
        assert near["structure_inner_product"]["median"] > 0
        assert near["teacher_bits_per_byte_of_samples"]["value"] > 0
    assert "rouge_l" not in teacher and teacher["bits_per_byte"]["value"] > 0
    assert [pair["metric"] for pair in report["paired"]] == ["rouge_l", "bits_per_byte"]
    difference = student["bits_per_byte"]["value"] - other["bits_per_byte"]["value"]
    assert report["paired"][1]["difference"] == pytest.approx(difference)
    assert len(list((tmp_path / "out").glob("responses-*.jsonl"))) == 2


def test_figures_are_those_of_the_files(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is for people; ROUGE-L is what the kept answers have."""
    # Where Rich reads it: a library may have put another mapping in the place of os.environ.
    monkeypatch.setattr(Console, "_environ", {"COLUMNS": "60"})
    result = CliRunner().invoke(app, arguments(lab, tmp_path))
    assert result.exit_code == 0, result.output
    assert "ROUGE-L, 2 seeds" in result.stdout and "First prompt (alpaca" in result.stdout
    wide = [line for line in result.stdout.splitlines() if len(line) > 60]
    assert [line for line in wide if "figures" not in line] == []
    (file,) = tmp_path.glob("responses-student-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    scores = [rouge_l([line["text"]], [(str(ROWS[line["row"]]["output"]),)])[0] for line in lines]
    report = json.loads((tmp_path / "report.json").read_text())
    (one,) = report["models"]
    assert len(lines) == 12
    assert one["rouge_l"]["mean"] == pytest.approx(np.mean(scores))
    assert one["responses"]["mean_tokens"] == np.mean([line["tokens"] for line in lines])


def test_ctrl_c_exits_with_130_and_the_same_command_goes_on(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dwakd(output: str, *more: str) -> Any:
        call = arguments(lab, tmp_path / output, "--json", "--batch-size", "2", *more)
        monkeypatch.setattr(sys, "argv", ["dwakd", *call])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    assert dwakd("whole")[0] == 0
    original = generation.with_transformers
    calls: list[Any] = []

    def stopping(*given: Any) -> Any:
        generate = original(*given)

        def some(*batch: Any) -> Any:
            if len(calls) == 4:
                raise KeyboardInterrupt
            calls.append(batch)
            return generate(*batch)

        return some

    monkeypatch.setattr(generation, "with_transformers", stopping)
    code, said = dwakd("cut")
    assert code == 130 and said.out == "" and "goes on" in said.err
    monkeypatch.setattr(generation, "with_transformers", original)
    code, said = dwakd("cut")
    assert code == 0
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert json.loads(said.out)["models"] == whole["models"]
    # Other sampling is not mixed in, unless the user says so.
    code, said = dwakd("cut", "--top-p", "0.5")
    assert code == 1 and "top_p: 1.0 there, 0.5 here" in said.err
    assert dwakd("cut", "--top-p", "0.5", "--force")[0] == 0


def test_a_recipe_is_data(lab: Path, tmp_path: Path, recipe: Callable[..., dict[str, Any]]) -> None:
    settings = recipe(
        None, test_datasets=[{"path": str(lab / "test.jsonl"), "type": "alpaca", "split": "train"}]
    )
    file = tmp_path / "sft.yml"
    file.write_text(yaml.safe_dump(settings))
    call = arguments(lab, tmp_path / "out", "--metrics", "bits_per_byte", "--json")
    call[2] = str(file)
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prompt_template"]["kind"] == "recipe" and report["rows"] == 6
    assert report["models"][0]["bits_per_byte"]["value"] == pytest.approx(
        held_out_bits_per_byte(lab / "student", ROWS[:6]), rel=1e-5
    )
    assert not list((tmp_path / "out").glob("responses-*"))


def test_rows_beyond_a_models_positions_are_left_out(lab: Path, tmp_path: Path) -> None:
    long = {"instruction": "Why?", "input": "", "output": "word " * 600}
    data = write_rows(tmp_path / "long.jsonl", [ROWS[0], long])
    call = arguments(lab, tmp_path / "out", "--metrics", "bits_per_byte", "--json")
    call[2] = str(data)
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["rows"], report["rows_left_out"]) == (1, 1)
    assert "1 of 2 rows are left out" in result.stderr
    call[2] = str(write_rows(tmp_path / "none.jsonl", [long]))
    assert "No row fits into the 512 positions" in str(CliRunner().invoke(app, call).exception)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere/at/all"}, "cannot be evaluated: no such folder"),
        ({"model": "{lab}"}, "without a model's config.json|holds neither a model"),
        ({"model": "{bare}"}, "has no tokenizer"),
        ({"data": "nothing.jsonl"}, "does not exist"),
        ({"rows": ""}, "is empty"),
        ({"rows": "not json\n"}, "Row 1 of .* is not JSON"),
        ({"rows": '{"instruction": "a", "output": " "}\n'}, "Row 1 of .* has an empty response"),
        ({"rows": '{"instruction": "a"}\n'}, "has no reference"),
        ({"rows": '{"output": "a"}\n'}, "has no `instruction`"),
        ({"rows": '{"messages": [{"role": "user", "content": "a"}]}\n'}, "has no answer"),
        ({"more": ["--teacher", "{lab}/student"]}, "is given twice, as the teacher"),
        ({"more": ["--metrics", "rouge"]}, "choose from rouge_l"),
        ({"more": ["--metrics", "structure"]}, "Name it with --teacher"),
        ({"more": ["--seeds", "1,1"]}, "different whole numbers"),
        ({"more": ["--batch-size", "0"]}, "give auto or a number"),
        ({"more": ["--limit", "0"]}, "give a number from 1"),
        ({"more": ["--top-p", "0"]}, "a top-p from 0.01 to 1"),
        ({"more": ["--device", "cuda:7"]}, "has no such GPU"),
        ({"more": ["--backend", "vllm"]}, "needs vLLM"),
    ],
)
def test_mistakes_are_named(
    lab: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    bare = tmp_path / "models" / "bare"
    bare.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(lab / "student" / name, bare)

    def place(text: str) -> str:
        return text.format(lab=lab, bare=bare)

    data = tmp_path / "rows.jsonl"
    data.write_text(change.get("rows", json.dumps(ROWS[0]) + "\n"))
    call = arguments(lab, tmp_path / "out", *map(place, change.get("more", [])))
    call[1] = place(change.get("model", call[1]))
    call[2] = change.get("data", str(data))
    result = CliRunner().invoke(app, call)
    assert isinstance(result.exception, UserError), result.output
    assert re.search(message, str(result.exception)), str(result.exception)


def test_the_chat_templates_end_of_turn_ends_an_answer(lab: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lab / "teacher")
    tokenizer.chat_template = CHAT_TEMPLATE
    row = read_rows(lab / "test.jsonl")[0]
    prompt, response = encode(row, Format("chat", ""), tokenizer, [])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert response[-1] == end  # and not the line break after it
    assert tokenizer.decode(response[:-1]) == row.references[0]
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
