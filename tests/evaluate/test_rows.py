"""Evaluation rows, the prompts made of them, and the models that read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.figures import read
from dwakd_plugin.evaluate.model import Held, find_model, load_config, load_model
from dwakd_plugin.evaluate.rows import (
    Encoded,
    Format,
    choose_format,
    encode,
    prompt_text,
    read_rows,
    recipe_rows,
)
from dwakd_plugin.recipe import Recipe as ReadRecipe
from tests.conftest import CHAT_TEMPLATE, ROWS, write_rows
from tests.evaluate.conftest import ALPACA, TEXTS


def test_rows_of_every_kind_are_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Why?", "output": ["Because.", "So."]},
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "Goodbye"},
            ]
        },
    ]
    one, two, three = read_rows(write_rows(tmp_path / "rows.jsonl", rows))
    assert one.references == ("Because.", "So.")
    assert two.messages == ({"role": "user", "content": "Add\n\n1 2"},)
    assert [m["content"] for m in three.messages] == ["Hi", "Hello", "Bye"]
    assert three.references == ("Goodbye",)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert read_rows(tmp_path / "rows.json") == [one, two, three]
    form = Format("text", "as asked", "Q: {instruction} [{input}]\nA:")
    odd = read_rows(
        write_rows(
            tmp_path / "odd.jsonl", [{"instruction": "{input}?", "input": "{x}", "output": "y"}]
        )
    )[0]
    assert prompt_text(odd, form, None) == "Q: {input}? [{x}]\nA:"


def test_a_prompts_format_is_the_one_that_was_trained_on(lab: Path, tmp_path: Path) -> None:
    rows = read_rows(lab / "test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(lab / "student")
    chatty = AutoTokenizer.from_pretrained(lab / "teacher")
    plain = find_model(str(lab / "student"))
    assert choose_format("auto", rows, plain, tokenizer).kind == "alpaca"
    assert choose_format("auto", rows, plain, chatty).kind == "chat"
    run = tmp_path / "run"
    shutil.copytree(lab / "teacher", run / "checkpoint-3")
    (run / "dwakd").mkdir()
    for data, expected in ((["a (alpaca)"], "alpaca"), (["a (chat_template)"], "chat")):
        (run / "dwakd" / "run.json").write_text(json.dumps({"data": data}))
        form = choose_format("auto", rows, find_model(str(run / "checkpoint-3")), chatty)
        assert form.kind == expected and "trained" in form.why
    (run / "dwakd" / "run.json").write_text(json.dumps({"data": ["a (input_output)"]}))
    with pytest.raises(UserError, match="Give the recipe itself"):
        choose_format("auto", rows, find_model(str(run / "checkpoint-3")), chatty)
    with pytest.raises(UserError, match="has no chat template"):
        choose_format("chat", rows, plain, tokenizer)
    with pytest.raises(UserError, match=r"no \{input\}"):
        choose_format("Q: {instruction}", rows, plain, tokenizer)
    with pytest.raises(UserError, match="nor a file"):
        choose_format("alpca", rows, plain, tokenizer)


def test_a_recipes_rows_are_those_that_training_sees(
    lab: Path, recipe: Callable[..., dict[str, Any]], encoded: list[Encoded]
) -> None:
    settings = recipe(
        {}, test_datasets=[{"path": str(lab / "test.jsonl"), "type": "alpaca", "split": "train"}]
    )
    readers = [
        (find_model(str(lab / name)), tokenizer, [tokenizer.eos_token_id])
        for name in ("student", "teacher")
        for tokenizer in [AutoTokenizer.from_pretrained(lab / name)]
    ]
    texts, (students, teachers) = recipe_rows(ReadRecipe(settings), readers)
    assert texts == TEXTS
    assert students == encoded
    rows = read_rows(lab / "test.jsonl")
    assert teachers == [encode(row, ALPACA, readers[1][1], readers[1][2]) for row in rows]


def test_held_out_rows_of_a_chat_recipe_without_a_teacher(
    lab: Path, tmp_path: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in ROWS
    ]
    file = write_rows(tmp_path / "chats.jsonl", chats)
    settings = recipe(
        None,
        base_model=str(lab / "teacher"),
        datasets=[{"path": str(file), "type": "chat_template"}],
        val_set_size=5,
        train_on_inputs=True,
    )
    source = find_model(str(lab / "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(lab / "teacher")
    texts, (rows,) = recipe_rows(
        ReadRecipe(settings), [(source, tokenizer, [tokenizer.eos_token_id])]
    )
    assert len(texts) == 5
    plain = {row.references[0]: row for row in read_rows(file)}
    for text, row in zip(texts, rows, strict=True):
        assert row == encode(plain[text], Format("chat", ""), tokenizer, [tokenizer.eos_token_id])
        assert tokenizer.decode(row.prompt).endswith("<|im_start|>assistant\n")
    with pytest.raises(UserError, match="no evaluation rows"):
        recipe_rows(ReadRecipe(settings | {"val_set_size": 0}), [(source, tokenizer, [0])])


def test_an_adapter_is_its_base_model_with_it(lab: Path, tmp_path: Path, encoded: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(lab / "student", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    source = find_model(str(tmp_path / "adapter"))
    assert source.tokenizer == str(lab / "student")
    held = Held(device="cpu")
    loaded = load_model(source, load_config(source, trust_remote_code=False), held)
    expected = read(adapted.eval(), encoded)
    for one, other in zip(read(loaded, encoded), expected, strict=True):
        np.testing.assert_allclose(one.bits, other.bits, rtol=1e-3, atol=1e-4)


def test_the_chat_templates_end_of_turn_ends_an_answer(lab: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lab / "teacher")
    tokenizer.chat_template = CHAT_TEMPLATE
    row = read_rows(lab / "test.jsonl")[0]
    prompt, response = encode(row, Format("chat", ""), tokenizer, [])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert response[-1] == end  # and not the line break after it
    assert tokenizer.decode(response[:-1]) == row.references[0]
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
