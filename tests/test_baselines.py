"""The baselines: exact token alignment, their losses against plain references, and whole runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dwakd_cli.main import app
from dwakd_cli.plan import as_planned
from dwakd_plugin.data.collator import DualCollator
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import LossTerms, alignment_of, dwakd_loss
from dwakd_plugin.loss.divergence import sorted_distance
from dwakd_plugin.models.projectors import HeadFollower, Projectors, shared_vocabulary_init
from dwakd_plugin.recipe.schema import VARIANTS, LossConfig, SoftDTWConfig, parse_recipe
from dwakd_plugin.tokenizers.alignment import TokenAligner, first_tokens, token_map
from dwakd_plugin.tokenizers.pair import ByteCutter, shared_vocabulary
from tests.test_check import LOSSLESS, TEXT, byte_level, sentencepiece
from tests.test_loss import (
    FIGURES,
    TERMS,
    Case,
    Sample,
    assert_same,
    collate,
    gradients,
    make_case,
    reference_divergence,
    reference_soft_dtw,
    single,
)

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]
Pairs = list[tuple[int, int]]
SHARED = Path(__file__).parents[2] / "shared" / "data"
ALL_TERMS = (*TERMS, "uld")
COMPARED = ("paired_ce", "teacher_ce")  # both models' nats for the same text


# ---------------------------------------------------------------------------------------------
# Which tokens are the same bytes


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
    # One side is cut short, or says something else from a byte on: nothing after it is paired.
    short = both(("", "", False), ("a b the<|end|>", "a b", True))
    assert texts(aligner.pairs(*short), short) == [(" b", " b")]
    other = both(("", "", False), ("a b the in<|end|>", "a b is in</s>", True))
    assert texts(aligner.pairs(*other), other) == [(" b", " b")]
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
    assert found[-3:] == [-1] * 3  # rows of the head that are no token
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


# ---------------------------------------------------------------------------------------------
# The losses, against references written plainly: one sample at a time, in loops


def loss_of(variant: str, **settings_: Any) -> LossConfig:
    return LossConfig(**VARIANTS[variant].get("loss", {}) | settings_)


def some_pairs(lengths: list[tuple[int, int]], seed: int) -> list[Pairs]:
    """Ascending, unique, of some of the positions; none of every fourth sample."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, (S, T) in enumerate(lengths):
        most = 0 if index % 4 == 3 else min(S, T)
        count = int(torch.randint(most + 1, (), generator=generator)) if most > 2 else most
        chosen = [
            torch.randperm(size, generator=generator)[:count].sort().values for size in (S, T)
        ]
        found.append(list(zip(*(side.tolist() for side in chosen), strict=True)))
    return found


