"""ROUGE-L, bits per byte, nearness to the teacher, intervals: each against another way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer

from dwakd_plugin.evaluate import figures as evaluation
from dwakd_plugin.evaluate.figures import (
    Amounts,
    bits_per_byte,
    common_places,
    interval,
    jensen_shannon,
    mean_of,
    mostly_unseen,
    nearness,
    read,
    rouge_l,
    structure_distance,
    symbols_of,
    without_words,
    words,
)
from dwakd_plugin.evaluate.held_out import held_out_bits_per_byte
from dwakd_plugin.evaluate.rows import Encoded, bytes_of_tokens, token_ends
from tests.conftest import ROWS
from tests.evaluate.conftest import TEXTS

evaluation.keep_stderr_open()  # rouge-score's scorer is imported above


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
    assert bits_per_byte(readings[:1], ["größte 数"]).below == [12]


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
    assert common_places([0, 2], [0, 2], 2) == [(1, 1)]
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


def test_words_of_other_scripts_count_beside_rouge() -> None:
    one, other = "Столица Франции — Париж, 2024.", "Население Земли растёт с 2024 года."
    assert rouge_l([one], [(other,)])[0] == 100  # of one figure alone
    assert 0 < rouge_l([one], [(other,)], unicode_words=True)[0] < 30
    assert rouge_l([one.upper()], [(one,)], unicode_words=True)[0] == pytest.approx(100)
    assert words("हिन्दी में 数据 ภาษา größte") == [
        *("हिन्दी", "में", "数", "据", "ภ", "า", "ษ", "า", "größte".casefold()),
    ]
    rows = [(one,), ("Die größte der 3",), ("数据", "two words here"), ("数据 a",)]
    assert mostly_unseen(rows) == 2
