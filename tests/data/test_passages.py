"""Texts as passages and windows."""

from __future__ import annotations

from dwakd_plugin.data.passages import passages, start_of, windows
from tests import families
from tests.cutting import TEXTS


def test_passages_are_apart_and_windows_whole():
    found = passages(["ab" * 30, "cd" * 20, "", "  "], 10)
    assert sorted(found.choosing + found.held_out) == ["ababababab"] * 6 + ["cdcdcdcdcd"] * 4
    assert len(found.held_out) == 5
    assert passages(["one"], 10) == (["one"], ["one"])
    tokenizer = families._llama2()
    ids = windows(tokenizer, TEXTS, 16, 64)
    assert ids.shape == (4, 16) and (ids[:, 0] == tokenizer.bos_token_id).all()
    joined = [i for text in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert ids[:, 1:].flatten().tolist() == joined[: 4 * 15]
    assert windows(tokenizer, ["a"], 16, 64).shape[0] == 1
    assert start_of(families._gpt2()) == families._gpt2().eos_token_id
