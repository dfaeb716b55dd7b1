"""Recipes that nobody would write: a valid configuration or a message that names the place."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.reading import read_recipe, with_distillation
from dwakd_plugin.recipe.schema import DWAKDConfig, parse_recipe
from dwakd_plugin.train.preflight import check_all
from tests.fuzz.cases import cases, located

# Whatever PyYAML's safe loader can make of a text.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**40, 10**400]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e-30, 1e30, 1e300, math.inf, -math.inf, math.nan]),
    st.text(max_size=20),
    st.sampled_from(["", " ", "\0", "a\0b", "../../x", "~", "~nobody/x", "/", ".", "x" * 5000]),
    st.sampled_from(["\ud800", "[red]", "\x1b[2J", "1e3", "yes", "auto", "${HOME}", "{{ x }}"]),
    st.binary(max_size=5),
    st.dates(),
    st.datetimes(),
)
KEYS = st.one_of(
    st.text(max_size=10),
    st.integers(),
    st.none(),
    st.booleans(),
    st.floats(),
    st.binary(max_size=3),
    st.dates(),
    st.tuples(st.integers(), st.text(max_size=3)),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.sets(st.text(max_size=3), max_size=2),
    ),
    max_leaves=6,
)


def _paths(block: type[Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in block.model_fields.items():
        yield (*prefix, name)
        if hasattr(field.annotation, "model_fields"):
            yield from _paths(field.annotation, (*prefix, name))


PATHS = list(_paths(DWAKDConfig))


def _put(block: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    block = copy.deepcopy(block)
    inner = block
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    return block


LOADED = {"base_model": "big"}
SERVED = {"server": "http://host/v1", "tokenizer": "big"}


@given(st.sampled_from(PATHS), JUNK, st.sampled_from([LOADED, SERVED]))
@cases(150, 4000)
@example(("loss", "temperature"), math.inf, LOADED)
@example(("loss", "temperature"), 1e-300, LOADED)
@example(("soft_dtw", "gamma_end"), 1e300, LOADED)
@example(("variant",), ["dskd"], LOADED)
@example(("teacher", "chat_template"), 3, LOADED)
@example(("loss", "chunk_size"), False, LOADED)
@example(("loss", "chunk_size"), 1.5, LOADED)
@example(("teacher", "sequence_len"), 16**5000, LOADED)
# Values that are right alone, and wrong beside what the recipe says elsewhere.
@example(("loss", "matching"), "order", LOADED)
@example(("teacher", "model"), [], LOADED)
@example(("teacher", "int8_threshold"), 6.0, LOADED)
@example(("teacher", "load_in_8bit"), True, SERVED)
@example(("teacher", "tokenizer"), None, SERVED)
@example(("teacher", "server"), "host", SERVED)
@example(("own_answers",), {}, SERVED)
def test_one_wrong_value_is_located(
    path: tuple[str, ...], value: Any, teacher: dict[str, Any]
) -> None:
    block = _put({"teacher": teacher}, path, value)
    try:
        config = parse_recipe({"distillation": "dwakd", "dwakd": block})
    except UserError as error:
        if path == ("teacher",) and not value:
            located(str(error), "needs a teacher")
        elif path == ("teacher", "server") and value is None:
            located(str(error), "dwakd.teacher.base_model")
        else:
            located(str(error), ".".join(("dwakd", *path)))
        return
    assert config is not None
    _usable(config)


def _usable(config: DWAKDConfig) -> None:
    """A valid configuration is the same after a round trip, and holds no number that is none."""
    dumped = config.model_dump()
    assert parse_recipe({"distillation": "dwakd", "dwakd": dumped}) == config
    json.loads(json.dumps(dumped, allow_nan=False))


@given(st.lists(st.tuples(st.sampled_from([(), *PATHS]), KEYS, JUNK), min_size=1, max_size=4))
@cases(100, 3000)
@example([((), 3, None)])
@example([(("loss",), None, 1)])
@example([(("teacher",), "base_model ", "x")])
@example([(("loss",), "\ud800", 1)])
@example([(("teacher", "device"), "x" * 100_000, 1)])
def test_further_keys_are_refused_by_name(
    further: list[tuple[tuple[str, ...], Any, Any]],
) -> None:
    block: dict[str, Any] = {"teacher": {"base_model": "big"}}
    for path, key, value in further:
        inner = block
        for part in path:
            following = inner.get(part)
            inner[part] = inner = dict(following) if isinstance(following, dict) else {}
        inner[key] = value
    try:
        config = parse_recipe({"distillation": "dwakd", "dwakd": block})
    except UserError as error:
        located(str(error))
        return
    assert config is not None
    _usable(config)


TOP_KEYS = [
    "base_model",
    "datasets",
    "output_dir",
    "dwakd",
    "distillation",
    "plugins",
    "fsdp_config",
    "fsdp_version",
    "deepspeed",
    "context_parallel_size",
    "sequence_parallel_degree",
    "test_datasets",
    "adapter",
    "lora_model_dir",
    "tokenizer_config",
    "resume_from_checkpoint",
    "auto_resume_from_checkpoints",
    "loss_watchdog_threshold",
    "batch_flattening",
    "sample_packing",
    "rl",
]


@given(
    st.dictionaries(st.one_of(st.sampled_from(TOP_KEYS), KEYS), JUNK, min_size=1, max_size=4),
    st.booleans(),
)
@cases(100, 3000)
@example({"context_parallel_size": "two"}, True)
@example({"datasets": {"path": "x"}}, True)
@example({"output_dir": "a\0b"}, True)
@example({"output_dir": 3}, True)
@example({"base_model": "x" * 5000}, True)
@example({"fsdp_config": "full_shard"}, True)
@example({"deepspeed": 3}, True)
@example({"plugins": "dwakd_plugin.DWAKDPlugin"}, False)
def test_a_recipe_is_checked_whatever_it_holds(changed: dict[Any, Any], whole: bool) -> None:
    recipe = {
        "base_model": "small",
        "datasets": [{"path": "rows/of/some/folder.jsonl", "type": "alpaca"}],
        "distillation": "dwakd",
        "dwakd": {"teacher": "big"},
    }
    recipe = recipe | changed if whole else changed
    try:
        effective, changes = with_distillation(recipe, {"base_model": "big"})
        check_all(ReadRecipe(effective))
    except UserError as error:
        located(str(error))
        return
    assert all(map(str.strip, changes))


YAML = st.one_of(
    st.text(max_size=60),
    st.binary(max_size=60),
    st.lists(
        st.sampled_from(
            [
                *("dwakd:", "teacher:", "&a ", "*a", "!!int x", "!!float y", "!!bool z", "!!str"),
                *("!!timestamp t", "!!binary =", "!!set {a}", "!!omap [a: 1]", "!!map a"),
                *("!!python/object:os.system {}", "!<tag:yaml.org,2002:null> x", "? [1]: 2"),
                *("2024-99-99", "0x", "0b2", "1:99", "<<: 3", "[", "]", "{", "}", "- ", "\n"),
                *("\n  ", ": ", "'", '"', "\t", "|", ">", "%YAML 9.9", "---", "...", "\0", "#"),
                *("\ud800", ",", "base_model: x", "1" * 5000),
            ]
        ),
        max_size=8,
    ).map("".join),
    st.dictionaries(st.sampled_from(TOP_KEYS), JUNK, max_size=4).map(
        lambda recipe: _dumped(recipe)
    ),
)


def _dumped(recipe: Any) -> str:
    try:
        return yaml.safe_dump(recipe, allow_unicode=True)
    except (ValueError, yaml.YAMLError, UnicodeError):
        return repr(recipe)


@given(content=YAML)
@cases(150, 4000)
@example(content="a: 2024-99-99")
@example(content="a: !!int x")
@example(content="a: !!bool maybe")
@example(content="a: !!timestamp later")
@example(content="a: " + "[" * 5000)
@example(content="a: " + "1" * 5000)
@example(content="dwakd: &a {teacher: *a}\ndistillation: dwakd")
@example(content="a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]")
@example(content=b"\xff\xfe\x00")
@example(content="!!python/object/apply:os.system [id]")
def test_a_file_is_a_recipe_or_a_message(content: str | bytes, scratch: Path) -> None:
    file = scratch / "recipe.yml"
    file.write_bytes(
        content.encode(errors="surrogatepass") if isinstance(content, str) else content
    )
    try:
        recipe, _ = with_distillation(read_recipe(file), {"base_model": "big"})
        check_all(ReadRecipe(recipe))
    except UserError as error:
        located(str(error))