def some_map(case: Case, pairs: list[Pairs], seed: int) -> Tensor:
    """A third of the teacher's tokens have no counterpart; of the pairs, every other agrees."""
    generator = torch.Generator().manual_seed(seed)
    student_rows, teacher_rows = (
        head.weight.shape[0] for head in (case.student_head, case.teacher_head)
    )
    found = torch.randint(student_rows, (teacher_rows,), generator=generator)
    found[torch.randperm(teacher_rows, generator=generator)[: teacher_rows // 3]] = -1
    for teacher, own in zip(case.teacher, pairs, strict=True):
        for _, j in own[::2]:
            best = case.teacher_head.logits(teacher.hidden[j : j + 1]).argmax()
            projected = case.projectors.t2s(teacher.hidden[j : j + 1])
            found[best] = case.student_head.logits(projected).argmax()
    return found


def evaluate(
    case: Case,
    loss: LossConfig,
    pairs: list[Pairs],
    mapped: Tensor,
    soft_dtw: SoftDTWConfig,
    *,
    order: list[int] | None = None,
    pad: tuple[int, int] = (0, 0),
    fill: float = 0.0,
) -> LossTerms:
    order = list(range(len(case.student))) if order is None else order
    student = collate([case.student[i] for i in order], case.student_head, pad=pad[0], fill=fill)
    teacher = collate([case.teacher[i] for i in order], case.teacher_head, pad=pad[1], fill=fill)
    S, T = student.hidden.shape[1], teacher.hidden.shape[1]
    flat = [(k * S + i, k * T + j) for k, own in enumerate(order) for i, j in pairs[own]]
    ours, theirs = torch.tensor(flat, dtype=torch.long).view(-1, 2).T
    return dwakd_loss(
        replace(student, pairs=ours),
        replace(teacher, pairs=theirs, token_map=mapped),
        case.projectors,
        loss=loss,
        soft_dtw=soft_dtw,
    )


def entropy_of(p: Tensor) -> float:
    return -sum(x * math.log(x) for x in p.tolist())


def reference_exact(
    student: Sample,
    teacher: Sample,
    pairs: Pairs,
    mapped: Tensor,
    case: Case,
    loss: LossConfig,
    soft_dtw: SoftDTWConfig,
) -> dict[str, Tensor]:
    zero = torch.zeros((), dtype=torch.float64)
    terms = dict.fromkeys((*ALL_TERMS, *COMPARED), zero)
    S, T, P, tau = len(student.hidden), len(teacher.hidden), case.projectors, loss.temperature
    fixed, theirs = case.student_head.detached(), case.teacher_head
    for i in range(S):
        p = case.student_head.logits(student.hidden[i : i + 1])[0].softmax(-1)
        terms["ce"] = terms["ce"] - p[student.labels[i]].log()
    if S == 0 or T == 0:
        return terms

    used = []
    for i, j in pairs:
        best = int(theirs.logits(teacher.hidden[j : j + 1])[0].argmax())
        if mapped[best] >= 0:
            used.append((i, j, int(mapped[best])))
    taught, teaching = [], []
    for i, j, target in used:
        z_s = case.student_head.logits(student.hidden[i : i + 1])[0]
        z_t2s = fixed.logits(P.t2s(teacher.hidden[j : j + 1]))[0]
        terms["t2s_ce"] = terms["t2s_ce"] - z_t2s.softmax(-1)[target].log() * S / len(used)
        for name, head, sample, place in (
            ("paired_ce", case.student_head, student, i),
            ("teacher_ce", theirs, teacher, j),
        ):
            p = head.logits(sample.hidden[place : place + 1])[0].softmax(-1)
            terms[name] = terms[name] - p[sample.labels[place]].log()
        if int(z_t2s.argmax()) == target:
            weight = {
                "none": 1.0,
                "entropy": entropy_of(z_s.softmax(-1)),
                "entropy_gate": entropy_of(z_s.softmax(-1)) * float(z_t2s.softmax(-1).max()),
            }[loss.student_weighting]
            p_t2s = (z_t2s / tau).softmax(-1).detach()
            value = reference_divergence(loss.divergence, p_t2s, (z_s / tau).softmax(-1))
            taught.append((weight, value))
        z_t = theirs.logits(teacher.hidden[j : j + 1])[0].detach()
        z_s2t = theirs.detached().logits(P.s2t(student.hidden[i : i + 1]))[0]
        sure = 1 - entropy_of(z_t.softmax(-1)) / math.log(len(z_t))
        weight = sure if loss.teacher_weighting == "confidence" else 1.0
        p_t, p_s2t = (z_t / tau).softmax(-1), (z_s2t / tau).softmax(-1)
        teaching.append((weight, reference_divergence("forward_kl", p_t, p_s2t)))
    for name, length, weighted in (("student_kd", S, taught), ("teacher_kd", T, teaching)):
        for weight, value in weighted:
            share = weight * length / sum(other for other, _ in weighted)
            terms[name] = terms[name] + share * value
    if loss.dtw_weight == 0:
        return terms

    penalty = torch.zeros(S, T, dtype=torch.float64)
    ends = [(0, 0), *((i + 1, j + 1) for i, j in pairs), (S + 1, T + 1)]
    for i in range(1, S + 1):
        (i0, j0), (i1, j1) = next(
            (before, after) for before, after in pairwise(ends) if before[0] <= i < after[0]
        )
        center = j0 + (i - i0) * (j1 - j0) / (i1 - i0)
        for j in range(1, T + 1):
            if soft_dtw.band and abs(j - center) > soft_dtw.band_width:
                penalty[i - 1, j - 1] = soft_dtw.band_penalty
    gamma = soft_dtw.gamma_start
    for name, x, y in (
        ("hidden_dtw", student.hidden, P.t2s(teacher.hidden)),
        ("embed_dtw", student.target_embeds, P.embed_t2s(teacher.target_embeds)),
    ):
        own = reference_soft_dtw(x, x, gamma) + reference_soft_dtw(y, y, gamma)
        terms[name] = reference_soft_dtw(x, y, gamma, penalty) - own / 2
    return terms


def reference_uld(
    student: Sample, teacher: Sample, case: Case, loss: LossConfig
) -> dict[str, Tensor]:
    terms = dict.fromkeys(ALL_TERMS, torch.zeros((), dtype=torch.float64))
    S, T = len(student.hidden), len(teacher.hidden)
    for i in range(S):
        z = case.student_head.logits(student.hidden[i : i + 1])[0]
        terms["ce"] = terms["ce"] - z.softmax(-1)[student.labels[i]].log()
        if i >= T:
            continue
        p = (z / loss.temperature).softmax(-1)
        q = (case.teacher_head.logits(teacher.hidden[i : i + 1])[0] / loss.temperature).softmax(-1)
        ours = sorted(p, key=lambda x: -float(x))
        theirs = sorted((float(x) for x in q), reverse=True)
        for rank in range(max(len(ours), len(theirs))):
            mine = ours[rank] if rank < len(ours) else torch.zeros((), dtype=torch.float64)
            other = theirs[rank] if rank < len(theirs) else 0.0
            terms["uld"] = terms["uld"] + (mine - other).abs() * S / min(S, T)
    return terms


def reference_mapped(
    student: Sample,
    teacher: Sample,
    pairs: Pairs,
    mapped: Tensor,
    case: Case,
    loss: LossConfig,
) -> dict[str, Tensor]:
    zero = torch.zeros((), dtype=torch.float64)
    terms = dict.fromkeys((*ALL_TERMS, *COMPARED), zero)

    def summed(j: int, temperature: float) -> Tensor:
        z = case.teacher_head.logits(teacher.hidden[j : j + 1])[0].detach() / temperature
        found = [0.0] * case.student_head.weight.shape[0]
        for token, p in enumerate(z.softmax(-1).tolist()):
            if mapped[token] >= 0:
                found[mapped[token]] += p
        smallest = torch.finfo(torch.float64).tiny
        return torch.tensor([max(p / sum(found), smallest) for p in found], dtype=torch.float64)

    partner = dict(pairs)
    taught = []
    for i in range(len(student.hidden)):
        z = case.student_head.logits(student.hidden[i : i + 1])[0]
        nll = -z.softmax(-1)[student.labels[i]].log()
        terms["ce"] = terms["ce"] + nll
        if i in partner:
            p = summed(partner[i], 1.0)
            terms["paired_ce"] = terms["paired_ce"] + nll
            terms["teacher_ce"] = terms["teacher_ce"] - p[student.labels[i]].log()
            weight = {
                "none": 1.0,
                "entropy": entropy_of(z.softmax(-1)),
                "entropy_gate": entropy_of(z.softmax(-1)) * float(p.max()),
            }[loss.student_weighting]
            tau = loss.temperature
            value = reference_divergence(
                loss.divergence, summed(partner[i], tau), (z / tau).softmax(-1)
            )
            taught.append((weight, value))
        elif len(teacher.hidden):
            terms["student_kd"] = terms["student_kd"] + nll
    for weight, value in taught:
        share = weight * len(taught) / sum(weight for weight, _ in taught)
        terms["student_kd"] = terms["student_kd"] + share * value
    return terms


LENGTHS = [(6, 7), (5, 4), (1, 3), (4, 5), (3, 1), (2, 0), (0, 4), (4, 4)]
# No centre is a whole number of tenths away from a cell, so that rounding decides nothing.
BAND = SoftDTWConfig(band_width=0.937, band_penalty=0.7)


@pytest.mark.parametrize(
    ("variant", "further", "soft_dtw"),
    [
        ("dskdv2", {}, {}),
        ("dskdv2", {"divergence": "reverse_kl", "chunk_size": 2}, {}),
        ("dwakdv2", {}, {}),
        ("dwakdv2", {"divergence": "js", "student_weighting": "entropy", "chunk_size": 3}, {}),
        ("dwakdv2", {"temperature": 1.0, "kd_weight": 0.7}, {"band": False}),
        ("uld", {}, {}),
        ("uld", {"temperature": 1.7, "chunk_size": 3}, {}),
        ("mapped", {}, {}),
        ("mapped", {"student_weighting": "entropy_gate", "temperature": 1.7, "chunk_size": 3}, {}),
        ("mapped", {"student_weighting": "entropy", "divergence": "reverse_kl"}, {}),
    ],
)
def test_agrees_with_the_plain_reference(
    variant: str, further: dict[str, Any], soft_dtw: dict[str, Any]
) -> None:
    seed = len(variant) + len(further)
    softcap = 5.0 if further else None
    # ULD's vocabularies: the student's is the smaller one in one case, the larger in the other.
    vocab = (17, 13) if further else (13, 17)
    case = make_case(LENGTHS, seed=seed, vocab=vocab, softcap=softcap)
    pairs = some_pairs(LENGTHS, seed)
    mapped = some_map(case, pairs, seed)
    loss, band = loss_of(variant, **further), BAND.model_copy(update=soft_dtw)
    terms = evaluate(case, loss, pairs, mapped, band, pad=(2, 1), fill=math.nan)
    expected = dict.fromkeys((*ALL_TERMS, *COMPARED), torch.zeros((), dtype=torch.float64))
    for index, (student, teacher) in enumerate(zip(case.student, case.teacher, strict=True)):
        found = (
            reference_uld(student, teacher, case, loss)
            if variant == "uld"
            else reference_mapped(student, teacher, pairs[index], mapped, case, loss)
            if variant == "mapped"
            else reference_exact(student, teacher, pairs[index], mapped, case, loss, band)
        )
        for name, value in found.items():
            expected[name] = expected[name] + value
    if variant != "uld":
        assert expected["student_kd"] > 0  # some agree
    for name in COMPARED:
        assert_same(getattr(terms, name), expected[name].detach(), name)
    for name in ALL_TERMS:
        assert_same(getattr(terms, name), expected[name], name)
        if not expected[name].requires_grad:
            assert expected[name] == 0
            continue
        ours, theirs = gradients(case, getattr(terms, name)), gradients(case, expected[name])
        for leaf in ours:
            assert_same(ours[leaf], theirs[leaf], f"∂{name}/∂{leaf}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=4),
    variant=st.sampled_from(["uld", "dskdv2", "dwakdv2", "mapped"]),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    fill=st.sampled_from([0.0, 1e30, math.nan]),
    chunk_size=st.sampled_from([1, 3, "auto"]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_padding_batching_order_and_chunks_change_nothing(
    lengths: list[tuple[int, int]],
    variant: str,
    pad: tuple[int, int],
    fill: float,
    chunk_size: int | str,
    seed: int,
    data: st.DataObject,
) -> None:
    case, pairs, loss = make_case(lengths, seed=seed), some_pairs(lengths, seed), loss_of(variant)
    mapped = some_map(case, pairs, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    chunked = loss.model_copy(update={"chunk_size": chunk_size})
    batch = evaluate(case, chunked, pairs, mapped, BAND, order=list(order), pad=pad, fill=fill)
    alone = [evaluate(single(case, i), loss, [pairs[i]], mapped, BAND) for i in range(len(lengths))]
    for name in ALL_TERMS + FIGURES:
        expected = torch.stack([getattr(terms, name) for terms in alone]).sum()
        assert_same(getattr(batch, name), expected, name, tolerance=1e-10)
    total = torch.stack([terms.total(loss) for terms in alone]).sum()
    ours, theirs = gradients(case, batch.total(loss)), gradients(case, total)
    for leaf in ours:
        assert_same(ours[leaf], theirs[leaf], leaf, tolerance=1e-10)


def test_each_term_trains_its_own() -> None:
    lengths = [(6, 6)]
    case = make_case(lengths, seed=2)
    pairs = [[(i, i) for i in range(6)]]
    mapped = some_map(case, pairs, 2)
    terms = evaluate(case, loss_of("dskdv2"), pairs, mapped, BAND)

    def trained(term: Tensor) -> set[str]:
        return {name for name, grad in gradients(case, term).items() if grad.any()}

    assert trained(terms.student_kd) == {"head", "head.bias", "hidden.0"}
    assert trained(terms.t2s_ce) == {"t2s.weight", "t2s.bias"}
    assert trained(terms.teacher_kd) == {"hidden.0", "s2t.weight", "s2t.bias"}
    others = evaluate(case, loss_of("mapped"), pairs, mapped, BAND)
    assert trained(others.student_kd) == {"head", "head.bias", "hidden.0"}
    uld = evaluate(case, loss_of("uld"), pairs, mapped, BAND)
    assert trained(uld.uld) == {"head", "head.bias", "hidden.0"}
    for leaf in case.leaves().values():
        leaf.retain_grad()
    uld.total(loss_of("uld")).backward()
    # Zeros, not None, for what nothing reaches.
    assert all(leaf.grad is not None for leaf in case.leaves().values())


def test_gradient_of_the_sorted_distance() -> None:
    generator = torch.Generator().manual_seed(4)
    student, larger, smaller = (
        torch.randn(3, size, generator=generator, dtype=torch.float64) for size in (7, 11, 5)
    )
    student.requires_grad_()
    for teacher in (larger, smaller):
        assert torch.autograd.gradcheck(lambda z, t=teacher: sorted_distance(z, t, 1.3), (student,))
    assert_same(sorted_distance(student, student.flip(-1), 1.0), torch.zeros(3).double(), "equal")
    apart = torch.tensor([[50.0, 0.0]]), torch.zeros(1, 1000)
    assert sorted_distance(*apart, 1.0) == pytest.approx(2 - 2 / 1000, rel=1e-5)


def test_without_a_teacher_the_loss_is_the_labels_cross_entropy() -> None:
    case = make_case([(4, 3), (2, 2)])
    student = collate(case.student, case.student_head, pad=1, fill=math.nan)
    terms = dwakd_loss(student, None, None, loss=loss_of("sft"))
    expected = sum(
        torch.nn.functional.cross_entropy(
            case.student_head.logits(sample.hidden), sample.labels, reduction="sum"
        )
        for sample in case.student
    )
    assert isinstance(expected, Tensor)
    assert_same(terms.total(loss_of("sft")), expected, "ce")
    ours, theirs = gradients(case, terms.ce), gradients(case, expected)
    for leaf in ours:
        assert_same(ours[leaf], theirs[leaf], leaf)
    assert terms.distilled_tokens == 0
    with pytest.raises(ValueError, match="teacher is None"):
        dwakd_loss(student, None, None, loss=LossConfig())
    with pytest.raises(ValueError, match="needs"):
        teacher = collate(case.teacher, case.teacher_head)
        dwakd_loss(student, teacher, case.projectors, loss=loss_of("dskdv2"))


def test_an_alignment_of_pairs_is_their_matrix() -> None:
    case = make_case([(3, 4)])
    student = replace(collate(case.student, case.student_head), pairs=torch.tensor([0, 2]))
    teacher = replace(collate(case.teacher, case.teacher_head), pairs=torch.tensor([1, 3]))
    found = alignment_of(student, teacher, case.projectors, soft_dtw=SoftDTWConfig(band_width=0.2))
    expected = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert torch.equal(found.attention[0].long(), expected)
    assert found.inside is not None
    # Half way between the pairs lies the third position.
    assert found.inside[0].long().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


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


# ---------------------------------------------------------------------------------------------
# Recipes, commands, whole runs


def test_settings_that_do_not_go_together(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="matching `order` has no projectors"):
        parse_recipe(recipe({"loss": {"matching": "order"}}))
    with pytest.raises(UserError, match="matching `mapped` has no projectors"):
        parse_recipe(recipe({"loss": {"matching": "mapped"}}))
    config = parse_recipe(recipe({"variant": "dskdv2"}))
    assert config is not None
    assert config.loss.trained_projectors == {"t2s"}


def test_plan_says_what_it_takes_the_baselines_for(recipe: Recipe) -> None:
    plain = recipe({})
    assert as_planned(plain) == (plain, [])
    planned, assumed = as_planned(recipe({"variant": "dwakdv2"}))
    config = parse_recipe(planned)
    assert config is not None
    assert config.loss == LossConfig()
    assert "dwakdv2 is reckoned as if it attended" in assumed[0]
    with pytest.raises(UserError, match="trains without a teacher"):
        as_planned(recipe({"variant": "sft"}))


@pytest.mark.parametrize(
    ("command", "variant", "message"),
    [
        ("align", "uld", "nothing to draw"),
        ("align", "mapped", "nothing to draw"),
        ("warmup", "uld", "no projectors to train"),
        ("warmup", "mapped", "no projectors to train"),
    ],
)
def test_commands_say_where_they_make_no_sense(
    command: str, variant: str, message: str, recipe: Recipe, write: Any
) -> None:
    file = write(recipe({"variant": variant}))
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, [command, str(file)], catch_exceptions=False)


def test_align_and_warmup_work_on_pairs(recipe: Recipe, write: Any) -> None:
    projectors = {"init": "random", "warmup_learning_rate": 0.05}
    file = write(recipe({"variant": "dwakdv2", "projectors": projectors}))
    report = json.loads(
        CliRunner().invoke(app, ["align", str(file), "--json"], catch_exceptions=False).stdout
    )
    assert report["samples"][0]["states"]["before training"]["attention_entropy"] == 0
    arguments = ["warmup", str(file), "--json", "--epochs", "2"]
    course = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert course["after"]["t2s_ce"] < course["before"]["t2s_ce"] - 0.3


def test_sft_through_the_plugin_is_plain_sft_on_the_same_rows(
    recipe: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(recipe(None, output_dir=str(tmp_path / "plain"), max_steps=2))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("dwakd_plugin.train.assembly.load_teacher", refuse)
    own = recipe({"variant": "sft"}, max_steps=2)
    log = train(own)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (log, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert not {"t2s_ce", "gate", "paired_share", "uld", "attention_entropy"} & set(log[0])
    assert not {"teacher_ce", "paired_ce"} & set(log[0])
    out = Path(own["output_dir"])
    assert (out / "dwakd" / "run.json").is_file()
    assert not (out / "dwakd" / "projectors.safetensors").exists()
    # A run without projectors resumes as well.
    shutil.rmtree(out / "checkpoint-2", ignore_errors=True)
    train(own | {"auto_resume_from_checkpoints": True, "max_steps": 4})


def test_uld_trains_and_logs_its_distance(recipe: Recipe, train: Train) -> None:
    log = train(recipe({"variant": "uld"}, max_steps=2, val_set_size=0.2, eval_steps=2))
    first = next(line for line in log if "loss" in line)
    assert 0 < first["uld"] < 2
    assert first["loss"] == pytest.approx(first["ce"] + 1.5 * first["uld"], rel=1e-3)
    assert not {"t2s_ce", "gate", "gamma", "attention_entropy", "teacher_ce"} & set(first)
    assert any("eval_uld" in line for line in log)


def test_mapped_trains_without_projectors_and_resumes(recipe: Recipe, train: Train) -> None:
    settings_ = recipe({"variant": "mapped"}, max_steps=3, save_steps=1, val_set_size=0.2)
    log = train(settings_ | {"eval_steps": 2})
    first = next(line for line in log if "loss" in line)
    expected = {"student_kd", "paired_share", "t2s_accuracy", "gate", "teacher_ce", "paired_ce"}
    assert expected <= set(first) and 0.3 < first["paired_share"] <= 1
    assert not {"t2s_ce", "teacher_kd", "hidden_dtw", "gamma", "uld", "attention_entropy"} & set(
        first
    )
    assert first["loss"] == pytest.approx(0.1 * first["ce"] + 0.9 * first["student_kd"], rel=1e-3)
    assert any("eval_student_kd" in line and "eval_t2s_ce" not in line for line in log)
    out = Path(settings_["output_dir"])
    assert not list(out.rglob("projectors.safetensors"))
    last = load_file(out / "model.safetensors")
    for folder in (out / "checkpoint-2", out / "checkpoint-3"):
        shutil.rmtree(folder, ignore_errors=True)
    train(settings_ | {"eval_steps": 2, "auto_resume_from_checkpoints": True})
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(resumed[name], last[name]) for name in last)


def test_dskdv2_pairs_tokens_and_its_s2t_follows_the_head(
    recipe: Recipe, train: Train, lab: Path
) -> None:
    settings_ = recipe({"variant": "dskdv2"}, max_steps=2, save_steps=1)
    log = train(settings_)
    first = log[0]
    assert 0.3 < first["paired_share"] <= 1
    assert {"t2s_ce", "student_kd", "teacher_kd", "t2s_accuracy", "gate"} <= set(first)
    assert {"teacher_ce", "paired_ce"} <= set(first)
    assert not {"hidden_dtw", "gamma", "attention_entropy", "uld"} & set(first)
    terms = first["student_kd"] + first["t2s_ce"]
    assert first["loss"] > 0.5 * (first["ce"] + terms) - 1e-3

    out = Path(settings_["output_dir"])
    projectors = [load_file(out / f"checkpoint-{n}/dwakd/projectors.safetensors") for n in (1, 2)]
    moved = {
        name for name in projectors[0] if not torch.equal(projectors[0][name], projectors[1][name])
    }
    assert moved == {"t2s.weight", "t2s.bias", "s2t.weight"}
    # The second step's map is that of the head after the first.
    teacher = load_file(lab / "teacher" / "model.safetensors")["lm_head.weight"]
    student = load_file(out / "checkpoint-1" / "model.safetensors")
    head = student.get("lm_head.weight", student["model.embed_tokens.weight"])
    sides = [AutoTokenizer.from_pretrained(lab / side) for side in ("teacher", "student")]
    expected = torch.nn.Linear(head.shape[1], teacher.shape[1])
    HeadFollower(shared_vocabulary(*sides), teacher).update(expected, head)
    torch.testing.assert_close(projectors[1]["s2t.weight"], expected.weight, rtol=1e-4, atol=1e-5)


def test_dwakdv2_trains_packed_and_from_a_cache(
    recipe: Recipe, train: Train, tmp_path: Path, lab: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(lab / "teacher", teacher)
    block = {
        "variant": "dwakdv2",
        "teacher": {"base_model": str(teacher), "cache": str(tmp_path / "states")},
    }
    packed = {"sample_packing": True, "micro_batch_size": 1, "attn_implementation": "sdpa"}
    log = train(recipe(block, max_steps=2, **packed))
    assert {"hidden_dtw", "embed_dtw", "band_share", "gamma", "paired_share"} <= set(log[0])
    assert 0.3 < log[0]["paired_share"] <= 1
