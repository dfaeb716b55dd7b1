"""The student's own answers: sampled in a run, judged by the teacher, drawn again the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from axolotl.utils.dict import DictDefault
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd_plugin.data.sampled_rows import (
    OWN_ROWS,
    answer_begins,
    answered,
    end_of,
    given_labels,
    rows_of,
)
from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.checks import check_recipe
from dwakd_plugin.recipe.schema import parse_recipe
from dwakd_plugin.tokenizers.sampled import SampledText
from dwakd_plugin.train.own_answers import check_own_answers
from tests.own_answers_pair import OWN, Pair
from tests.runs import weights

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]
LOGGED = {"own_length", "own_ended", "own_unaligned", "own_divergence", "own_agreement"}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("mapped", {}),
        ("paper", {"gradient_accumulation_steps": 2, "micro_batch_size": 2, **LORA}),
    ],
)
def test_a_run_samples_logs_and_resumes_exactly(
    recipe: Recipe, train: Train, tmp_path: Path, variant: str, settings: dict[str, Any]
) -> None:
    keys = recipe({"variant": variant, "own_answers": OWN}, **settings)
    log = [line for line in train(keys) if "loss" in line]
    assert not [name for name in log[0] if name.startswith("own_")]  # start_after
    for line in log[1:]:
        assert {"own_length", "own_ended", "own_unaligned", "own_seconds"} <= set(line)
        assert 1 <= line["own_length"] <= 2
    judged = [line for line in log if "own_divergence" in line]
    assert judged
    assert all(line["own_divergence"] > 0 and 0 <= line["own_agreement"] <= 1 for line in judged)
    assert all(set(line) >= LOGGED for line in judged)

    whole, resumed = Path(keys["output_dir"]), tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(keys | {"output_dir": str(resumed), "auto_resume_from_checkpoints": True})
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if variant == "paper":
        file = Path("dwakd", "projectors.safetensors")
        expected, found = load_file(whole / file), load_file(resumed / file)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_every_row_may_be_the_students_own(recipe: Recipe, train: Train) -> None:
    own = {"share": 1.0, "max_new_tokens": 1, "start_after": 0}
    keys = recipe({"own_answers": own}, max_steps=2, micro_batch_size=2)
    for line in train(keys):
        if "own_divergence" in line:
            assert line["loss"] > 0 and line["grad_norm"] > 0


@pytest.mark.slow
def test_a_student_that_diverges_ends_the_run_by_name(
    recipe: Recipe, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    keys = recipe({"own_answers": OWN | {"share": 1.0}}, learning_rate=1e35, save_steps=50)
    with pytest.raises(SystemExit):
        train(keys)
    assert "is not finite after step 2" in caplog.text
    assert "Lower learning_rate" in caplog.text


# Two models of one tokenizer ------------------------------------------------------------------


@pytest.fixture
def pair(lab: Path) -> Pair:
    return Pair(lab / "student", 40, share=1.0, max_new_tokens=3)


@pytest.mark.parametrize("skew", [0.0, 0.1])
def test_with_one_tokenizer_it_is_reverse_kl_token_by_token(lab: Path, skew: float) -> None:
    """By default, or with a tenth of the student's own mixed into the teacher."""
    settings = {"divergence": "skewed_reverse_kl"} if skew else {}
    pair = Pair(lab / "student", 40, share=1.0, max_new_tokens=3, **settings)
    (batch,) = pair.own.put_into([pair.batch], 0, pair.student)
    rows, own = rows_of(batch), batch[OWN_ROWS].tolist()
    # Where the tokenizer cuts the text as it was sampled, both read the very same tokens.
    same = [n for n in own if rows[n].student_ids == rows[n].teacher_ids]
    assert len(same) > 5
    loss = pair.judged(batch, same)
    expected = torch.zeros((), dtype=torch.float64)
    for number in same:
        ids = torch.tensor([rows[number].student_ids])
        begin = answer_begins([-100, *rows_of(pair.batch)[number].student_labels[1:]])
        assert begin is not None
        p, q = (model(ids).logits[0, begin - 1 : -1] for model in (pair.student, pair.model))
        p, q = p.softmax(-1), q.softmax(-1)
        expected = expected + (p * (p.log() - (skew * p + (1 - skew) * q).log())).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    names = [name for name, _ in pair.student.named_parameters()]
    found = torch.autograd.grad(loss, [*pair.student.parameters()])
    wanted = torch.autograd.grad(expected, [*pair.student.parameters()])
    for name, one, other in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10, msg=name)


