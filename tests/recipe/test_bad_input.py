"""A user's mistakes: each gets a message with what is wrong and what to do, no traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.dict import DictDefault

from dwakd_plugin.errors import UserError
from dwakd_plugin.plugin import DWAKDPlugin
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.checks import check_recipe
from dwakd_plugin.recipe.reading import with_distillation
from dwakd_plugin.recipe.schema import VARIANTS, DWAKDConfig, parse_recipe
from dwakd_plugin.train.preflight import check_all
from dwakd_plugin.train.run_folder import check_output_folder
from dwakd_plugin.train.trainer import DWAKDTrainer

Recipe = Callable[..., dict[str, Any]]
TEACHER = {"teacher": {"base_model": "big"}}


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"distillation": "dwakd"}, ["needs a teacher", "base_model:"]),
        ({"distillation": "dwakd", "dwakd": {"loss": {}}}, ["needs a teacher"]),
        (
            {"distillation": "dwakd", "dwakd": {"teecher": {"base_model": "big"}}},
            ["needs a teacher", "dwakd.teecher: unknown key; did you mean `teacher`?"],
        ),
        *(
            (
                {"distillation": "dwakd", "dwakd": {"teacher": teacher}},
                ["dwakd.teacher.model: it is for a teacher on a server; give its address"],
            )
            for teacher in ({"model": "big"}, {"model": "big", "base_model": "big"})
        ),
        ({"distillation": "dwkd", "dwakd": TEACHER}, ["`distillation: dwkd` is not known"]),
        ({"dwakd": TEACHER}, ["Add `distillation: dwakd`"]),
        (
            {"distillation": "dwakd", "dwakd": {**TEACHER, "los": {}}},
            ["dwakd.los: unknown key; did you mean `loss`?"],
        ),
        (
            {"distillation": "dwakd", "dwakd": {"teacher": {"base_modle": "big"}}},
            ["dwakd.teacher.base_modle: unknown key; did you mean `base_model`?"],
        ),
        (
            {
                "distillation": "dwakd",
                "dwakd": {**TEACHER, "loss": {"temprature": 1, "ce_weight": -1}},
            },
            [
                "dwakd.loss.temprature: unknown key; did you mean `temperature`?",
                "dwakd.loss.ce_weight: Input should be greater than or equal to 0 (found: -1)",
            ],
        ),
        (
            {"distillation": "dwakd", "dwakd": {**TEACHER, "loss": {"divergence": "kl"}}},
            ["dwakd.loss.divergence", "'forward_kl'", "(found: 'kl')"],
        ),
        (
            {"distillation": "dwakd", "dwakd": {**TEACHER, "loss": {"chunk_size": 0}}},
            ["dwakd.loss.chunk_size: give `auto` or a number of tokens from 1", "(found: 0)"],
        ),
        (
            {
                "distillation": "dwakd",
                "dwakd": {"teacher": {"base_model": "a", "load_in_8bit": 1, "load_in_4bit": 1}},
            },
            ["choose one"],
        ),
        (
            {
                "distillation": "dwakd",
                "dwakd": {**TEACHER, "variant": "dskd", "loss": {"dtw_weight": 0.1}},
            },
            ["dwakd.loss.dtw_weight: variant `dskd` stands for 0.0; drop one of the two"],
        ),
        (
            {
                "distillation": "dwakd",
                "dwakd": {**TEACHER, "variant": "uld", "loss": {"cosine_weight": 1}},
            },
            ["not for dwakd.loss.matching `order`; set `variant: mapped`, or it to 0 (found: 1)"],
        ),
        ({"distillation": "dwakd", "dwakd": {**TEACHER, "loss": 3}}, ["dwakd.loss", "found: 3"]),
    ],
)
def test_the_block_is_checked_before_anything_else(
    settings: dict[str, Any], messages: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(settings)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        *(
            ({"variant": variant, "loss": {key: value}}, rf"dwakd\.loss\.{key}: it has no effect")
            for variant, key, value in [
                ("uld", "divergence", "reverse_kl"),
                ("uld", "student_weighting", "entropy"),
                ("uld", "kd_warmup_steps", 50),
                ("mapped", "attention_value", "hidden"),
                ("paper", "inside_tokens", "label"),
                ("dskdv2", "attention_value", "hidden"),
            ]
        ),
        *(
            ({"own_answers": own}, rf"dwakd\.own_answers\.{key}: it has no effect here: {why}")
            for key, why, own in [
                ("divergence", "it compares sorted", {"matching": "order", "divergence": "js"}),
                ("vllm_memory", "vLLM", {"backend": "transformers", "vllm_memory": 0.9}),
                ("top_p", "temperature 0", {"temperature": 0, "top_p": 0.5}),
            ]
        ),
    ],
)
def test_a_key_without_effect_is_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({"distillation": "dwakd", "dwakd": TEACHER | block})


def test_defaults_for_all_but_the_teacher() -> None:
    config = parse_recipe({"distillation": "dwakd", "dwakd": {"teacher": "big/model"}})
    assert config is not None
    assert config.teacher.base_model == "big/model"
    assert config.variant == config.loss.matching == "mapped"
    assert (config.loss.ce_weight, config.loss.kd_weight, config.loss.dtw_weight) == (0.1, 0.9, 0)
    # What axolotl hands on after its own validation must parse to the same settings.
    dumped = {"distillation": "dwakd", "dwakd": config.model_dump()}
    assert parse_recipe(dumped) == config
    assert parse_recipe({"base_model": "small"}) is None


@pytest.mark.parametrize(
    ("own", "variant", "weights"),
    [
        ({"loss": {"ce_weight": 0.4, "temperature": 2.0}}, "mapped", (0.4, 0.9, 0)),
        ({"loss": {"divergence": "reverse_kl"}}, "mapped", (0.1, 0.9, 0)),
        ({"variant": "mapped", "loss": {"kd_weight": 0.5}}, "mapped", (0.1, 0.5, 0)),
        ({"loss": {"dtw_weight": 0.1}}, "paper", (0.5, 0.5, 0.1)),
        ({"loss": {"matching": "attention"}}, "paper", (0.5, 0.5, 0.2)),
        ({"loss": {"matching": "mapped"}}, "mapped", (0.1, 0.9, 0)),
        ({"loss": {"matching": "mapped", "dtw_weight": 0.1}}, "mapped", (0.1, 0.9, 0.1)),
        ({"loss": {"cosine_weight": 1, "dtw_weight": 0.1}}, "mapped", (0.1, 0.9, 0.1)),
        (
            {"loss": {"cosine_weight": 1}, "projectors": {"init": "random", "warmup_steps": 9}},
            "mapped",
            (0.1, 0.9, 0),
        ),
        ({"loss": {"cosine_weight": 0, "dtw_weight": 0.1}}, "paper", (0.5, 0.5, 0.1)),
        ({"soft_dtw": {"band": False}}, "paper", (0.5, 0.5, 0.2)),
        ({"projectors": {"warmup_steps": 10}}, "paper", (0.5, 0.5, 0.2)),
        ({"variant": "full"}, "full", (0.5, 0.5, 0.2)),
    ],
)
def test_a_recipe_without_a_variant_means_what_its_settings_belong_to(
    own: dict[str, Any], variant: str, weights: tuple[float, float, float]
) -> None:
    config = parse_recipe({"distillation": "dwakd", "dwakd": {**TEACHER, **own}})
    assert config is not None and config.variant == variant
    loss = config.loss
    assert (loss.ce_weight, loss.kd_weight, loss.dtw_weight) == weights
    assert parse_recipe({"distillation": "dwakd", "dwakd": config.model_dump()}) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_one_switch(variant: str) -> None:
    config = DWAKDConfig.model_validate({**TEACHER, "variant": variant})
    for block, values in VARIANTS[variant].items():
        for key, value in values.items():
            assert getattr(getattr(config, block), key) == value
    again = parse_recipe({"distillation": "dwakd", "dwakd": config.model_dump()})
    assert again == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_flattening", True),
        *[("rl", kind) for kind in ("dpo", "ipo", "orpo", "kto", "simpo", "grpo", "gdpo")],
        ("reward_model", True),
        ("process_reward_model", True),
        ("pretraining_dataset", [{"path": "wiki"}]),
        ("streaming", True),
        ("loss_watchdog_threshold", 5.0),
    ],
)
def test_other_kinds_of_training_are_refused(key: str, value: Any, recipe: Recipe) -> None:
    with pytest.raises(UserError, match=re.escape(f"{key}: {value} — ")):
        check_recipe(ReadRecipe(recipe({}, **{key: value})))


OTHER_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "preferences": (
        {"rl": "dpo", "datasets": [{"path": "hub/pairs", "type": "chat_template.default"}]},
        "rl: dpo — distillation is supervised fine-tuning",
    ),
    "unpaired preferences": (
        {
            "rl": "kto",
            "rl_beta": 0.1,
            "datasets": [{"path": "hub/rated", "type": "llama3.ultra"}],
        },
        "rl: kto — distillation is supervised fine-tuning",
    ),
    "rewards": (
        {"rl": "grpo", "trl": {"beta": 0.001, "reward_funcs": ["rewards.length"]}},
        "rl: grpo — distillation is supervised fine-tuning",
    ),
    "a reward model": (
        {
            "reward_model": True,
            "model_type": "AutoModelForTokenClassification",
            "datasets": [{"path": "hub/pairs", "type": "bradley_terry.chat_template"}],
        },
        "reward_model: True — distillation trains a causal language model",
    ),
    "pretraining": (
        {"pretraining_dataset": [{"path": "hub/web", "type": "pretrain"}], "datasets": None},
        "distillation needs rows with a response; use `datasets`",
    ),
    "plain text": (
        {"datasets": [{"path": "hub/web", "type": "completion"}]},
        "hub/web has `type: completion`, which is plain text to continue",
    ),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_recipe_of_another_kind_is_refused_before_anything_starts(
    kind: str, recipe: Recipe, lab: Path, tmp_path: Path
) -> None:
    """As a user would try it: a recipe that axolotl takes, a teacher from the command line."""
    settings, message = OTHER_KINDS[kind]
    effective, _ = with_distillation(recipe(None, **settings), {"base_model": str(lab / "teacher")})
    with pytest.raises(UserError, match=re.escape(message)):
        check_all(ReadRecipe(effective))
    assert not (tmp_path / "out").exists()


def test_hooks_end_the_process_with_a_message(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    settings = recipe({"teacher": {"base_model": "/nowhere/teacher"}})
    plugin = DWAKDPlugin()
    plugin.register(DictDefault(settings))
    with pytest.raises(SystemExit) as stopped:
        plugin.load_datasets(DictDefault(settings))
    assert stopped.value.code == 1


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_out_of_memory_in_a_step_ends_with_remedies(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Any) -> None:
        raise error

    monkeypatch.setattr(AxolotlTrainer, "train", fail)
    trainer = object.__new__(DWAKDTrainer)
    trainer.args = SimpleNamespace(world_size=1)
    with pytest.raises(SystemExit) as stopped:
        DWAKDTrainer.train(trainer)
    assert stopped.value.code == 1
    assert "Out of memory in the student's step" in caplog.text
    assert "micro_batch_size" in caplog.text


def test_an_output_folder_of_another_run_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    settings = recipe({})
    check_output_folder(ReadRecipe(settings))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run already"):
        check_output_folder(ReadRecipe(settings))
    (tmp_path / "out" / "dwakd").mkdir()
    (tmp_path / "out" / "dwakd" / "run.json").write_text(
        '{"identity": {"student": "other", "teacher": "another", "adapter": "none"}}'
    )
    with pytest.raises(UserError, match="another teaching other"):
        check_output_folder(ReadRecipe(settings))
    resuming = settings | {"auto_resume_from_checkpoints": True}
    with pytest.raises(UserError, match="teacher: another there"):
        check_output_folder(ReadRecipe(resuming))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dwakd": {"teacher": {"base_model": "x"}, "los": {}}}, "did you mean `loss`?"),
        (
            {"dwakd": {"teacher": {"base_model": "/nowhere"}}},
            "`/nowhere` cannot be found",
        ),
    ],
)
def test_axolotl_itself_shows_the_message_and_no_traceback(
    change: dict[str, Any], message: str, recipe: Recipe, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe({}) | change), encoding="utf-8")
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(file), "--launcher", "python"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "dwakd_plugin/plugin.py" not in result.stdout + result.stderr
