"""Which tokens of two tokenizers are the same bytes, and which of the other each begins with."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dwakd_plugin.data.collator import DualCollator
from dwakd_plugin.tokenizers.alignment import TokenAligner, first_tokens, token_map
from dwakd_plugin.tokenizers.ends import paired_ends
from dwakd_plugin.tokenizers.pair import ByteCutter, shared_vocabulary
from tests.conftest import SHARED
from tests.loss.matched_references import Pairs
from tests.tokenizers.small_tokenizers import LOSSLESS, TEXT, byte_level, sentencepiece


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    built = {name: build() for name, build in LOSSLESS.items()}
    return built | {"byte-level, coarser": byte_level(900)}


@pytest.fixture(scope="module")
def cutters(tokenizers: dict[str, Any]) -> dict[str, ByteCutter]:
    return {name: ByteCutter(tokenizer, "student") for name, tokenizer in tokenizers.items()}


@pytest.fixture(scope="module")
def aligners(tokenizers: dict[str, Any]) -> dict[tuple[str, str, bool], TokenAligner]:
    return {
        (one, other, whole): TokenAligner(tokenizers[one], tokenizers[other], whole=whole)
        for one, other in pairwise(tokenizers)
        for whole in (True, False)
    }


def row(*runs: tuple[list[int], bool]) -> tuple[list[int], list[int]]:
    """Ids and labels of a token that nothing predicts, and then runs, each labelled or not."""
    ids, labels = [0], [-100]
    for tokens, labelled in runs:
        ids += tokens
        labels += tokens if labelled else [-100] * len(tokens)
    return ids, labels


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def read_the_same(student: list[bytes], i: int, teacher: list[bytes], j: int) -> bool:
    """Whether the same text stands before two pieces, but for a space that one side begins with."""
    ours, theirs = b"".join(student[:i]), b"".join(teacher[:j])
    whole, other = b"".join(student), b"".join(teacher)
    if whole == other:
        return ours == theirs
    if len(whole) > len(other):
        return ours == b" " + theirs
    return theirs == b" " + ours


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXT)
def test_pairs_are_the_tokens_with_the_same_place_in_the_text(
    cutters: dict[str, ByteCutter],
    aligners: dict[tuple[str, str, bool], TokenAligner],
    text: str,
) -> None:
    """Against the spans of `ByteCutter`, which every byte of the text belongs to once."""
    text = "".join(part for part in text if part not in "<>▁")  # no special tokens, no folded ▁
    for (one, other, whole), aligner in aligners.items():
        cuts = []
        for name in (one, other):
            (cut,) = cutters[name].cut([text])
            spans = list(pairwise([0, *cut.ends]))
            assert b"".join(text.encode()[a:b] for a, b in spans) == text.encode()
            cuts.append((cut.ids, spans))
        (student_ids, student_spans), (teacher_ids, teacher_spans) = cuts
        found = aligner.pairs(*row((student_ids, True)), *row((teacher_ids, True)))
        mine = [cutters[one].pieces[index] for index in student_ids]
        theirs = [cutters[other].pieces[index] for index in teacher_ids]
        expected = [
            (i, j)
            for i, span in enumerate(student_spans)
            for j, their in enumerate(teacher_spans)
            # A space that is put before the text takes no byte of it, and is part of a token.
            if (whole and span == their and mine[i] == theirs[j])
            or (not whole and theirs[j].startswith(mine[i]) and read_the_same(mine, i, theirs, j))
        ]
        assert found == expected, (one, other, text)
        for before, after in pairwise(found):
            assert before[0] < after[0] and before[1] < after[1]
        if whole:
            ours, theirs = (
                {end: place for place, (_, end) in enumerate(spans, 2) if end > 0}
                for spans in (student_spans, teacher_spans)
            )
            ends = aligner.common_ends(*row((student_ids, True)), *row((teacher_ids, True)))
            expected = [(ours[end], theirs[end]) for end in ours if end in theirs]
            # A space before the text that is a token on both sides holds no byte, and comes first.
            assert ends[len(ends) - len(expected) :] == expected, (one, other, text)
            assert len(ends) <= len(expected) + 1


def test_turns_are_compared_each_with_its_own() -> None:
    student, teacher = byte_level(500), sentencepiece(own_tokens=False)
    aligner = TokenAligner(student, teacher)
    s_end, t_end = student.eos_token_id, teacher.eos_token_id

    def both(*parts: tuple[str, str, bool]) -> tuple[list[int], ...]:
        ours = row(*((encode(student, text), labelled) for text, _, labelled in parts))
        theirs = row(*((encode(teacher, text), labelled) for _, text, labelled in parts))
        return *ours, *theirs

    def texts(found: Pairs, sides: tuple[list[int], ...]) -> list[tuple[str, str]]:
        """What the pairs predict, as both sides spell it."""
        kept = [
            [token for token, label in zip(ids[1:], labels[1:], strict=True) if label != -100]
            for ids, labels in (sides[:2], sides[2:])
        ]
        return [
            (
                student.convert_ids_to_tokens(kept[0][i]).replace("Ġ", " "),
                teacher.convert_ids_to_tokens(kept[1][j]).replace("▁", " "),
            )
            for i, j in found
        ]

    # Prompts and templates differ, the second turn begins like the first, and both have ends. The
    # first token of a turn has a space on the teacher's side, which the text has not.
    sides = both(
        ("Q: one? A:", "[user] one? [assistant]", False),
        ("a b the<|end|>", "a b the</s>", True),
        ("Q:", "[user] two? and three? [assistant]", False),
        ("a b in<|end|>\n", "a b in</s>", True),
    )
    assert texts(aligner.pairs(*sides), sides) == [
        *[(" b", " b"), (" the", " the"), ("<|end|>", "</s>")],
        *[(" b", " b"), (" in", " in"), ("<|end|>", "</s>")],
    ]
    # One side is cut short: nothing after it is paired. One word differs: what follows is paired.
    short = both(("", "", False), ("a b the<|end|>", "a b", True))
    assert texts(aligner.pairs(*short), short) == [(" b", " b")]
    other = both(("", "", False), ("a b the in<|end|>", "a b is in</s>", True))
    assert texts(aligner.pairs(*other), other) == [
        (" b", " b"),
        (" in", " in"),
        ("<|end|>", "</s>"),
    ]
    # Where nothing but the prompt ends a turn, the next is compared all the same.
    prompt = ("Q:", "[user] two? [assistant]", False)
    unended = both(("", "", False), ("a b the", "a b", True), prompt, ("a b in", "a b in", True))
    expected = [(" b", " b"), (" b", " b"), (" in", " in")]
    assert texts(aligner.pairs(*unended), unended) == expected
    # What one side says in its first turn and the other in its second is not the same text.
    apart = both(("", "", False), ("a b", "a b in", True), prompt, (" in", " the", True))
    assert texts(aligner.pairs(*apart), apart) == [(" b", " b")]
    # A space that the text begins with is the text's.
    spaced = both(("", "", False), (" a b<|end|>", " a b</s>", True))
    assert texts(aligner.pairs(*spaced), spaced)[:2] == [(" a", " a"), (" b", " b")]
    assert aligner.pairs(*row(), *row()) == []
    only_ends = row(([s_end], True)), row(([t_end], True))
    assert aligner.pairs(*only_ends[0], *only_ends[1]) == [(0, 0)]


@pytest.mark.parametrize(
    ("teacher", "student", "exact", "by_characters"),
    [
        ("qwen1.5", "gpt2", 0.8345, 0.846),
        ("mistral-v0.1", "tinyllama", 0.9016, 0.902),
        ("mistral-v0.1", "gpt2", 0.8651, 0.891),
    ],
)
def test_share_of_paired_tokens_on_real_text(
    teacher: str, student: str, exact: float, by_characters: float
) -> None:
    """`by_characters` is how such shares are easily counted: from a tokenizer's own offsets.

    They count characters, have no place for a space that is put before the text, and repeat a span
    for each token that a character is cut into; and spaces are left aside. That pairs " 1" with the
    "1" after a token that is a space: one model has read the space by then, the other has not.
    """
    file = SHARED / "instructions" / "selfinst_252.jsonl"
    if not file.exists():
        pytest.skip("needs the shared data")
    texts = [json.loads(line)["output"] for line in file.open(encoding="utf-8")]
    sides = [
        AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name) for name in (student, teacher)
    ]
    aligner = TokenAligner(*sides)
    total = pairs = like = 0
    for text in texts:
        ours, theirs = (encode(side, text) for side in sides)
        total += len(ours)
        pairs += len(aligner.pairs(*row((ours, True)), *row((theirs, True))))
        spans: list[list[tuple[int, int]]] = []
        for side in sides:
            encoded = side(text, add_special_tokens=False, return_offsets_mapping=True)
            spans.append(
                [
                    (begin + len(text[begin:end]) - len(text[begin:end].lstrip(" ")), end)
                    for begin, end in encoded["offset_mapping"]
                ]
            )
        like += sum(span in set(spans[1]) for span in spans[0])
    assert pairs / total == pytest.approx(exact, abs=5e-5)
    assert like / total == pytest.approx(by_characters, abs=5e-4)


def test_predictions_are_mapped_by_bytes() -> None:
    teacher, student = sentencepiece(own_tokens=False), byte_level(500)
    found = token_map(teacher, student, len(teacher) + 3)
    assert found[-3:] == [-1] * 3  # rows of the head that aren't tokens
    assert found[teacher.eos_token_id] == student.eos_token_id
    assert found[teacher.convert_tokens_to_ids("▁the")] == student.convert_tokens_to_ids("Ġthe")
    assert found[teacher.convert_tokens_to_ids("<0x0A>")] == student.convert_tokens_to_ids("Ċ")
    shared = dict(shared_vocabulary(teacher, student))
    mapped = {index: token for index, token in enumerate(found) if token >= 0}
    assert mapped == shared | {teacher.eos_token_id: student.eos_token_id}


@pytest.mark.parametrize("student", ["byte-level", "sentencepiece"])
def test_predictions_are_mapped_to_the_token_that_they_begin_with(student: str) -> None:
    """Each token in a text of its own: what the student's tokenizer makes of it comes first."""
    teacher, own = byte_level(900), {"byte-level": byte_level, "sentencepiece": sentencepiece}
    small = own[student](300) if student == "byte-level" else own[student](own_tokens=False)
    found = first_tokens(teacher, small, len(teacher) + 2)
    same = token_map(teacher, small, len(teacher) + 2)
    assert found[-2:] == [-1] * 2 and found[teacher.eos_token_id] == small.eos_token_id
    pieces, theirs = (ByteCutter(side, "student").pieces for side in (small, teacher))
    longer = 0
    for index, token in enumerate(found[:-2]):
        if same[index] >= 0:
            assert token == same[index]
        elif token >= 0:
            longer += 1
            assert theirs[index].startswith(pieces[token]), (theirs[index], pieces[token])
            text = "x\n" + theirs[index].decode()
            if not text[2].isspace() or text[3:4].isalpha():
                spelled = [pieces[each] for each in encode(small, text)]
                assert pieces[token] in spelled[1:]
    assert longer > 20
    unmapped = [theirs[index] for index, token in enumerate(found[:-2]) if token < 0]
    assert len(unmapped) < 0.1 * len(teacher), unmapped


