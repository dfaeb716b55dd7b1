"""What tokenises rows is known by its name: never pickled, where processes are forked."""

from __future__ import annotations

from typing import Any

import dill
import multiprocess
import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher

from dwakd_plugin.data.named_strategy import NamedStrategy


class Counting:
    """As long as its texts; a tokenizer that takes long to pickle."""

    supports_batched = False
    filter_rows = None

    def tokenize_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"length": len(row["text"])}

    def __reduce__(self) -> Any:
        raise AssertionError("pickled")


def test_processes_find_the_strategy_that_they_were_forked_with() -> None:
    named = NamedStrategy(Counting(), "counting")
    rows = Dataset.from_list([{"text": "a" * number} for number in range(6)])
    mapped = rows.map(named.tokenize_prompt, num_proc=2, remove_columns=["text"])
    assert mapped["length"] == list(range(6))


def test_rows_are_known_by_the_name_of_what_made_them() -> None:
    first, same, other = (NamedStrategy(Counting(), name) for name in ("a", "a", "b"))
    one, again, another = (Hasher.hash(each.tokenize_prompt) for each in (first, same, other))
    assert one == again != another


def test_processes_that_are_not_forked_are_given_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocess, "get_start_method", lambda: "spawn")
    monkeypatch.setattr(Counting, "__reduce__", object.__reduce__)
    received = dill.loads(dill.dumps(NamedStrategy(Counting(), "spawned")))
    assert received.tokenize_prompt({"text": "four"}) == {"length": 4}


class Tokenizing(Counting):
    """A token a letter, in the columns of both sides and of the row."""

    def tokenize_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        ids = list(map(ord, row["text"]))
        masks = {"attention_mask": [1] * len(ids), "teacher_labels": [-100, *ids]}
        return {"input_ids": ids, "teacher_input_ids_2": ids[::-1], **masks, "words": ["a", "b"]}


def test_rows_are_written_as_without_a_name() -> None:
    rows = Dataset.from_list([{"text": text} for text in ("", "four", "größte", "")])
    plain = Tokenizing()
    named = NamedStrategy(plain, "tokenizing")
    mapped, expected = (
        rows.map(each.tokenize_prompt, remove_columns=["text"], new_fingerprint=name)
        for each, name in ((named, "named"), (plain, "plain"))
    )
    assert mapped[:] == expected[:]
    assert mapped.features == expected.features
