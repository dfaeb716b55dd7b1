"""The commands on a recipe of a baseline."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from dwakd_cli.main import app
from dwakd_plugin.errors import UserError

Recipe = Callable[..., dict[str, Any]]


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


def test_a_warm_up_of_its_own_needs_labels_that_the_projected_teacher_learns(
    recipe: Recipe, write: Any
) -> None:
    file = write(recipe({"variant": "mapped", "loss": {"cosine_weight": 1.0}}))
    with pytest.raises(UserError, match=r"no projector learns the labels.*warmup_steps: 100"):
        CliRunner().invoke(app, ["warmup", str(file)], catch_exceptions=False)


@pytest.mark.slow
def test_align_draws_the_pairs_of_mapped_where_it_has_projectors(
    recipe: Recipe, write: Any
) -> None:
    file = write(recipe({"variant": "mapped", "loss": {"cosine_weight": 1.0}}))
    report = json.loads(
        CliRunner().invoke(app, ["align", str(file), "--json"], catch_exceptions=False).stdout
    )
    state = report["samples"][0]["states"]["before training"]
    assert state["attention_entropy"] == 0 and 0 < state["hidden_path_in_band"] <= 1.001


@pytest.mark.slow
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
