"""What is wrong with a value of the recipe, in words: where, what was found, what was meant."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticCustomError


def explain(problem: Any, schema: type[BaseModel], name: str) -> str:
    """One of pydantic's findings in a line: where, what, the value found, and what was meant.

    `schema` is that of the block called `name`.
    """
    path = _place(problem["loc"], schema)
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return unknown_key([*path, str(problem["loc"][-1])], schema, name)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == _ABOUT_A_KEY:
        path.append(problem["ctx"]["key"])
        message = problem["ctx"]["message"]
    value = problem.get("input")
    ending = "" if isinstance(value, dict | BaseModel) else f" ({as_found(value)})"
    return f"{'.'.join([name, *path])}: {message}{ending}"


_ABOUT_A_KEY = "about_a_key"


def about(key: str, message: str) -> PydanticCustomError:
    """What a check of a whole block raises about one of its keys, so that `explain` names it.

    `key` is dotted where it lies in a block within.
    """
    return PydanticCustomError(_ABOUT_A_KEY, "{key}: {message}", {"key": key, "message": message})


def _place(location: tuple[Any, ...], schema: type[BaseModel]) -> list[str]:
    """The keys of a place in the schema: pydantic's also says which part of a union it tried."""
    block: Any = schema
    path: list[str] = []
    for part in location:
        if isinstance(part, int) and path:  # of a list
            path[-1] += f"[{part}]"
            continue
        fields = getattr(block, "model_fields", {})
        if part not in fields:
            break
        path.append(part)
        block = _block_of(fields[part].annotation)
    return path


def _block_of(annotation: Any) -> Any:
    """The block that a key holds, which may be one that can be left out."""
    parts = (annotation, *get_args(annotation))
    return next((part for part in parts if hasattr(part, "model_fields")), annotation)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlevel = 2


def as_found(value: Any) -> str:
    """A value of the recipe in a message; a long or deep one is cut.

    >>> as_found(3)
    'found: 3'
    """
    try:
        return f"found: {_SHORT.repr(value)}"
    except ValueError:  # a number of thousands of digits, which Python does not write out
        return "found: a number beyond all bounds"


def unknown_key(path: list[str], schema: type[BaseModel], name: str) -> str:
    """The place of a key that the block `name` does not have, and the nearest that it has."""
    block: Any = schema
    for key in path[:-1]:
        block = _block_of(block.model_fields[key.partition("[")[0]].annotation)
    known = list(block.model_fields)
    near = nearest(path[-1], known)
    hint = f"did you mean `{near}`?" if near else f"known are: {', '.join(known)}"
    return f"{'.'.join([name, *path])}: unknown key; {hint}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was meant, as far as can be told.

    >>> nearest("coed", ["maths", "code"])
    'code'
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def name_problem(name: str) -> str | None:
    """Why a text can't be the name of a file, folder or model; None where it can."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return "holds a lone surrogate, which no name has"
    if b"\0" in encoded:
        return "holds a NUL character, which no name has"
    if len(encoded) > 4000 or max(map(len, encoded.split(b"/"))) > 255:
        return "is longer than a name can be"
    return None


def check_name(name: str) -> str:
    """The name, for pydantic; raises ValueError where `name_problem` finds something."""
    problem = name_problem(name)
    if problem is not None:
        raise ValueError(f"it {problem}")
    return name
