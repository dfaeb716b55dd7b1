"""Sampled text on both sides: each byte once, and what pairs has read the same bytes."""

from __future__ import annotations

import json
import random
from itertools import accumulate
from typing import Any

import pytest
from transformers import AutoTokenizer

from dwakd_plugin.data.sampled_rows import Row, answer_begins, answered
from dwakd_plugin.tokenizers.alignment import TokenAligner
from dwakd_plugin.tokenizers.pair import ByteCutter, vocabulary_bytes
from dwakd_plugin.tokenizers.sampled import SampledText
from tests.conftest import SHARED

PAIRS = [("gpt2", "qwen1.5"), ("tinyllama", "mistral-v0.1"), ("smollm2-instruct", "tinyllama")]


def load(name: str) -> Any:
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


def sampled(text: bytes, vocabulary: dict[bytes, int], draw: random.Random) -> list[int]:
    """Tokens of these bytes as a model may sample them: of those that fit, any is the next."""
    ids, at = [], 0
    while at < len(text):
        sizes = [n for n in range(1, 13) if text[at : at + n] in vocabulary and at + n <= len(text)]
        size = draw.choice(sizes)
        ids.append(vocabulary[text[at : at + size]])
        at += size
    return ids


def check_pair(student: str, teacher: str, samples: int) -> None:
    student_tokenizer, teacher_tokenizer = load(student), load(teacher)
    text_of = SampledText(student_tokenizer, teacher_tokenizer)
    pieces = [ByteCutter(each, "one").pieces for each in (student_tokenizer, teacher_tokenizer)]
    vocabulary = vocabulary_bytes(student_tokenizer)
    lines = (SHARED / "texts_500.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    draw, paired, tokens = random.Random(student + teacher), 0, 0
    prompt = teacher_tokenizer("### Instruction:\nSay it.\n\n### Response:\n")["input_ids"]
    for number in range(samples):
        whole = texts[number % len(texts)]
        begin = draw.randrange(max(1, len(whole) - 1))
        text = whole[begin : begin + draw.randint(1, 160)]
        sample = sampled(text.encode(), vocabulary, draw)
        said = text_of.text(sample)
        folds = "<0x0A>" in student_tokenizer.get_vocab()
        assert said == (text.replace("▁", " ") if folds else text)
        theirs = text_of.behind(prompt, said)
        assert theirs is not None
        ends = [student_tokenizer.eos_token_id], [teacher_tokenizer.eos_token_id]
        pairs = text_of.pairs([*sample, *ends[0]], [*theirs, *ends[1]])
        assert pairs[-1] == (len(sample), len(theirs)), "the ends"
        bounds, read = [], []
        for table, ids in zip(pieces, (sample, theirs), strict=True):
            data = b"".join(table[index] for index in ids)
            spare = len(data) - len(said.encode())
            assert spare in (0, 1) and data.decode() == " " * spare + said  # each byte once
            offsets = [0, *accumulate(len(table[index]) for index in ids)]
            bounds.append([offset - spare for offset in offsets])
            read.append(data[spare:])
        assert read[0] == read[1]
        assert [i for i, _ in pairs] == sorted({i for i, _ in pairs})
        assert [j for _, j in pairs] == sorted({j for _, j in pairs})
        for i, j in pairs[:-1]:
            assert max(0, bounds[0][i]) == max(0, bounds[1][j]), "both have read the same"
            assert bounds[0][i + 1] <= bounds[1][j + 1], "the teacher's begins with the student's"
        paired, tokens = paired + len(pairs) - 1, tokens + len(sample)
    assert paired > 0.2 * tokens


needs_real = pytest.mark.skipif(not SHARED.is_dir(), reason="needs real tokenizers")


@needs_real
@pytest.mark.parametrize(("student", "teacher"), PAIRS[:1])
def test_each_byte_once_on_both_sides(student: str, teacher: str) -> None:
    check_pair(student, teacher, 60)


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_each_byte_once_on_2000_samples(student: str, teacher: str) -> None:
    check_pair(student, teacher, 2000)


@needs_real
@pytest.mark.parametrize("student", ["gpt2", "tinyllama", "qwen1.5"])
@pytest.mark.parametrize("teacher", ["gpt2", "tinyllama", "mistral-v0.1"])
@pytest.mark.parametrize("apart", [True, False])
def test_the_given_answer_is_read_as_it_was_given(student: str, teacher: str, apart: bool) -> None:
    """Whether a row's answer is tokenised by itself (`alpaca`) or with its prompt (`[/INST] `)."""
    rows = []
    for name in (student, teacher):
        tokenizer = load(name)
        prompt = tokenizer("[INST] Why? [/INST]" if not apart else "Why?\n")["input_ids"]
        if apart:
            ids = prompt + tokenizer("Because it is.", add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer("[INST] Why? [/INST] Because it is.")["input_ids"]
        assert ids[: len(prompt)] == prompt
        end = tokenizer.eos_token_id
        rows += [[*ids, end], [-100] * len(prompt) + [*ids[len(prompt) :], end]]
    row = Row(*rows, source=0)
    begin, other = answer_begins(row.student_labels), answer_begins(row.teacher_labels)
    ends = {row.teacher_ids[-1]: row.student_ids[-1]}
    text = SampledText(load(student), load(teacher), ends)
    own = answered(row, row.student_ids[begin:], True, text, row.teacher_ids[-1], 256)
    assert own is not None
    assert (own.student_ids, own.teacher_ids) == (row.student_ids, row.teacher_ids)
    aligner = TokenAligner(load(student), load(teacher), whole=False, ends=ends)
    pairs = aligner.pairs(*rows)
    assert begin is not None and other is not None and pairs
    learnt = [own.student_labels, own.teacher_labels]
    places = [[i for i, label in enumerate(labels) if label != -100] for labels in learnt]
    assert [(i - begin, j - other) for i, j in zip(*places, strict=True)] == pairs
