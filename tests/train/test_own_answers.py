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
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dwakd_plugin.data.collator import DualCollator, split_batch
from dwakd_plugin.data.sampled_rows import (
    OWN_ROWS,
    answer_begins,
    answered,
    end_of,
    given_labels,
    rows_of,
)
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import ResponseStates
from dwakd_plugin.models.causal_lm import embedding_table, output_head
from dwakd_plugin.models.student import student_states
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.models.teacher.top_tokens import RowStates
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.checks import check_recipe
from dwakd_plugin.recipe.schema import parse_recipe
from dwakd_plugin.tokenizers.sampled import SampledText
from dwakd_plugin.train.own_answers import OwnAnswers, check_own_answers
from tests.conftest import ROWS
from tests.runs import losses, weights

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]
LOGGED = {"own_length", "own_ended", "own_unaligned", "own_divergence", "own_agreement"}
OWN = {"share": 0.75, "max_new_tokens": 2, "start_after": 1}  # few bytes that aren't text
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


# Two models of one tokenizer ------------------------------------------------------------------


class Pair:
    """Student and teacher in float64 with one tokenizer, and a batch of rows for both."""

    def __init__(
        self,
        folder: Path,
        rows: int,
        states: RowStates | None = None,
        packed_len: int | None = None,
        rank: tuple[int, int] = (0, 1),
        **own: Any,
    ) -> None:
        """states: what a cache has of the given rows; the rest as `OwnAnswers` has it."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.student, self.model = (self._model(seed) for seed in (4, 5))
        features = []
        for index, row in enumerate(ROWS[:rows]):
            prompt = self.tokenizer(f"{row['instruction']}\n")["input_ids"]
            answer = [*self.tokenizer(row["output"])["input_ids"], self.tokenizer.eos_token_id]
            ids, labels = [*prompt, *answer], [-100] * len(prompt) + answer
            features.append(
                {
                    "input_ids": ids,
                    "labels": labels,
                    "attention_mask": [1] * len(ids),
                    "teacher_input_ids": ids,
                    "teacher_labels": labels,
                    "source_row": index,
                }
            )
        self.collator = DualCollator(tokenizer=self.tokenizer, teacher_states=states)
        self.batch = dict(self.collator([dict(each) for each in features]))
        self.teacher = Teacher(
            embeddings=embedding_table(self.model),
            head=output_head(self.model),
            model=self.model,
            parameters=1,
            attention="sdpa",
            precision="float64",
            device=torch.device("cpu"),
        )
        config = parse_recipe(
            {
                "distillation": "dwakd",
                "dwakd": {
                    "teacher": "big",
                    "variant": "paper",
                    "own_answers": {"start_after": 0, **own},
                },
            }
        )
        assert config is not None and config.own_answers is not None
        self.own = OwnAnswers(
            config,
            config.own_answers,
            (self.tokenizer, self.tokenizer),
            self.teacher,
            self.collator,
            ends=frozenset({self.tokenizer.eos_token_id}),
            paired={self.tokenizer.eos_token_id: self.tokenizer.eos_token_id},
            lengths=(256, 256),
            seed=3,
            packed_len=packed_len,
            rank=rank,
        )

    def _model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).double().eval()

    def judged(self, batch: dict[str, Tensor], rows: list[int]) -> Tensor:
        return self.sides(batch, rows)[2]

    def sides(
        self, batch: dict[str, Tensor], rows: list[int]
    ) -> tuple[ResponseStates, ResponseStates, Tensor]:
        """What is given, on both sides, and the loss of the student's own rows."""
        added, own = split_batch(batch)
        student = student_states(self.student, added, **own)
        return self.own.set_apart(student, self.teacher.states(added), torch.tensor(rows))


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
    assert answer_begins([5, 5]) == 1


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


