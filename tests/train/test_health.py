"""Warnings about a distillation that does nothing: each for its own defect, and none without."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dwakd_cli.main import app
from dwakd_plugin.models.projectors import PROJECTOR_FILE, Projectors, save_projectors
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.train import child_process, health
from dwakd_plugin.train.health import (
    HEALTH_FILE,
    WINDOW_LINES,
    WINDOW_STEPS,
    Health,
    shares,
    standing_in,
    write_report,
)
from dwakd_plugin.train.run_folder import RUN_FILE
from tests.conftest import ROWS

Recipe = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]

# What the quickstart logs (docs/reading_the_curves.md), and what belongs to it.
WELL = {
    "epoch": 0.5,
    "ce": 4.86,
    "t2s_accuracy": 0.915,
    "gate": 0.87,
    "chance": 0.06,
    "teacher_ce": 2.9,
    "paired_ce": 4.86,
    "teacher_end_ce": 1.9,
    "end_ce": 1.4,
    "attention_entropy": 0.36,
    "attention_spread": 2.9,
    "attention_limit": 3.4,
    "hidden_dtw": 0.7,
    "embed_dtw": 0.2,
    "kd_share": 0.3,
    "dtw_share": 0.01,
}
DEFECTS: dict[str, dict[str, float]] = {
    "t2s_at_chance": {"t2s_accuracy": 0.07},
    "gate_low": {"gate": 0.03},
    "attention_uniform": {"attention_entropy": 3.39, "attention_spread": 3.4},
    "attention_collapsed": {"attention_entropy": 0.01, "attention_spread": 0.02},
    "teacher_worse": {"teacher_ce": 5.3},
    "teacher_misses_ends": {"teacher_end_ce": 6.48},
    "dtw_dominates": {"dtw_share": 0.93},
    "kd_negligible": {"kd_share": 0.002},
}


def healthy(**settings: Any) -> Health:
    own = {key: settings.pop(key) for key in list(settings) if key in DWAKDConfig.model_fields}
    if "matching" not in own.get("loss", {}):
        own = {"variant": "paper"} | own  # which has all that can go wrong
    config = DWAKDConfig.model_validate({"teacher": "big", **own})
    return Health(config, **settings)


def names(found: Health, *, standing: bool = True) -> list[str]:
    return [alarm.name for alarm in found.alarms if alarm.until is None or not standing]


def observe(found: Health, steps: range, figures: dict[str, float]) -> list[str]:
    """The new warnings of a line every so many steps, with a little noise on soft-DTW."""
    said = []
    for step in steps:
        noise = {name: figures[name] + 0.003 * math.sin(step) for name in health.DTW}
        said += found.observe(step, figures | noise)
    return said


# The figures alone ----------------------------------------------------------------------------


def test_a_run_that_goes_well_raises_nothing() -> None:
    found = healthy(cold_start=False)
    assert observe(found, range(1, 300), WELL) == []
    assert found.report() == {"step": 299, "warnings": []}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_has_its_warning_once_until_it_was_well(name: str) -> None:
    found = healthy(cold_start=False)
    bad = WELL | DEFECTS[name]
    assert observe(found, range(1, WINDOW_STEPS), bad) == []  # the first window is not full
    assert len(observe(found, range(WINDOW_STEPS, 200), bad)) == 1
    assert names(found) == [name]
    # Some good lines are not yet well.
    assert observe(found, range(200, 230), WELL) == []
    assert observe(found, range(230, 320), bad) == [] and names(found) == [name]
    assert observe(found, range(400, 560), WELL) == [] and names(found) == []
    assert len(observe(found, range(560, 700), bad)) == 1
    first, second = found.report()["warnings"]
    assert first["until"] < 560 <= second["since"] and second["until"] is None


@pytest.mark.parametrize(
    ("name", "figure", "advice"),
    [
        ("t2s_at_chance", "7.0% of the tokens", "dwakd.projectors.warmup_steps: 250"),
        ("gate_low", "3.00% on average", "dwakd.loss.kd_warmup_steps: 200"),
        ("attention_uniform", "3.39 nats of at most 3.40", "`dwakd align`"),
        ("attention_collapsed", "0.01 nats", "learning_rate (now 0.001) to 0.0003"),
        ("teacher_worse", "5.30 nats per student token", "dwakd.teacher.adapter"),
        ("teacher_misses_ends", "6.48 nats, and the student 1.40", "dwakd.teacher.adapter"),
        # 93 % of the loss at 0.2: at 0.004 it were 20 %.
        ("dtw_dominates", "93% of the loss", "dtw_weight (now 0.2) to 0.004"),
        ("kd_negligible", "0.20% of the loss", "kd_weight (now 0.5) to 6e+01"),
    ],
)
def test_a_warning_has_the_figure_and_what_to_try(name: str, figure: str, advice: str) -> None:
    found = healthy(cold_start=False)
    (said,) = observe(found, range(1, 60), WELL | DEFECTS[name])
    assert figure in said and advice in said, said


def test_a_window_has_lines_enough_however_far_apart() -> None:
    found = healthy(cold_start=False)
    lines = range(100, 100 * (WINDOW_LINES + 1), 100)
    bad = WELL | DEFECTS["dtw_dominates"]
    assert observe(found, lines, bad) == []
    assert len(observe(found, range(lines.stop, lines.stop + 1), bad)) == 1


def test_ends_are_judged_in_evaluation_too() -> None:
    found = healthy()
    (said,) = found.observe(300, {"eval_teacher_end_ce": 6.4, "eval_end_ce": 2.0})
    assert "6.40 nats" in said and names(found) == ["teacher_misses_ends"]
    assert healthy().observe(300, {"eval_teacher_end_ce": 2.9, "eval_end_ce": 2.0}) == []


def test_one_bad_line_in_a_window_is_not_judged_by_itself() -> None:
    found = healthy(cold_start=False)
    assert observe(found, range(10, 100, 10), WELL) == []
    assert observe(found, range(100, 101), WELL | {"t2s_accuracy": 0.0, "dtw_share": 0.99}) == []


def test_projectors_have_the_time_that_the_settings_give_them() -> None:
    bad = WELL | {"t2s_accuracy": 0.0, "gate": 0.0, "attention_entropy": 3.39, "kd_share": 0.0}
    found = healthy(cold_start=False, settled_after=120)
    observe(found, range(1, 170), bad)
    assert names(found) == ["kd_negligible"]  # which no warm-up changes
    observe(found, range(170, 172), bad)
    assert {"t2s_at_chance", "gate_low", "attention_uniform"} < set(names(found))


def test_the_teacher_is_compared_on_rows_that_the_student_has_not_seen() -> None:
    by_heart = WELL | {"epoch": 1.5, "paired_ce": 1.0}
    found = healthy(cold_start=False)
    assert observe(found, range(1, 200), by_heart) == []
    assert found.observe(200, {"eval_teacher_ce": 2.9, "eval_paired_ce": 4.0}) == []
    (said,) = found.observe(300, {"eval_teacher_ce": 2.9, "eval_paired_ce": 2.0})
    assert "2.90 nats" in said and names(found) == ["teacher_worse"]
    assert observe(found, range(301, 400), by_heart) == [] and names(found) == ["teacher_worse"]
    assert found.observe(400, {"eval_teacher_ce": 1.9, "eval_paired_ce": 2.0}) == []
    assert names(found) == ["teacher_worse"]
    assert found.observe(500, {"eval_teacher_ce": 1.9, "eval_paired_ce": 2.0}) == []
    assert names(found) == []


def test_pairs_are_counted_where_tokens_are_matched_exactly() -> None:
    figures = {name: WELL[name] for name in ("hidden_dtw", "embed_dtw")} | {"paired_share": 0.12}
    (said,) = observe(healthy(variant="dwakdv2", cold_start=False), range(1, 60), figures)
    assert "Only 12% of the student's tokens" in said
    assert observe(healthy(cold_start=False), range(1, 60), figures) == []  # another meaning there
    mapped = {"variant": "mapped", "cold_start": False}
    assert len(observe(healthy(**mapped), range(1, 60), figures)) == 1
    assert observe(healthy(**mapped), range(1, 60), figures | {"spelt_share": 0.3}) == []


def test_soft_dtw_is_flat_only_where_it_never_fell() -> None:
    judged_at = WINDOW_STEPS * (1 + health.FLAT_WINDOWS) + 1
    flat = healthy()
    assert observe(flat, range(1, judged_at), WELL) == []
    (said,) = observe(flat, range(judged_at, judged_at + 100), WELL)
    assert "hidden_dtw 0.70" in said and "dtw_weight (now 0.2) to 0.6" in said
    assert observe(flat, range(400, 510), WELL | {"embed_dtw": 0.15}) == []
    assert names(flat) == []

    falling = healthy()
    for step in range(1, 100):
        assert (
            observe(falling, range(step, step + 1), WELL | {"embed_dtw": 0.3 - step / 1000}) == []
        )
    # With the gamma of its schedule it rises again, and has done its work.
    assert observe(falling, range(100, 600), WELL | {"hidden_dtw": 0.9, "embed_dtw": 0.3}) == []


def test_short_responses_leave_the_attention_nothing_to_choose() -> None:
    limit = math.log(3)
    short = {"attention_entropy": limit, "attention_spread": limit, "attention_limit": limit}
    assert observe(healthy(cold_start=False), range(1, 200), WELL | short) == []


def test_own_answers_that_unlearn_to_end() -> None:
    """Against their first line, whenever they began; a run without them has no such figure."""
    own = {"share": 0.5, "start_after": 40}
    for later, words in ((0.9, None), (0.6, "74% of them end by themselves")):
        found = healthy(variant="mapped", own_answers=own, cold_start=False)
        assert observe(found, range(1, 40), WELL) == []
        said = observe(found, range(40, 60), WELL | {"own_ended": 0.95})
        # It is said as soon as a window's mean is below, before all of it is.
        said += observe(found, range(60, 150), WELL | {"own_ended": later})
        assert names(found) == ([] if words is None else ["own_answers_unend"])
        if words:
            assert words in said[0] and "95% did at first" in said[0]
            assert "start_after, now 40" in said[0]


def test_shares_of_the_loss() -> None:
    weighted = {"ce": 4.0, "t2s_ce": 1.0, "student_kd": 2.0, "teacher_kd": 1.0, "uld": 0.0}
    found = shares(weighted | {"hidden_dtw": 2.0, "embed_dtw": -0.1})
    assert found == pytest.approx({"kd_share": 0.3, "dtw_share": 0.2})
    assert shares({"ce": 0.0}) == {}


# Runs with something wrong on purpose -----------------------------------------------------------


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WINDOW_STEPS", 6)


def warnings_of(settings: dict[str, Any]) -> dict[str, str]:
    report = json.loads((Path(settings["output_dir"]) / HEALTH_FILE).read_text())
    assert report["step"] == settings["max_steps"]
    assert standing_in(Path(settings["output_dir"])) == [
        warning["message"] for warning in report["warnings"] if warning["until"] is None
    ]
    return {warning["name"]: warning["message"] for warning in report["warnings"]}


@pytest.mark.usefixtures("short_windows")
def test_random_projectors_that_do_not_learn_and_a_random_teacher(
    recipe: Recipe, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    still = {"init": "random", "learning_rate": 1e-12}
    soft_dtw = {"gamma_end": 2.0}
    settings = recipe(
        {"projectors": still, "soft_dtw": soft_dtw},
        max_steps=32,
        save_steps=32,
        learning_rate=1e-12,
    )
    log = train(settings)
    found = warnings_of(settings)
    assert {"t2s_at_chance", "gate_low", "teacher_worse", "dtw_flat"} <= set(found)
    assert "dwakd.projectors.init: auto" in found["t2s_at_chance"]
    for message in found.values():  # then, and at the end
        assert caplog.text.count(message[:26]) == 2, message
    assert log[0]["teacher_ce"] > log[0]["ce"] > 0


def with_query(folder: Path, weight: float, bias: float) -> dict[str, Any]:
    """Projectors of the tiny pair in a file, whose queries are the same for all tokens."""
    torch.manual_seed(0)
    projectors = Projectors(24, 40)
    with torch.no_grad():
        projectors.query.weight.mul_(weight)
        projectors.query.bias.copy_(bias * torch.randn(80))
    save_projectors(projectors.state_dict(), folder / PROJECTOR_FILE, {})
    return {"path": str(folder / PROJECTOR_FILE), "learning_rate": 1e-12}


@pytest.mark.slow
@pytest.mark.usefixtures("short_windows")
def test_queries_of_zero_look_everywhere(recipe: Recipe, train: Train, tmp_path: Path) -> None:
    projectors = with_query(tmp_path, weight=0.0, bias=0.0)
    settings = recipe({"projectors": projectors}, max_steps=8, save_steps=8)
    train(settings)
    found = warnings_of(settings)
    assert "attention_uniform" in found and "attention_collapsed" not in found
    assert "dtw_flat" not in found  # the projectors come from a file: there may be no way to go


@pytest.mark.slow
@pytest.mark.usefixtures("short_windows")
def test_huge_queries_look_at_one_place_and_a_huge_weight_drowns_the_rest(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    projectors = with_query(tmp_path, weight=0.0, bias=1e4)
    loss = {"dtw_weight": 1000.0}
    settings = recipe({"projectors": projectors, "loss": loss}, max_steps=8, save_steps=8)
    train(settings)
    found = warnings_of(settings)
    assert {"attention_collapsed", "dtw_dominates", "kd_negligible"} <= set(found)
    assert "attention_uniform" not in found


def test_a_run_too_short_to_judge_says_nothing_and_forgets_what_lay_there(
    recipe: Recipe, train: Train, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(
        {"loss": {"dtw_weight": 0.0}}, max_steps=1, save_steps=1, micro_batch_size=len(ROWS)
    )
    file = Path(settings["output_dir"]) / HEALTH_FILE
    file.parent.mkdir(parents=True)
    stale = {"name": "gate_low", "since": 60, "message": "of another run", "until": None}
    file.write_text(json.dumps({"step": 99, "warnings": [stale]}))
    seen: dict[str, float] = {}
    judge = Health.observe

    def observe(self: Health, step: int, figures: dict[str, float]) -> list[str]:
        seen.update(figures)
        return judge(self, step, figures)

    monkeypatch.setattr(Health, "observe", observe)
    log = train(settings)
    assert warnings_of(settings) == {}

    # And what a run gives to be judged.
    (arrow,) = Path(settings["dataset_prepared_path"]).rglob("*.arrow")
    rows = load_from_disk(str(arrow.parent))
    labels = Counter(label for row in rows["labels"] for label in row if label != -100)
    assert seen["chance"] == pytest.approx(max(labels.values()) / labels.total())
    assert seen["dtw_share"] == 0 and 0 < seen["kd_share"] < 1
    assert seen["paired_ce"] == pytest.approx(log[0]["ce"], abs=1e-4)
    teacher, nats = AutoModelForCausalLM.from_pretrained(lab / "teacher"), 0.0
    for ids, own in zip(rows["teacher_input_ids"], rows["teacher_labels"], strict=True):
        with torch.no_grad():
            mean = teacher(torch.tensor([ids]), labels=torch.tensor([own])).loss.item()
        nats += mean * sum(label != -100 for label in own[1:])
    assert log[0]["teacher_ce"] == pytest.approx(nats / labels.total(), rel=1e-4)
    assert seen["attention_entropy"] <= seen["attention_spread"] <= seen["attention_limit"]
    assert seen["teacher_end_ce"] > 0 and seen["end_ce"] > 0


def test_the_command_tells_what_stood_when_a_run_was_stopped(
    recipe: Recipe,
    write: Callable[[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = recipe({})
    out = Path(settings["output_dir"])
    stopped_by: list[int | None] = [signal.SIGINT, None]

    def execute(*arguments: Any, **further: Any) -> tuple[int, int | None]:
        found = healthy(cold_start=False)
        observe(found, range(1, 60), WELL | DEFECTS["dtw_dominates"] | DEFECTS["gate_low"])
        found.alarms[0].until = 59
        (out / RUN_FILE).write_text(json.dumps({"identity": {}}))
        write_report(found, out)
        return 0, stopped_by.pop(0)

    monkeypatch.setattr(child_process, "execute", execute)
    arguments = ["train", str(write(settings))]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    words = " ".join(result.output.split())
    assert result.exit_code == 130
    assert "Until then: The projected teacher is unsure" in words and "Soft-DTW" not in words

    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    (warning,) = json.loads(result.stdout)["warnings"]
    assert "The projected teacher is unsure" in warning
