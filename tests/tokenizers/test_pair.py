"""Each byte of a text belongs to one token; figures of a pair against independent ones."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dwakd_plugin.errors import UserError
from dwakd_plugin.tokenizers.figures import TextFigures, measure, vocabulary_figures
from dwakd_plugin.tokenizers.pair import ByteCutter, Changed, Cut, PairCut, cut_both
from tests.conftest import SHARED
from tests.tokenizers.small_tokenizers import (
    AWKWARD,
    LOSSLESS,
    TEXT,
    byte_level,
    sentencepiece,
    unigram,
)


@pytest.fixture(scope="module")
def cutters() -> dict[str, ByteCutter]:
    return {name: ByteCutter(build(), "student") for name, build in LOSSLESS.items()}


@settings(max_examples=250, deadline=None)
@given(text=TEXT)
@example(text="1 a")
@example(text=" ▁a</s> b</s></s>▁ c ")
@example(text="a <mask><turn> \u2003 b🎉")
@example(text="<turn>\x1f")
def test_every_byte_is_in_exactly_one_token(cutters: dict[str, ByteCutter], text: str) -> None:
    for name, cutter in cutters.items():
        (cut,) = cutter.cut([text])
        if isinstance(cut, Changed):
            # A token that takes the white space after it may be followed by a ▁, which is none.
            assert "<turn>" in text and "▁" in text, (name, text)
            continue
        assert len(cut.ids) == len(cut.ends)
        spans = list(pairwise([0, *cut.ends]))
        assert all(begin <= end for begin, end in spans), (name, text)
        assert (cut.ends or [0])[-1] == len(text.encode()), (name, text)
        # A token without a byte is the space before a run, and so begins one.
        for index, (begin, end) in enumerate(spans):
            if begin == end:
                assert cutter.tokenizer.convert_ids_to_tokens(cut.ids[index]) in ("▁", "Ġ")
                assert index == 0 or cut.ids[index - 1] in cutter.tokenizer.added_tokens_decoder


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_ends_are_where_the_decoded_prefix_ends(cutters: dict[str, ByteCutter], text: str) -> None:
    """The library's decoder, given a prefix of the tokens, writes the text up to the last's end."""
    for name in ("byte-level", "SentencePiece, no space before"):
        if "▁" in text or "<" in text:
            continue  # the decoder writes ▁ as a space, and drops white space at added tokens
        cutter = cutters[name]
        (cut,) = cutter.cut([text])
        assert isinstance(cut, Cut)
        data = text.encode()
        for count, end in enumerate(cut.ends, 1):
            try:
                prefix = data[:end].decode()
            except UnicodeDecodeError:
                continue  # the token ends within a character
            decoded = cutter.tokenizer.backend_tokenizer.decode(cut.ids[:count])
            assert decoded == prefix, (name, text)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_normalised_texts_are_compared_on_the_same_bytes(text: str) -> None:
    teacher, student = NORMALISING
    (pair,) = cut_both(teacher, student, [text])
    assert pair is not None
    for cut in (pair.teacher, pair.student):
        assert (cut.ends or [0])[-1] == len(pair.text.encode())
    normalised = teacher.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    if not any(token in text for token in AWKWARD[:4]):  # added tokens are not normalised
        assert pair.text == normalised


NORMALISING = (
    ByteCutter(byte_level(normalizer=normalizers.NFC()), "teacher"),
    ByteCutter(sentencepiece(own_tokens=False), "student"),
)


def test_a_text_that_loses_something_is_normalised_or_left_out() -> None:
    t5, gpt = ByteCutter(unigram(), "teacher"), ByteCutter(byte_level(), "student")
    texts = ["the\n first  ﬁrst ", "the bakery", "♞"]
    spaces, same, unknown = cut_both(t5, gpt, texts)
    assert spaces is not None and spaces.text == "the first first"
    assert same is not None and same.text == "the bakery"
    assert unknown is None
    figures = measure(t5, gpt, texts)
    assert (figures.texts, figures.normalised, figures.left_out) == (3, 1, 1)
    assert len(figures.teacher_tokens) == 2


def test_figures_of_a_case_by_hand() -> None:
    figures = TextFigures()
    cut = PairCut("abcd", Cut([1, 2], [2, 4]), Cut([5, 6, 7], [1, 2, 4]))
    figures.add("abcd", cut)
    figures.add("", PairCut("", Cut([], []), Cut([], [])))
    totals = figures.as_dict()
    assert totals["length_ratio"]["mean"] == 1.5
    assert totals["boundary_agreement_student"] == 0.666667
    assert totals["boundary_agreement_teacher"] == 1
    assert totals["identical_span_share"] == 0.333333
    assert (totals["texts"], totals["texts_compared"]) == (2, 1)
    assert TextFigures().as_dict()["length_ratio"] is None


@pytest.mark.parametrize(
    "model",
    [models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), models.WordLevel({"a": 0}, "a")],
    ids=["WordPiece", "WordLevel"],
)
def test_other_kinds_are_refused_by_name(model: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(UserError, match=f"The teacher's .* {type(model).__name__} kind"):
        ByteCutter(tokenizer, "teacher")


def test_bpe_that_drops_spaces_is_refused() -> None:
    for suffix in ("", "</w>"):
        model = models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix=suffix)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
        with pytest.raises(UserError, match="</w>" if suffix else "marks spaces neither"):
            ByteCutter(tokenizer, "student")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real tokenizers, which are not part of this")
def test_figures_of_real_pairs() -> None:
    truth = json.loads((SHARED / "pairs_truth.json").read_text())["pairs"]
    lines = (SHARED / "texts_500.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    names = {pair[side] for pair in truth for side in ("teacher", "student")}
    tokenizers = {
        name: AutoTokenizer.from_pretrained(
            SHARED / ("stories260K" if name == "stories260k" else f"tokenizers/{name}")
        )
        for name in sorted(names)
    }
    cutters = {name: ByteCutter(each, "teacher") for name, each in tokenizers.items()}
    for pair in truth:
        teacher, student = pair["teacher"], pair["student"]
        ours = (
            vocabulary_figures(cutters[teacher], cutters[student])
            | measure(cutters[teacher], cutters[student], texts).as_dict()
        )
        theirs: dict[str, Any] = {
            "teacher_vocab_size": pair["teacher_len_tokenizer"],
            "student_vocab_size": pair["student_len_tokenizer"],
            "shared_tokens_exact": pair["exact_string_overlap"],
            "shared_tokens_exact_share_of_student": pair["exact_share_of_student"],
            "shared_tokens_exact_share_of_teacher": pair["exact_share_of_teacher"],
            "shared_tokens_bytes": pair["byte_overlap"],
            "shared_tokens_bytes_share_of_student": pair["byte_share_of_student"],
            "shared_tokens_bytes_share_of_teacher": pair["byte_share_of_teacher"],
            "texts": pair["texts"],
            "texts_left_out": pair["texts_not_byte_aligned"],
            "texts_normalised": 0,
            "common_segments_per_text": pair["common_segments_per_text"],
            "teacher_tokens": pair["teacher_tokens"],
            "student_tokens": pair["student_tokens"],
        }
        for name, value in theirs.items():
            digits = len(str(value).partition(".")[2])
            assert round(ours[name], digits) == value, (teacher, student, name)
        nested = {"length_ratio": pair["ratio_student_over_teacher"]}
        for side in ("student", "teacher"):
            nested[f"boundary_agreement_{side}"] = pair[f"boundary_agreement_{side}"]
        nested["identical_span_share"] = pair["identical_span_share_student"]
        for name, values in nested.items():
            for part, value in values.items():
                if part == "micro":
                    figure = ours[name]
                else:
                    figure = (ours[name] if name == "length_ratio" else ours["per_text"][name])[
                        part
                    ]
                # The truth's last digit: the ratio's percentiles have three, the rest four.
                digits = 4 if part in ("mean", "micro", "corpus") else 3
                assert round(figure, digits) == value, (teacher, student, name, part)