# Packed rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed_len", [None, 150])
def test_packed_rows_have_the_loss_and_gradients_of_unpacked_ones(
    lab: Path, packed_len: int | None
) -> None:
    """In one sequence, as flash attention has them, or in several."""
    plain = Pair(lab / "student", 12, share=0.75, max_new_tokens=2)
    packed = Pair(lab / "student", 12, packed_len=packed_len, share=0.75, max_new_tokens=2)
    features = [row.feature() for row in rows_of(packed.batch)]
    before = dict(packed.collator([features[:5], features[5:]]))
    assert rows_of(before) == rows_of(plain.batch)
    (expected,) = plain.own.put_into([plain.batch], 0, plain.student)
    (found,) = packed.own.put_into([before], 0, packed.student)
    assert "position_ids" in found and "attention_mask" not in found
    made, wanted = (
        sorted(rows_of(batch), key=lambda row: row.source) for batch in (found, expected)
    )
    assert made == wanted and 2 < sum(row.own for row in made) <= 9
    sequences = len(found["input_ids"])
    assert sequences == 1 if packed_len is None else sequences > 1

    figures = []
    for pair, batch in ((plain, expected), (packed, found)):
        student, _, own = pair.sides(batch, batch[OWN_ROWS].tolist())
        logits = student.head.logits(student.hidden)
        assert student.labels is not None
        given = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), student.labels.flatten(), reduction="sum"
        )
        gradients = torch.autograd.grad(own + given, [*pair.student.parameters()])
        labels = given_labels(batch)[:, 1:].ne(-100).sum()
        figures.append([own.detach(), given.detach(), labels, *gradients])
    for one, other in zip(*figures, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_longer_answers_make_more_packs(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(lab / "student", 12, packed_len=150, share=1.0, max_new_tokens=90)
    features = [row.feature() for row in rows_of(pair.batch)]
    before = dict(pair.collator([features[:6], features[6:]]))
    answer = [*pair.tokenizer("the cat sat on the mat. " * 8)["input_ids"]]
    answer = [*answer[:80], pair.tokenizer.eos_token_id]
    monkeypatch.setattr(
        pair.own, "_sample", lambda flat, chosen, *_: dict.fromkeys(chosen, (answer, True))
    )
    (found,) = pair.own.put_into([before], 0, pair.student)
    rows = rows_of(found)
    assert sorted(row.source for row in rows) == sorted(row.source for row in rows_of(before))
    own = [row for row in rows if row.own]
    assert len(own) > 5 and all(row.student_ids[-len(answer) :] == answer for row in own)
    assert found["input_ids"].shape[0] > before["input_ids"].shape[0]
    assert found["input_ids"].shape[1] <= max(150, *(len(row.student_ids) for row in rows))


@pytest.mark.slow
def test_a_packed_run_samples_and_resumes_exactly(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    keys = recipe(
        {"variant": "mapped", "own_answers": OWN, "teacher": {"cache": str(tmp_path / "states")}},
        sample_packing=True, micro_batch_size=1, attn_implementation="sdpa", sequence_len=512,
    )  # fmt: skip
    log = [line for line in train(keys) if "loss" in line]
    assert any("own_divergence" in line for line in log[1:])
    whole, resumed = Path(keys["output_dir"]), tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(keys | {"output_dir": str(resumed), "auto_resume_from_checkpoints": True})
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# Several processes --------------------------------------------------------------------------------


def test_no_two_processes_draw_alike(lab: Path) -> None:
    drawn, chosen = [], []
    for rank in range(2):
        pair = Pair(lab / "student", 12, rank=(rank, 2), share=0.5, max_new_tokens=2)
        (batch,) = pair.own.put_into([pair.batch], 0, pair.student)
        chosen.append(batch[OWN_ROWS].tolist())
        whole = Pair(lab / "student", 12, rank=(rank, 2), share=1.0, max_new_tokens=2)
        (batch,) = whole.own.put_into([whole.batch], 0, whole.student)
        drawn.append([row.student_ids for row in rows_of(batch)])
    assert chosen[0] != chosen[1] and drawn[0] != drawn[1]


# A cache of the given answers --------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_says_the_given_rows_and_the_teacher_reads_its_own(lab: Path, whole: bool) -> None:
    """Of a whole batch, and of one with own answers alone."""
    live = Pair(lab / "student", 12, share=0.5, max_new_tokens=2)
    asked: list[Tensor] = []

    def kept(ids: Tensor, labels: Tensor) -> Tensor:
        asked.append(ids)
        states = live.model.model(input_ids=ids[None]).last_hidden_state[0]
        return states[:-1][labels[1:] != -100].detach()

    cached = Pair(lab / "student", 12, kept, share=0.5, max_new_tokens=2)
    asked.clear()
    (expected,) = live.own.put_into([live.batch], 0, live.student)
    (found,) = cached.own.put_into([cached.batch], 0, cached.student)
    assert rows_of(found) == rows_of(expected)
    assert [ids.tolist() for ids in asked] == [
        row.teacher_ids for row in rows_of(found) if not row.own
    ]
    if not whole:
        features = [row.feature() for row in rows_of(found) if row.own]
        expected, found = (pair.collator([*map(dict, features)]) for pair in (live, cached))
        assert "teacher_hidden" not in found
    own = found[OWN_ROWS].tolist()
    assert len(own) > 2
    read = found["teacher_live"]
    assert read["rows"].tolist() == own and len(read["teacher_input_ids"]) == len(own)
    runs = (live, expected), (cached, found)
    read_by = [pair.teacher.states(split_batch(batch)[0]) for pair, batch in runs]
    hidden = (states.hidden for states in read_by)
    for length, one, other in zip(read_by[0].lengths.tolist(), *hidden, strict=True):
        torch.testing.assert_close(one[:length], other[:length], rtol=1e-12, atol=1e-12)
    losses = [pair.judged(batch, own) for pair, batch in runs]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_a_run_with_a_cache_learns_the_same(
    recipe: Recipe, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, own: dict[str, Any], **teacher: Any) -> list[float]:
        block = {"own_answers": own, "teacher": teacher, "variant": "mapped"}
        return losses(train(recipe(block, output_dir=str(tmp_path / name), max_steps=3)))

    own, cache = OWN | {"start_after": 0}, str(tmp_path / "states")
    live = run("live", own)
    first, again = run("first", own, cache=cache), run("again", own, cache=cache)
    assert first == pytest.approx(live, rel=1e-5)  # other batches in the teacher's forward
    assert again == first
    assert f"{cache}, for given answers; the teacher is loaded all the same" in caplog.text
    assert "serves next to nothing" not in caplog.text
    run("all", own | {"share": 1.0}, cache=cache)
    assert "serves next to nothing" in caplog.text


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dwakd", "settings", "message"),
    [
        ({"own_answers": {"share": 1.5}}, {}, "dwakd.own_answers.share: .*less than or equal to 1"),
        ({"own_answers": {"share": -1}}, {}, "dwakd.own_answers.share: .*greater than or equal"),
        ({"own_answers": {"shere": 1}}, {}, "dwakd.own_answers.shere: unknown key; .*`share`"),
        ({"own_answers": {"refresh_every": 4}}, {}, r"vLLM.* set it to 1 \(found: 4\)"),
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
    rows = [{"labels": [-100] * 10 + [5] * 4, "teacher_labels": [-100, 5]}]

    def check(**changes: Any) -> None:
        trainer = SimpleNamespace(
            processing_class=changes.get("tokenizer", tokenizer),
            train_dataset=changes.get("rows", rows),
        )
        check_own_answers(DictDefault(sequence_len=changes.get("length", 18)), config, trainer)

    check()
    with pytest.raises(UserError, match=r"shortest prompt, of 10 tokens.*Raise sequence_len to 18"):
        check(length=17)
    with pytest.raises(UserError, match="no row has an answer on both sides"):
        check(rows=[{"labels": [-100, 5], "teacher_labels": [-100, -100]}])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no end-of-sequence token.*special_tokens"):
        check(tokenizer=tokenizer)
