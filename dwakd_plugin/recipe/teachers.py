"""Several teachers in a recipe: what each has beside the keys of one, and one taken alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.blocks import Name
from dwakd_plugin.recipe.messages import about, nearest
from dwakd_plugin.recipe.teacher import TeacherConfig


class NamedTeacher(TeacherConfig):
    """One of several teachers: all keys of `dwakd.teacher`, and what it teaches."""

    name: str = Field(
        description="What logs, reports and `--teacher` call it: letters, digits, `.`, `_`, `-`.",
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="How much it says where a row has other teachers too: its share of their sum.",
    )
    datasets: list[Name] | None = Field(
        None,
        min_length=1,
        description="The data sets whose rows it teaches, by their `path` in the recipe; default: "
        "all.",
    )

    @field_validator("name")
    @classmethod
    def _fit_for_logs_and_files(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ValueError(
                "it stands in log lines and file names: take letters, digits, `.`, `_` and `-`, 64 "
                "at most, beginning with a letter or a digit"
            )
        return name

    def teaches(self, path: str) -> bool:
        """Whether it teaches the rows of a data set with this `path`."""
        return self.datasets is None or path in self.datasets


def check_names(block: dict[str, Any]) -> None:
    """Raises ValueError where a `dwakd:` block names no teacher, or one twice."""
    teachers = block.get("teachers")
    if "teachers" not in block:
        if block.get("teacher") is None:
            raise about("teacher", "none is named; give one, or several as `teachers`")
    elif block.get("teacher") is not None:
        raise about(
            "teachers",
            "the recipe names both `teacher` and `teachers`; put the one into the list of others",
        )
    elif not teachers:
        raise about("teachers", "`teachers` is empty; name one at least, or give `teacher`")
    names = [*names_of(teachers)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise about(
            "teachers",
            f"two of `teachers` are called {' and '.join(twice)}; logs and files tell them apart "
            "by their names, so give each its own",
        )


def names_of(teachers: Any) -> Iterator[str]:
    """The names that `dwakd.teachers` has, whether or not it can be used."""
    for one in teachers if isinstance(teachers, list) else ():
        if isinstance(one, dict) and isinstance(name := one.get("name"), str):
            yield name


def with_one_of(recipe: dict[str, Any], name: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """A recipe of several teachers with one of them alone, and the data sets that it teaches.

    given: settings that go before its own. No name means the only one there is. Raises UserError
    where no teacher has the name.
    """
    block = recipe["dwakd"]
    teachers = [one for one in block["teachers"] if isinstance(one, dict)]
    names = [one.get("name") for one in teachers]
    if name is None and len(names) == 1:
        (name,) = names
    if name is None:
        raise UserError(
            f"The recipe has several teachers ({', '.join(map(str, names))}), and what the command "
            "line says is of one: name it (`--teacher NAME`), or write it into the recipe."
        )
    if name not in names:
        near = nearest(name, names_of(teachers))
        raise UserError(
            f"None of the recipe's teachers is called `{name}`; "
            + (f"did you mean `{near}`?" if near else f"they are: {', '.join(map(str, names))}")
        )
    one = teachers[names.index(name)]
    recipe = recipe | {"dwakd": block | {"teachers": [one | given]}}
    if isinstance(taught := one.get("datasets"), list):
        named = {str(path) for each in teachers for path in each.get("datasets") or ()}
        for key, left_out in (("datasets", None), ("test_datasets", named)):
            if isinstance(sets := recipe.get(key), list):
                recipe[key] = [
                    each
                    for each in sets
                    if not isinstance(each, dict)
                    or each.get("path") in taught
                    or (left_out is not None and str(each.get("path")) not in left_out)
                ]
    return recipe
