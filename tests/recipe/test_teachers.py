"""Several teachers in a recipe: what is read, what is refused, and one taken alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.checks import check_recipe, check_taught
from dwakd_plugin.recipe.places import check_files
from dwakd_plugin.recipe.schema import parse_recipe

Recipe = Callable[..., dict[str, Any]]
MATHS = {"name": "maths", "base_model": "big", "datasets": ["a.jsonl"]}
CODE = {"name": "code", "base_model": "other", "weight": 0.5}
DATA = [{"path": path, "type": "alpaca"} for path in ("a.jsonl", "b.jsonl")]


def keys(*teachers: Any, **block: Any) -> dict[str, Any]:
    return {
        "base_model": "small",
        "datasets": DATA,
        "distillation": "dwakd",
        "dwakd": {"teachers": [*teachers], **block},
    }


def test_one_in_the_list_is_the_teacher_and_a_dump_is_read_again() -> None:
    (alone, listed, both) = (
        parse_recipe(each)
        for each in (
            {"distillation": "dwakd", "dwakd": {"teacher": {"base_model": "other"}}},
            keys(CODE),
            keys(MATHS, CODE),
        )
    )
    assert alone is not None
    assert listed is not None
    assert both is not None
    named = {"name", "weight", "datasets"}
    assert alone.teacher.model_dump() == listed.teacher.model_dump(exclude=named)
    assert [one.name for one in alone.each_teacher] == ["teacher"]
    assert [(one.name, one.weight) for one in both.each_teacher] == [("maths", 1), ("code", 0.5)]
    assert both.teacher.base_model == "big"
    assert both.of(both.teachers[1]).each_teacher == (both.teachers[1],)
    for config in (alone, listed, both):
        assert ("teacher" in config.model_dump()) == (config is alone)
        assert parse_recipe({"distillation": "dwakd", "dwakd": config.model_dump()}) == config


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"teachers": []}, "`teachers` is empty; name one at least"),
        ({"teachers": None}, "`teachers` is empty"),
        ({"teachers": 3}, "dwakd.teachers: Input should be a valid list (found: 3)"),
        ({"teachers": [CODE], "teacher": "big"}, "names both `teacher` and `teachers`"),
        ({"teachers": [CODE, CODE | {"base_model": "x"}]}, "two of `teachers` are called code"),
        ({"teachers": [CODE | {"weight": 0}]}, "dwakd.teachers[0].weight: Input should be greater"),
        ({"teachers": [MATHS, CODE | {"weight": -1}]}, "dwakd.teachers[1].weight: Input should be"),
        ({"teachers": [CODE | {"name": "a/b"}]}, "dwakd.teachers[0].name: it stands in log lines"),
        ({"teachers": ["big"]}, "dwakd.teachers[0].name: Field required"),
        ({"teachers": [CODE | {"wieght": 1}]}, "teachers[0].wieght: unknown key; did you mean"),
        ({"teachers": [CODE | {"datasets": []}]}, "dwakd.teachers[0].datasets: List should have"),
        ({"teacher": "big", "loss": {}, "teachrs": []}, "did you mean `teachers`?"),
        (
            {"teachers": [MATHS, CODE], "variant": "paper"},
            "several teachers are for variants without projectors (mapped, uld), and matching "
            "`attention` has them",
        ),
        (
            {"teachers": [MATHS, CODE], "loss": {"cosine_weight": 3}},
            "without projectors (mapped, uld), and dwakd.loss.dtw_weight 0 and cosine_weight 3 "
            "bring them; set both to 0",
        ),
        (
            {"teachers": [MATHS, CODE], "own_answers": {}},
            "dwakd.own_answers: they are judged by one teacher so far, and `teachers` names 2",
        ),
    ],
)
def test_what_is_no_list_of_teachers(block: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe({"distillation": "dwakd", "dwakd": block})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (
            [MATHS | {"datasets": ["aa.jsonl"]}, CODE],
            "dwakd.teachers[0].datasets: aa.jsonl — no `path` of the recipe's data sets; did you "
            "mean `a.jsonl`?",
        ),
        (
            [MATHS],
            "datasets[1].path: b.jsonl — none of the teachers (maths) teaches it; name it",
        ),
    ],
)
def test_teachers_and_data_sets_must_fit(teachers: list[Any], message: str) -> None:
    check_taught(ReadRecipe(keys(MATHS, CODE)))
    with pytest.raises(UserError) as error:
        check_taught(ReadRecipe(keys(*teachers)))
    assert message in str(error.value)


def test_one_is_taken_by_its_name_with_the_rows_that_it_teaches() -> None:
    recipe = keys(MATHS | {"adapter": "lora"}, CODE)
    one = ReadRecipe.completed(recipe, {"base_model": "maths", "load_in_8bit": True})
    assert one.written("teachers") == [MATHS | {"adapter": "lora", "load_in_8bit": True}]
    assert one.with_teacher(cache="x").config.teacher.cache == "x"
    assert one.datasets == DATA[:1]
    held_out = recipe | {"test_datasets": [*DATA, {"path": "c.jsonl"}]}
    held_out["dwakd"] = {"teachers": [MATHS, CODE | {"datasets": ["b.jsonl"]}]}
    kept = ReadRecipe.completed(held_out, {"base_model": "maths"}).keys["test_datasets"]
    assert [each["path"] for each in kept] == ["a.jsonl", "c.jsonl"]
    assert ReadRecipe.completed(recipe, {"base_model": "code"}).datasets == DATA
    assert ReadRecipe.completed(keys(CODE), {"cache": "x"}).config.teacher.cache == "x"
    with pytest.raises(UserError, match="called `mahts`; did you mean `maths`"):
        ReadRecipe.completed(recipe, {"base_model": "mahts"})
    with pytest.raises(UserError, match=r"has several teachers \(maths, code\).*--teacher NAME"):
        ReadRecipe.completed(recipe, {"cache": "states"})
    one.check_one_teacher("dwakd adapt")
    with pytest.raises(UserError, match=r"`dwakd adapt` is about one.*--teacher maths"):
        ReadRecipe.completed(recipe, {}).check_one_teacher("dwakd adapt")


def test_what_is_missing_is_named_by_its_teacher(lab: Path, recipe: Recipe) -> None:
    given = recipe({})
    teachers = [CODE | {"base_model": "./gone"}, CODE | {"base_model": str(lab / "teacher")}]
    settings = ReadRecipe(given | {"dwakd": {"teachers": teachers}})
    with pytest.raises(UserError, match=r"dwakd.teachers\[0\].base_model: ./gone — no such folder"):
        check_files(settings)
    check_recipe(settings)
