"""`dwakd plan`: what takes more, what fits, what is suggested, and the command."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
from typer.testing import CliRunner

from benchmarks.plan import LIMIT
from benchmarks.plan_recorded import planned, recorded
from dwakd_cli.main import app
from dwakd_plugin.data.collator import DualCollator
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss.head_pass import tokens_per_chunk
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.plan import Card, Lengths, card, largest_micro_batch, plan, suggestions
from dwakd_plugin.plan.cards import CPU_IMPORTS, GIB
from dwakd_plugin.plan.moments import FILLING, TEACHER, moments
from dwakd_plugin.plan.own_answers import samples_with_vllm
from dwakd_plugin.plan.parts import Parts
from dwakd_plugin.plan.peak import Plan
from dwakd_plugin.plan.step_time import seconds_per_step
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.blocks import OwnAnswersConfig
from dwakd_plugin.recipe.schema import parse_recipe
from dwakd_plugin.train.trainer import DWAKDTrainer
from tests.conftest import ROOT
from tests.plan.conftest import config_only

Recipe = Callable[..., dict[str, Any]]
CPU = Card("a test's", "cpu", 64 * GIB, 1e11, 1e10, "made up")


# Weights ------------------------------------------------------------------------------------


# The trace ----------------------------------------------------------------------------------


# The plan -----------------------------------------------------------------------------------


def total(recipe: dict[str, Any], **changes: Any) -> float:
    return plan(ReadRecipe(recipe | changes), card("24GB")).total


@pytest.mark.slow
def test_more_of_anything_takes_more(pair: dict[str, Any], tmp_path: Path) -> None:
    base = total(pair)
    assert total(pair, micro_batch_size=8) > base
    assert total(pair, sequence_len=128) > base
    assert total(pair, optimizer="sgd") < base
    assert total(pair, gradient_checkpointing=True) < base
    assert total(pair, attn_implementation="eager") > base
    wide = GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=100_000)
    assert total(pair, base_model=config_only(tmp_path / "wide", wide)) > base
    half = plan(ReadRecipe(pair), card("24GB"), response_share=0.5)
    assert half.total < base
    assert half.lengths.student == 2 * half.lengths.student_response


def test_parts_add_up_on_both_kinds_of_card(pair: dict[str, Any]) -> None:
    for on in (CPU, card("24GB")):
        made = plan(ReadRecipe(pair), on)
        assert sum(made.parts.values()) == pytest.approx(made.total)
        assert {"teacher weights", "student weights", "optimizer", "head chunks"} <= set(
            made.largest
        )
        assert made.seconds_per_step > 0


@pytest.mark.parametrize("on", [CPU, card("24GB")], ids=["cpu", "gpu"])
def test_what_a_step_holds_is_counted_exactly(pair: dict[str, Any], on: Card) -> None:
    """To the byte, against modules of the same sizes: what needs no GPU to be known."""
    teacher = pair["dwakd"]["teacher"] | {"dtype": "bfloat16"}
    changes = {"dwakd": {"variant": "paper", "teacher": teacher}, "optimizer": "adamw_torch_fused"}
    made = plan(ReadRecipe(pair | changes), on).largest
    with torch.device("meta"):
        models = [
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
            for name in (pair["base_model"], teacher["base_model"])
        ]
        projectors = Projectors(256, 512)
    student, theirs, own = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (*models, projectors)
    )
    assert made["student weights"] == 4 * student
    assert made["teacher weights"] == 2 * theirs
    assert made["projectors"] == 4 * own
    assert made["optimizer"] == 2 * 4 * (student + own)
    assert made["gradients"] == 4 * (student + own)
    unfused = plan(ReadRecipe(pair | changes | {"optimizer": "adamw_torch"}), on).largest[
        "optimizer"
    ]
    more = made["gradients"] if on.kind == "cuda" else 0  # a temporary of every weight
    assert unfused == made["optimizer"] + more


@pytest.mark.parametrize("on", [CPU, card("24GB")], ids=["cpu", "gpu"])
def test_every_row_more_takes_more(pair: dict[str, Any], on: Card) -> None:
    # Without tokenizers, the initialisation on a CPU takes more than a step of these small models.
    steps = pair | {"dwakd": pair["dwakd"] | {"projectors": {"init": "random"}}}
    plans = [plan(ReadRecipe(steps), on, micro_batch=batch) for batch in range(1, 9)]
    for fewer, more in itertools.pairwise(plans):
        assert more.total > fewer.total
        for part in ("student activations", "teacher activations", "loss", "soft-DTW"):
            assert more.largest[part] > fewer.largest[part], part
        for part in ("student weights", "teacher weights", "optimizer", "gradients", "runtime"):
            assert more.largest[part] == fewer.largest[part], part


def test_the_teacher_is_held_as_the_recipe_says(pair: dict[str, Any]) -> None:
    def teacher(**changes: Any) -> float:
        block = {"variant": "paper", "teacher": pair["dwakd"]["teacher"] | changes}
        return plan(ReadRecipe(pair | {"dwakd": block}), card("24GB")).largest["teacher weights"]

    full = teacher(dtype="float32")
    assert teacher(dtype="bfloat16") == full / 2
    assert full > teacher(dtype="bfloat16") > teacher(dtype="bfloat16", load_in_8bit=True)
    assert teacher(load_in_8bit=True) > teacher(load_in_4bit=True)


def test_of_a_teacher_whose_tokens_are_kept_nothing_is_loaded(
    pair: dict[str, Any], tmp_path: Path
) -> None:
    def with_teacher(**changes: Any) -> Plan:
        teacher = pair["dwakd"]["teacher"] | {"cache": str(tmp_path)} | changes
        recipe = pair | {"dwakd": {"teacher": teacher}, "gradient_accumulation_steps": 4}
        return plan(ReadRecipe(recipe), card("24GB"), lengths=Lengths(64, 64, 20, 30))

    filling = with_teacher(top_k=16)
    (tmp_path / "index.jsonl").touch()  # as one that is filled
    states, tokens = with_teacher(), with_teacher(top_k=16)
    assert filling.largest["teacher weights"] > states.largest["teacher weights"] > 0
    assert "teacher weights" not in tokens.largest and tokens.total < states.total
    assert tokens.cache_bytes_per_row == 30 * 16 * 6
    assert tokens.largest["states that wait"] == 3 * tokens.micro_batch * 30 * 16 * 8
    assert tokens.seconds_per_step < states.seconds_per_step


def test_on_a_cpu_the_steps_use_again_what_the_filling_of_a_cache_freed(
    pair: dict[str, Any], tmp_path: Path
) -> None:
    teacher = pair["dwakd"]["teacher"] | {"cache": str(tmp_path)}
    lora = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["c_attn"]}
    recipe = ReadRecipe(pair | lora | {"dwakd": {"teacher": teacher}, "sequence_len": 2048})
    long = Lengths(64, 2048, 2, 3)
    few, many = (plan(recipe, CPU, micro_batch=batch, lengths=long) for batch in (1, 64))
    assert few.peak == FILLING and "kept by malloc" not in few.parts
    (tmp_path / "index.jsonl").touch()  # as one that is filled
    filled = plan(recipe, CPU, micro_batch=64, lengths=long)
    assert many.peak == filled.peak and many.total == filled.total > few.total


def test_a_served_teacher_takes_what_it_says_and_nothing_more(pair: dict[str, Any]) -> None:
    def served(top_k: int) -> Plan:
        own = {"server": "http://localhost:1/v1", "tokenizer": "elsewhere", "top_k": top_k}
        recipe = pair | {"dwakd": {"teacher": own}, "gradient_accumulation_steps": 4}
        return plan(ReadRecipe(recipe), card("24GB"), lengths=Lengths(64, 64, 20, 30))

    few, many = served(16), served(64)
    for each, top_k in ((few, 16), (many, 64)):
        assert "teacher weights" not in each.largest
        assert each.largest["states that wait"] == 3 * each.micro_batch * 30 * top_k * 8
    assert few.total < many.total < plan(ReadRecipe(pair), card("24GB")).total


def with_teachers(pair: dict[str, Any], *teachers: dict[str, Any]) -> dict[str, Any]:
    """A recipe of several teachers, of `maths`, `code` and `law` as many as there are."""
    own = zip(("maths", "code", "law"), teachers, strict=False)
    live = pair["dwakd"]["teacher"]
    named = [({} if "server" in keys else live) | {"name": name} | keys for name, keys in own]
    return pair | {"dwakd": {"teachers": named}}


def test_several_teachers_are_planned_side_by_side(pair: dict[str, Any], tmp_path: Path) -> None:
    on = card("24GB")

    def planned_with(*teachers: dict[str, Any]) -> Plan:
        return plan(ReadRecipe(with_teachers(pair, *teachers)), on, lengths=Lengths(64, 64, 20, 30))

    (tmp_path / "index.jsonl").touch()  # a cache that is filled
    server = {"server": "http://localhost:1/v1", "tokenizer": "elsewhere"}
    alone, two, three = planned_with({}), planned_with({}, {}), planned_with({}, {}, {})
    kept = planned_with({}, {"cache": str(tmp_path), "top_k": 8})
    served = planned_with({}, server | {"top_k": 8})
    weights = alone.largest["teacher weights"]
    assert not alone.teachers and [*two.teachers] == ["maths", "code"]
    for name in two.teachers:
        assert two.largest[f"teacher weights ({name})"] == weights
    assert {name: own.weights for name, own in served.teachers.items()} == {
        "maths": weights,
        "code": 0,
    }
    head = 4 * 50_257 * 256  # a gradient: of the pairs, and of what the teacher spells
    assert two.total - alone.total == pytest.approx(weights + 2 * head, rel=0.05)
    assert three.total - two.total == pytest.approx(two.total - alone.total, rel=0.1)
    for one in (
        kept,
        served,
    ):  # which spell nothing, and whose part has more of the student's logits
        assert head < one.total - alone.total < 2 * head < weights
    student = two.seconds_per_step - 2 * (two.seconds_per_step - alone.seconds_per_step)
    assert 0 < student < alone.seconds_per_step < two.seconds_per_step
    assert sum(two.parts.values()) == pytest.approx(two.total)
    assert sum("learn from all" in text for text in two.assumptions) == 1


@pytest.mark.slow
def test_what_would_help_says_which_teacher(pair: dict[str, Any]) -> None:
    recipe = ReadRecipe(with_teachers(pair, {}, {"load_in_4bit": True}))
    now = plan(recipe, card("24GB"))
    found = {one.title: one for one in suggestions(recipe, now)}
    one = found["teacher maths in 4 bit"]
    assert one.yaml == "dwakd:\n  teachers:\n    - name: maths\n      load_in_4bit: true"
    changed = ReadRecipe(with_teachers(pair, *[{"load_in_4bit": True}] * 2))
    assert one.saves == now.total - plan(changed, card("24GB")).total
    assert "teacher code in 4 bit" not in found
    cached = found["teacher code's likeliest tokens from a cache on disk"]
    assert "      cache: teacher_tokens_code\n      top_k: 64" in cached.yaml


@pytest.mark.slow
def test_the_command_plans_several_teachers_or_one(pair: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "several.yml"
    file.write_text(json.dumps(with_teachers(pair, {}, {"cache": "states"})))
    command = ["plan", str(file), "--gpu", "24GB"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    for shown in ("teacher weights (maths)", "teacher weights (code)", "Caches of all teachers"):
        assert shown in result.output
    whole, alone = (
        json.loads(CliRunner().invoke(app, [*command, "--json", *which]).stdout)
        for which in ([], ["--teacher", "maths"])
    )
    assert [*whole["teachers"]] == ["maths", "code"] and "teachers" not in alone
    assert whole["total_bytes"] > alone["total_bytes"]
    assert whole["teachers"]["maths"]["weight_bytes"] == alone["parts_at_most"]["teacher weights"]


def of_variant(pair: dict[str, Any], variant: str, on: Card = CPU, **block: Any) -> Plan:
    """As few of the vocabularies are shared as `random` needs: the loss is what differs."""
    block = {"teacher": pair["dwakd"]["teacher"], "variant": variant} | block
    return plan(ReadRecipe(pair | {"dwakd": block}), on)


def test_a_variant_takes_what_its_record_says(pair: dict[str, Any]) -> None:
    made = {
        name: of_variant(pair, name, card("24GB")).largest
        for name in ("mapped", "sft", "dskdv2", "paper")
    }
    assert {name for name, parts in made.items() if "projectors" in parts} == {"dskdv2", "paper"}
    assert {name for name, parts in made.items() if "soft-DTW" in parts} == {"paper"}
    assert [name for name, parts in made.items() if "teacher weights" not in parts] == ["sft"]
    student = made["mapped"]["optimizer"]
    assert student == made["sft"]["optimizer"]
    # t2s alone, two moments and a temporary: s2t follows the head, by a factor (D, D) in float64.
    assert made["dskdv2"]["optimizer"] == student + 3 * 4 * (512 * 256 + 256)
    assert made["dskdv2"]["projectors"] == made["paper"]["projectors"] + 8 * 512**2
    assert made["mapped"]["loss"] < made["paper"]["loss"]


def test_answers_of_its_own_take_keys_and_values(pair: dict[str, Any]) -> None:
    def sampling(share: float) -> dict[str, float]:
        own = {"own_answers": {"share": share, "max_new_tokens": 32}}
        return of_variant(pair, "mapped", card("24GB"), **own).largest

    half, none = sampling(0.5), sampling(0.0)
    # Two answers, 64 tokens, four layers and one more, keys and values of width 256 in float32.
    assert half["own answers"] > 2 * 64 * (4 + 1) * 2 * 256 * 4
    assert "own answers" not in none


def test_vllm_has_its_share_of_the_card_throughout(pair: dict[str, Any]) -> None:
    own = {"backend": "vllm", "vllm_memory": 0.25}
    recipe = pair | {"dwakd": {"teacher": pair["dwakd"]["teacher"], "own_answers": own}}
    found = moments(Parts(recipe, ReadRecipe(recipe).config, card("24GB"), 8))
    steps = [parts for parts in found.values() if "optimizer" in parts]
    assert len(steps) > 4 and not [name for name in found if "sampling" in name]
    assert {parts["own answers"] for parts in steps} == {0.25 * card("24GB").capacity}


def test_a_student_that_vllm_is_not_handed_leaves_it_no_share(
    pair: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwakd_plugin.plan.own_answers.is_installed", lambda: True)
    own = OwnAnswersConfig(backend="auto")
    assert samples_with_vllm(own, "cuda", pair, bits=0)
    assert not samples_with_vllm(own, "cpu", pair, bits=0)
    assert not samples_with_vllm(own, "cuda", pair, bits=4)
    assert not samples_with_vllm(own, "cuda", pair | {"peft_use_dora": True}, bits=0)
    assert not samples_with_vllm(own, "cuda", pair | {"peft_trainable_token_indices": [1]}, bits=0)


def test_a_cache_leaves_the_teacher_loaded_for_own_answers(pair: dict[str, Any]) -> None:
    def made(share: float, **teacher: str) -> Parts:
        own = {"share": share, "max_new_tokens": 8}
        block = {"variant": "mapped", "own_answers": own}
        recipe = pair | {"dwakd": block | {"teacher": pair["dwakd"]["teacher"] | teacher}}
        return Parts(recipe, ReadRecipe(recipe).config, card("24GB"), 8)

    live, cached, given = made(0.25), made(0.25, cache="none"), made(0, cache="none")
    weights = [run.weights()["teacher weights"] for run in (live, cached, given)]
    assert weights[0] == weights[1] > weights[2]
    seconds = [seconds_per_step(run) for run in (live, cached, given)]
    assert seconds[0] > seconds[1] > seconds[2]
    read = [moments(run)[TEACHER]["teacher activations"] for run in (live, cached, given)]
    assert read[0] > read[1] > read[2]  # 8 rows, 2 beside the states of all, these alone


def test_the_largest_micro_batch_fits_and_the_next_does_not(pair: dict[str, Any]) -> None:
    on = replace(card("24GB"), capacity=int(2.5 * GIB))
    largest = largest_micro_batch(ReadRecipe(pair), on)
    assert largest > 1
    assert plan(ReadRecipe(pair), on, micro_batch=largest).fits
    assert not plan(ReadRecipe(pair), on, micro_batch=largest + 1).fits
    assert largest_micro_batch(ReadRecipe(pair), replace(on, capacity=GIB // 2)) == 0


def test_suggestions_come_in_order_of_effect_and_keep_their_word(pair: dict[str, Any]) -> None:
    on = card("24GB")
    now = plan(ReadRecipe(pair), on)
    found = suggestions(ReadRecipe(pair), now)
    assert [one.saves for one in found] == sorted((one.saves for one in found), reverse=True)
    checkpointing = next(one for one in found if one.title == "gradient checkpointing")
    then = plan(ReadRecipe(pair | {"gradient_checkpointing": True}), on)
    assert checkpointing.saves == now.total - then.total
    assert checkpointing.yaml == "gradient_checkpointing: true"


def test_chunks_on_the_cpu_are_the_losss_own(pair: dict[str, Any]) -> None:
    config = parse_recipe(pair)
    assert config is not None
    run = Parts(pair, config, card("cpu"), 1)
    for rows in (1000, 50_257, 10**8):
        assert run.chunk(rows) == tokens_per_chunk("auto", rows, torch.device("cpu"))


# The card -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "capacity"),
    [("24GB", 24), ("80 GiB", 80), ("7.5g", 7.5), ("A100-80GB", 80), ("a100 40gb", 40), ("h1", 80)],
)
def test_cards(wanted: str, capacity: float) -> None:
    found = card(wanted)
    assert found.capacity == capacity * GIB
    assert found.kind == "cuda"
    assert "TFLOPS" in found.note


@pytest.mark.parametrize("wanted", ["24", "big", "0GB", "A100", "-3GB", ""])
def test_what_is_no_card_is_refused(wanted: str) -> None:
    with pytest.raises(UserError, match=r"--gpu .*24GB"):
        card(wanted)


def test_the_imports_take_what_was_measured() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text())
    for one in report["results"].values():
        assert one["measured"]["baseline"] == pytest.approx(CPU_IMPORTS, rel=0.01)
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert f"({CPU_IMPORTS / 2**20:.0f} MiB, `CPU_IMPORTS`)" in page


# The command --------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)


def test_json_of_a_plain_recipe(
    pair: dict[str, Any], write: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    teacher = pair["dwakd"]["teacher"]["base_model"]
    plain = {key: value for key, value in pair.items() if key not in ("dwakd", "distillation")}
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 10)
    file = write(plain | {"num_epochs": 2, "batch_flattening": True})
    options = ("--teacher", teacher, "--gpu", "24GB", "--plot", str(tmp_path / "parts.png"))
    result = invoke(str(file), *options, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert sum(report["parts"].values()) == pytest.approx(report["total_bytes"], abs=20)
    assert report["largest_micro_batch"] > 4
    assert report["fits"]
    assert report["steps"] == 5
    assert any("batch_flattening is off" in line for line in report["assumptions"])
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")
    packed = write(plain | {"num_epochs": 2, "sample_packing": True})
    report_of_packed = json.loads(invoke(str(packed), *options, "--json").stdout)
    assert report_of_packed["steps"] is None
    assert report_of_packed["total_bytes"] == report["total_bytes"]
    assert any("A packed sequence" in line for line in report_of_packed["assumptions"])
    file = write(plain | {"num_epochs": 2, "batch_flattening": True})
    cached = json.loads(invoke(str(file), *options, "--teacher-cache", "states", "--json").stdout)
    assert cached["parts_at_most"]["teacher weights"] == report["parts"]["teacher weights"]
    assert cached["total_bytes"] < report["total_bytes"]


def test_what_does_not_fit_is_said_first(
    pair: dict[str, Any], write: Callable[[dict[str, Any]], Path]
) -> None:
    file = write(pair)
    result = invoke(str(file), "--gpu", "0.5GB")
    assert result.exit_code == 0
    assert "does not fit" in result.stdout.splitlines()[0]
    assert "What would help" in result.stdout
    assert invoke(str(file), "--gpu", "0.5GB", "--strict").exit_code == 3
    assert invoke(str(file), "--gpu", "24GB", "--strict").exit_code == 0


def test_what_cannot_be_planned_is_refused(
    pair: dict[str, Any], write: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    file = write(pair | {"base_model": str(tmp_path / "gone")})
    with pytest.raises(UserError, match=r"gone` has no config(.|\n)*base_model takes a folder"):
        invoke(str(file), "--gpu", "24GB")
    plain = {key: value for key, value in pair.items() if key not in ("dwakd", "distillation")}
    with pytest.raises(UserError, match="names no teacher"):
        invoke(str(write(plain)))
    lora = pair | {"adapter": "lora", "lora_target_modules": ["nothing_like_it"]}
    with pytest.raises(UserError, match="LoRA cannot be put on the student"):
        invoke(str(write(lora)), "--gpu", "24GB")


# Reality ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cached_states_wait_for_a_whole_optimizer_step(
    recipe: Recipe, train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many batches as the plan counts, and the one at work."""
    settings = recipe(
        {"teacher": {"cache": str(tmp_path / "states")}}, gradient_accumulation_steps=4, max_steps=2
    )
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    collate, compute_loss = DualCollator.__call__, DWAKDTrainer.compute_loss

    def collating(collator: Any, *arguments: Any) -> Any:
        batch = collate(collator, *arguments)
        made.append(weakref.ref(batch["teacher_hidden"]))
        return batch

    def computing(*arguments: Any, **named: Any) -> Any:
        alive.append(sum(one() is not None for one in made))
        return compute_loss(*arguments, **named)

    monkeypatch.setattr(DualCollator, "__call__", collating)
    monkeypatch.setattr(DWAKDTrainer, "compute_loss", computing)
    train(settings)
    lengths = Lengths(256, 256, 60, 60)
    waiting = plan(ReadRecipe(settings), CPU, lengths=lengths).largest["states that wait"]
    assert waiting == (max(alive) - 1) * 4 * 60 * 40 * 4  # rows, tokens, features, bytes
    on_gpu = plan(ReadRecipe(settings), card("24GB"), lengths=lengths).largest["states that wait"]
    assert on_gpu == waiting * 3 / 4  # the data loader's is not there yet


@pytest.mark.slow
def test_every_recorded_run_is_planned_within_its_limit(tmp_path: Path) -> None:
    """Plans are made anew here, from configs; what the runs took was measured once."""
    plans, found = planned(tmp_path), recorded()
    assert plans.keys() == found.keys()
    assert len(plans) == 14
    off = {name: made.total / found[name]["measured"]["peak"] - 1 for name, made in plans.items()}
    assert {name: error for name, error in off.items() if abs(error) > LIMIT} == {}