def test_a_draw_depends_on_its_step_and_row_alone(pair: Pair) -> None:
    (whole,) = pair.own.put_into([pair.batch], 7, pair.student)
    features = [row.feature() for row in rows_of(pair.batch)]
    halves = [dict(pair.collator([dict(row) for row in features[a : a + 20]])) for a in (0, 20)]
    parts = pair.own.put_into(halves, 7, pair.student)
    assert [row for part in parts for row in rows_of(part)] == rows_of(whole)
    (later,) = pair.own.put_into([pair.batch], 8, pair.student)
    assert rows_of(later) != rows_of(whole)


def test_a_share_of_the_rows_and_the_given_ones_as_they_were(lab: Path) -> None:
    pair = Pair(lab / "student", 20, share=0.25, max_new_tokens=1)
    counts = []
    for step in range(8):
        (batch,) = pair.own.put_into([pair.batch], step, pair.student)
        before, after = rows_of(pair.batch), rows_of(batch)
        own = batch[OWN_ROWS].tolist()
        counts.append(len(own))
        assert [after[n] for n in range(20) if n not in own] == [
            before[n] for n in range(20) if n not in own
        ]
        labels = given_labels(batch)
        assert all((labels[n] == -100).all() == (n in own) for n in range(20))
    assert max(counts) <= 5  # fewer where a byte of no character was drawn
    figures = pair.own.logged()
    answers = 8 * 5
    assert figures["own_unaligned"] == pytest.approx(1 - sum(counts) / answers)
    assert figures["own_length"] == 1
    assert pair.own.logged() == {}


def test_the_models_own_generation_settings_do_not_bend_the_draws(pair: Pair) -> None:
    (plain,) = pair.own.put_into([pair.batch], 0, pair.student)
    pair.student.generation_config.repetition_penalty = 5.0
    (batch,) = pair.own.put_into([pair.batch], 0, pair.student)
    assert rows_of(batch) == rows_of(plain)
    assert pair.student.generation_config.repetition_penalty == 5.0


def test_sorted_probabilities_need_no_labels_either(lab: Path) -> None:
    pair = Pair(lab / "student", 20, share=1.0, max_new_tokens=2, matching="order")
    (batch,) = pair.own.put_into([pair.batch], 0, pair.student)
    rows, own = rows_of(batch), batch[OWN_ROWS].tolist()
    same = [n for n in own if rows[n].student_ids == rows[n].teacher_ids]
    loss, expected = pair.judged(batch, same), torch.zeros((), dtype=torch.float64)
    for number in same:
        ids = torch.tensor([rows[number].student_ids])
        begin = answer_begins(rows[number].student_labels)
        assert begin is not None
        p, q = (
            model(ids).logits[0, begin - 1 : -1].softmax(-1).sort(descending=True).values
            for model in (pair.student, pair.model)
        )
        expected = expected + (p - q).abs().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    figures = pair.own.logged()
    assert figures["own_divergence"] > 0 and "own_agreement" not in figures


def test_sampled_ids_stay_where_the_tokenizer_cuts_otherwise(pair: Pair) -> None:
    row, text = rows_of(pair.batch)[0], SampledText(pair.tokenizer, pair.tokenizer)
    end = pair.tokenizer.eos_token_id
    whole = pair.tokenizer(" arguments")["input_ids"]
    letters = [index for letter in " arguments" for index in pair.tokenizer(letter)["input_ids"]]
    assert len(letters) == 10 > len(whole)
    own = answered(row, [*letters, end], True, text, end, 256)
    assert own is not None
    begin = answer_begins(row.student_labels)
    assert own.student_ids == [*row.student_ids[:begin], *letters, end]
    assert own.teacher_ids == [*row.teacher_ids[:begin], *whole, end]
    # The first letter, which the teacher's token begins with, and the end.
    learnt = [label for label in own.student_labels if label != -100]
    assert learnt[0] == letters[0] and learnt[-1] == end
    assert len(learnt) == len([label for label in own.teacher_labels if label != -100])


def test_the_last_turn_is_answered_and_ends_as_it_did() -> None:
    special = frozenset({90, 91})
    #      a question, an answer, its end; another one; what nobody learns
    ids = [1, 2, 3, 90, 4, 5, 6, 91, 7, 90]
    labels = [-100, -100, 3, 90, -100, 5, 6, 91, -100, -100]
    assert answer_begins(labels) == 5
    assert end_of(ids, labels, special) == 91
    assert end_of(ids, labels, frozenset()) is None
    assert answer_begins([5, -100]) is None  # nothing predicts a row's first token
    assert answer_begins([5, 5]) is None  # all of it is learnt: nothing is asked
    assert answer_begins([5, -100, 5]) == 2


