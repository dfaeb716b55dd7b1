"""What some of a recipe's rows say of its data sets, before all are tokenised."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from dwakd_plugin.data.packing import check_packing, check_packing_of_teacher
from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.schema import TeacherConfig
from dwakd_plugin.train.open_run import look_at_data
from tests.conftest import ROWS, write_rows
from tests.families import FAMILIES, create

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture
def found(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a look at a recipe's data finds, which loads no model; empty where nothing is wrong."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    def look(dwakd: dict[str, Any] | None = None, **settings: Any) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(PreTrainedModel, "from_pretrained", refuse)
            try:
                look_at_data(ReadRecipe(recipe(dwakd or {}, **settings)))
            except UserError as error:
                return str(error)
        return ""

    return look


def test_every_data_set_that_cannot_be_used_is_named_with_what_to_do(
    found: Callable[..., str], lab: Path, tmp_path: Path
) -> None:
    good = str(lab / "rows.jsonl")
    chats = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    ]
    rows = {
        "chats": chats,
        "empty": [row | {"output": ""} for row in ROWS],
        "questions": [{"question": "?"}],
    }
    files = {name: str(write_rows(tmp_path / f"{name}.jsonl", each)) for name, each in rows.items()}
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction"')
    words = found(
        datasets=[
            {"path": good, "type": "alpaca"},
            {"path": good, "type": "alpacca"},
            {"path": good, "type": "zzz"},
            {"path": files["chats"], "type": "chat_template"},
            {"path": files["empty"], "type": "alpaca"},
            {"path": files["questions"], "type": "alpaca"},
            {"path": str(broken), "type": "alpaca"},
        ],
        test_datasets=[{"path": good, "type": "alpaca:", "split": "held"}],
    )
    expected = {
        "datasets[1]": "axolotl has no data set type `alpacca`; did you mean `alpaca`?",
        "datasets[2]": "axolotl has no data set type `zzz`; the usual ones are `alpaca`",
        "datasets[3]": "has no chat template, and .* needs one. .*`chat_template: chatml`",
        "datasets[4]": "No row of the data is left to train on: 40 rows dropped: no response",
        "datasets[5]": "doesn't fit its type: KeyError",
        "datasets[6]": "Row 2 of .* is not JSON",
        "test_datasets[0]": "it cannot be loaded: ValueError: .*held",
    }
    blocks = dict(re.findall(r"^(\w+\[\d\]) \(.*?\): (.*(?:\n(?!\w+\[).*)*)", words, re.M))
    assert blocks.keys() == expected.keys()
    for place, message in expected.items():
        assert re.search(message.replace("?", r"\?"), blocks[place]), place


def test_empty_answers_of_chats_are_no_answers(
    found: Callable[..., str], lab: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 9)
    words = found(
        base_model=str(lab / "teacher"), datasets=[{"path": str(data), "type": "chat_template"}]
    )
    assert "No row of the data is left to train on: 9 rows dropped: no response" in words


def test_rows_that_train_are_looked_for(found: Callable[..., str], tmp_path: Path) -> None:
    """One row of sixty trains, and isn't among the first that are looked at."""
    empty = [ROWS[0] | {"output": ""}] * 59
    some = write_rows(tmp_path / "some.jsonl", [*empty[:31], ROWS[0], *empty[31:]])
    assert found(datasets=[{"path": str(some), "type": "alpaca"}]) == ""
    # What only a GPU has, and what isn't installed here, is no matter of rows.
    settings = {"bf16": True, "adapter": "lora", "lora_r": 4, "attn_implementation": "sdpa"}
    assert found(lora_target_modules=["q_proj"], **settings) == ""


def test_a_teacher_that_mixes_packed_rows_is_found_by_its_architecture(
    found: Callable[..., str], tmp_path: Path
) -> None:
    opt = {"teacher": {"base_model": str(create("opt", tmp_path / "opt"))}}
    assert found(opt) == ""
    words = found(opt, sample_packing=True)
    assert "The teacher (OPTForCausalLM, attention sdpa) mixes rows" in words
    assert "sample_packing: false" in words


@pytest.mark.parametrize("name", FAMILIES)
def test_the_architecture_says_what_the_teacher_would(name: str, tmp_path: Path) -> None:
    folder = create(name, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    config = TeacherConfig(base_model=str(folder), attn_implementation="sdpa")

    def mixes(check: Callable[[], None]) -> bool:
        try:
            check()
        except UserError:
            return True
        return False

    early = mixes(lambda: check_packing_of_teacher(config, "cpu"))
    assert early == mixes(lambda: check_packing(model, "The teacher", "", 2))
    assert early == name.startswith("opt")
