"""Texts that nobody would write: each byte belongs to one token, and pairs are the same bytes."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dwakd_plugin.tokenizers.alignment import TokenAligner
from dwakd_plugin.tokenizers.pair import ByteCutter, Changed, Cut, cut_both
from tests.conftest import SHARED
from tests.fuzz.cases import cases
from tests.fuzz.texts import TEXTS

FAMILY_NAMES = ["gpt2", "opt", "llama", "llama3", "smollm2", "gemma", "qwen2"]
REAL = SHARED / "tokenizers"


@cache
def _tokenizer(name: str) -> Any:
    from tests.families import FAMILIES

    if name in FAMILIES:
        return FAMILIES[name][0]()
    return AutoTokenizer.from_pretrained(REAL / name)


@cache
def _trained(kind: str, size: int, texts: tuple[str, ...]) -> Any:
    """A tokenizer that learned from these texts alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    settings_ = {"vocab_size": size, "show_progress": False}
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["</s>"],
            **settings_,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            unk_token="<unk>", special_tokens=["<unk>", "</s>"], **settings_
        )
    tokenizer.train_from_iterator(["the end of the line", *texts], trainer)
    unknown = {} if kind == "byte-level" else {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **unknown)


@cache
def _cutter(name: str) -> ByteCutter:
    return ByteCutter(_tokenizer(name), name)


@cache
def _aligner(student: str, teacher: str) -> TokenAligner:
    return TokenAligner(_tokenizer(student), _tokenizer(teacher))


def _check_cut(cutter: ByteCutter, text: str) -> Cut | None:
    """Each byte of the text belongs to one token, and the tokens are its bytes."""
    (cut,) = cutter.cut([text])
    if isinstance(cut, Changed):
        assert cut.text != text
        return None
    data = text.encode()
    assert len(cut.ids) == len(cut.ends)
    assert all(a <= b for a, b in pairwise([0, *cut.ends]))
    assert (cut.ends[-1] if cut.ends else 0) == len(data)
    # Without ▁, which is a space to SentencePiece, every token's bytes stand where it says.
    special = cutter.tokenizer.added_tokens_decoder
    if "▁" not in text:
        for (begin, end), token in zip(pairwise([0, *cut.ends]), cut.ids, strict=True):
            piece = data[begin:end]
            spelt = cutter.pieces[token]
            if token in special:
                assert piece.strip() == spelt.strip()
            else:
                assert spelt in (piece, b" " + piece)
    return cut


def _check_pairs(
    aligner: TokenAligner, student: ByteCutter, teacher: ByteCutter, text: str
) -> None:
    """Pairs are the same bytes, in order, and all of them where no special token is in between."""
    cuts = [_check_cut(cutter, text) for cutter in (student, teacher)]
    ids = [
        cutter.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for cutter in (student, teacher)
    ]
    rows = [([0, *side], [-100, *side]) for side in ids]
    pairs = aligner.pairs(*rows[0], *rows[1])
    for (i, j), (k, m) in pairwise(pairs):
        assert i < k and j < m
    if cuts[0] is None or cuts[1] is None:
        return
    special = [
        any(each in cutter.tokenizer.added_tokens_decoder for each in side)
        for cutter, side in zip((student, teacher), ids, strict=True)
    ]
    if any(special):
        return
    spans = [
        [(end - len(cutter.pieces[token]), end) for token, end in zip(side, cut.ends, strict=True)]
        for cutter, side, cut in zip((student, teacher), ids, cuts, strict=True)
    ]
    if "▁" not in text:
        # Where a row may be cut on both sides: every byte at which a token of each ends.
        ends = aligner.common_ends(*rows[0], *rows[1])
        ours, theirs = (
            {end: place for place, (_, end) in enumerate(side, 2) if end > 0} for side in spans
        )
        expected = [(place, theirs[end]) for end, place in ours.items() if end in theirs]
        assert ends[len(ends) - len(expected) :] == expected
        both = {span: j for j, span in enumerate(spans[1])}
        assert pairs == [(i, both[span]) for i, span in enumerate(spans[0]) if span in both]


@given(text=TEXTS, student=st.sampled_from(FAMILY_NAMES), teacher=st.sampled_from(FAMILY_NAMES))
@cases(40, 5000)
@example(text="▁a ▁", student="llama", teacher="gpt2")
@example(text="</s> x </s>", student="llama", teacher="opt")
@example(text=" </s>", student="gemma", teacher="llama")
@example(text="\0", student="gemma", teacher="gpt2")
def test_tokens_of_each_family_share_out_the_bytes(text: str, student: str, teacher: str) -> None:
    _check_pairs(_aligner(student, teacher), _cutter(student), _cutter(teacher), text)
    (pair,) = cut_both(_cutter(teacher), _cutter(student), [text])
    if pair is not None:
        for cut in (pair.teacher, pair.student):
            assert (cut.ends[-1] if cut.ends else 0) == len(pair.text.encode())


@given(
    texts=st.lists(TEXTS.filter(bool), min_size=1, max_size=3),
    kinds=st.tuples(*[st.sampled_from(["byte-level", "unigram"])] * 2),
    sizes=st.tuples(st.integers(270, 400), st.integers(270, 400)),
)
@cases(10, 600)
def test_tokens_of_any_training_share_out_the_bytes(
    texts: list[str], kinds: tuple[str, str], sizes: tuple[int, int]
) -> None:
    """Two tokenizers, each trained on other texts of the case, on all of them."""
    half = len(texts) // 2
    try:
        student = _trained(kinds[0], sizes[0], tuple(texts[: half + 1]))
        teacher = _trained(kinds[1], sizes[1], tuple(texts[half:]))
    except Exception as error:  # tokenizers raises nothing else where a training has too little
        assume("vocab" not in str(error).lower() and "train" not in str(error).lower())
        raise
    cutters = ByteCutter(student, "student"), ByteCutter(teacher, "teacher")
    aligner = TokenAligner(student, teacher)
    for text in [*texts, "the end of the line"]:
        _check_pairs(aligner, *cutters, text)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs the tokenizers of published models")
@pytest.mark.parametrize(
    ("student", "teacher"),
    [("gpt2", "qwen1.5"), ("tinyllama", "mistral-v0.1"), ("gpt2", "mistral-v0.1")],
)
def test_tokens_of_published_models_share_out_the_bytes(student: str, teacher: str) -> None:
    aligner, cutters = _aligner(student, teacher), (_cutter(student), _cutter(teacher))

    @given(text=TEXTS)
    @cases(50, 1000)
    def published_tokenizers(text: str) -> None:
        _check_pairs(aligner, *cutters, text)

    published_tokenizers()