def test_answers_that_are_no_text_keep_the_given_one(pair: Pair) -> None:
    row, text = rows_of(pair.batch)[0], SampledText(pair.tokenizer, pair.tokenizer)
    end = pair.tokenizer.eos_token_id
    euro = pair.tokenizer("€")["input_ids"]
    assert len(euro) == 3
    word = pair.tokenizer(" sum")["input_ids"]
    assert answered(row, [*euro[:2], *word, end], True, text, end, 256) is None
    assert answered(row, [*word, pair.tokenizer.pad_token_id, end], True, text, end, 256) is None
    assert answered(row, [10**6, end], True, text, end, 256) is None
    spelt = [i for c in "<|pad|>" for i in pair.tokenizer(c)["input_ids"]]
    assert answered(row, [*spelt, end], True, text, end, 256) is None  # a special token, as text
    assert answered(row, [*word, end], True, text, end, len(row.teacher_ids[:5])) is None
    cut = answered(row, [*word, *euro[:2]], False, text, end, 256)  # at its end only: left out
    assert cut is not None
    assert cut.student_ids[-2:] == euro[:2] and cut.student_labels[-2:] == [-100, -100]
    assert answered(row, [end], True, text, end, 256) is not None  # says nothing, and ends


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dwakd", "settings", "message"),
    [
        ({"own_answers": {"share": 1.5}}, {}, "dwakd.own_answers.share: .*less than or equal to 1"),
        ({"own_answers": {"share": -1}}, {}, "dwakd.own_answers.share: .*greater than or equal"),
        ({"own_answers": {"shere": 1}}, {}, "dwakd.own_answers.shere: unknown key; .*`share`"),
        (
            {"own_answers": {"refresh_every": 4, "backend": "transformers"}},
            {},
            r"refresh_every: .*always from fresh weights; set it to 1.* \(found: 4\)",
        ),
        ({"own_answers": {"backend": "sglang"}}, {}, "'auto', 'transformers' or 'vllm'"),
        ({"own_answers": {"vllm_memory": 0}}, {}, "vllm_memory: .*greater than 0"),
        (
            {"own_answers": {"backend": "vllm"}},
            {"load_in_8bit": True, "adapter": "lora"},
            "backend: vllm with load_in_8bit — .*remove one of the two",
        ),
        ({"own_answers": {"matching": "attention"}}, {}, "labels, which a sampled answer doesn't"),
        ({"own_answers": {"matching": "exact"}}, {}, "set `mapped` or `order`"),
        ({"own_answers": {}, "variant": "sft"}, {}, "give dwakd.loss.kd_weight above 0"),
        ({"own_answers": {}}, {"deepspeed": {"a": 1}}, r"with deepspeed — .*\(DDP\)"),
        ({"own_answers": {}}, {"fsdp_version": 2}, "with fsdp_version — .*remove these keys"),
        ({"own_answers": {}}, {"sequence_len": 128}, "leaves no place for a prompt"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    recipe: Recipe, dwakd: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        found = ReadRecipe(recipe(dwakd, **settings))
        assert found.distils
        check_recipe(found)


def test_a_run_that_cannot_sample_is_refused_before_a_teacher_is_loaded(
    recipe: Recipe, lab: Path
) -> None:
    config = parse_recipe(recipe({"own_answers": {"max_new_tokens": 8}}))
    assert config is not None
    tokenizer = AutoTokenizer.from_pretrained(lab / "student")
    model = AutoModelForCausalLM.from_pretrained(lab / "student")
    rows = [{"labels": [-100] * 10 + [5] * 4, "teacher_labels": [-100, 5]}]

    def check(**changes: Any) -> None:
        trainer = SimpleNamespace(
            model=model,
            processing_class=changes.get("tokenizer", tokenizer),
            train_dataset=changes.get("rows", rows),
        )
        cfg = {"sequence_len": changes.get("length", 18), "train_on_inputs": "inputs" in changes}
        check_own_answers(DictDefault(cfg), config, trainer)

    check()
    with pytest.raises(UserError, match=r"shortest prompt, of 10 tokens.*Raise sequence_len to 18"):
        check(length=17)
    with pytest.raises(UserError, match="no row has a prompt and an answer on both sides"):
        check(rows=[{"labels": [-100, 5], "teacher_labels": [-100, -100]}])
    with pytest.raises(UserError, match="With train_on_inputs all of a row is learnt"):
        check(rows=[{"labels": [4, 5], "teacher_labels": [4, 5]}], inputs=True)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no end-of-sequence token.*special_tokens"):
        check(tokenizer=tokenizer)