def with_merges(*merges: tuple[str, str]) -> Any:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_a_token_that_joins_what_is_before_it_is_cut_after_something_else() -> None:
    """After a line break, the student would take the first of two more for its own."""
    student = with_merges(("Ċ", "Ċ"))
    teacher = with_merges(("Ċ", "Ċ"), ("ĊĊ", "t"))
    found = first_tokens(teacher, student, len(teacher))
    longer = found[teacher.convert_tokens_to_ids("ĊĊt")]
    assert student.convert_ids_to_tokens(longer) == "Ċ"


def chat_rows(student: Any, teacher: Any) -> list[dict[str, Any]]:
    rows = []
    for index, said in enumerate(["the first one", "in a sentence.", "the", "größte 数 of all"]):
        sides = {}
        for prefix, side, prompt in (
            ("", student, "Say:"),
            ("teacher_", teacher, "User: say. Bot:"),
        ):
            end = [side.eos_token_id]
            ids, labels = row(
                (encode(side, prompt * (index + 1)), False),
                (encode(side, said) + end, True),
                (encode(side, prompt), False),
                (encode(side, "and " + said) + end, True),
            )
            sides |= {f"{prefix}input_ids": ids, f"{prefix}labels": labels}
        rows.append(sides | {"attention_mask": [1] * len(sides["input_ids"]), "source_row": index})
    return rows


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_batches_have_the_same_pairs_however_they_are_laid_out(padding_side: str) -> None:
    student, teacher = byte_level(700), sentencepiece(own_tokens=False)
    student.pad_token = student.eos_token
    student.padding_side = padding_side
    collator = DualCollator(student, aligner=TokenAligner(student, teacher))
    rows = chat_rows(student, teacher)
    batch = collator(rows)
    spelled = []
    for side, tokenizer in (("student", student), ("teacher", teacher)):
        ids = batch["input_ids" if side == "student" else "teacher_input_ids"].flatten()
        places = batch[f"{side}_positions"].flatten()[batch[f"{side}_pairs"]]
        pieces = ByteCutter(tokenizer, side).pieces
        spelled.append([pieces[token] for token in ids[places + 1].tolist()])
    assert len(spelled[0]) > 20
    for ours, theirs in zip(*spelled, strict=True):
        assert ours.lstrip() == theirs.lstrip() or (ours, theirs) == (b"<|end|>", b"</s>")
    packed = collator([rows])
    for side in ("student", "teacher"):
        assert torch.equal(packed[f"{side}_pairs"], batch[f"{side}_pairs"])
    # Alone, each row has the pairs that it has among others.
    counted = []
    for each in rows:
        alone = collator([each])
        counted.append(len(alone["student_pairs"]))
    S = batch["student_positions"].shape[1]
    assert counted == torch.bincount(batch["student_pairs"] // S, minlength=len(rows)).tolist()


def with_tokens(tokens: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these tokens beside the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *tokens, "<|end|>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def test_a_token_that_no_text_is_cut_into_is_not_taught() -> None:
    """The student has `abc`, and its merges never arrive at it: its labels say `ab`, then `c`."""
    merges = [("a", "b"), ("ab", "c")]
    teacher = with_tokens(["ab", "abc"], merges)
    student = with_tokens(["ab", "abc"], merges[:1])
    ids = {token: teacher.convert_tokens_to_ids(token) for token in ("ab", "abc", "<|end|>")}
    own = {token: student.convert_tokens_to_ids(token) for token in ("ab", "abc", "<|end|>")}
    found = first_tokens(teacher, student, len(teacher))
    assert found[ids["abc"]] == own["ab"]
    assert found[ids["ab"]] == own["ab"]
    assert found[ids["<|end|>"]] == own["<|end|>"]
    assert token_map(teacher, student, len(teacher))[ids["abc"]] == own["abc"]


def test_a_head_may_have_fewer_rows_than_its_tokenizer_has_tokens() -> None:
    teacher = with_tokens(["ab"], [("a", "b")])
    teacher.add_special_tokens({"additional_special_tokens": ["<|beyond|>"]})
    student = with_tokens(["ab"], [("a", "b")])
    student.add_special_tokens({"additional_special_tokens": ["<|beyond|>"]})
    rows = len(teacher) - 1
    for counterparts in (token_map, first_tokens):
        found = counterparts(teacher, student, rows)
        assert len(found) == rows
        assert found[teacher.eos_token_id] == student.eos_token_id


def test_what_ends_a_turn_is_taught_whatever_it_is_called() -> None:
    """Gemma's end of turn isn't its end of sequence; the student's isn't special at all."""
    teacher = with_tokens(["ab"], [("a", "b")])
    student = with_tokens(["ab"], [("a", "b")])
    teacher.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    student.add_tokens(["<|im_end|>", "  "])
    theirs, own, blank = len(teacher) - 1, len(student) - 2, len(student) - 1
    token = student.convert_tokens_to_ids("ab")
    ours, others = [-100, token, own], [-100, token, theirs]
    rows = [
        {"labels": ours, "teacher_labels": others},
        {"labels": [*ours, -100], "teacher_labels": others},
        {"labels": [*ours[:-1], blank], "teacher_labels": others},
        {"labels": ours, "teacher_labels": [-100] * 3},
    ]
    ends = paired_ends(rows, student, teacher)
    assert ends == {theirs: own}
    none = {"labels": [1, 1], "teacher_labels": [1, 1]}
    assert paired_ends([rows[2], none], student, teacher) == {}

    for counterparts in (token_map, first_tokens):
        found = counterparts(teacher, student, len(teacher), ends)
        assert found[theirs] == own
        assert found[teacher.eos_token_id] == student.eos_token_id
        assert counterparts(teacher, student, len(teacher))[theirs] == -1
    aligner = TokenAligner(student, teacher, whole=False, ends=ends)
    assert aligner.pairs(ours, ours, others, others) == [(0, 0), (1, 1)]
