"""Each side's chat template: by name, file or text, and refused where it cannot be meant."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dwakd_plugin.data.row_report import KEPT
from dwakd_plugin.errors import UserError
from tests.conftest import CHAT_TEMPLATE
from tests.data.test_answers import Prepare, chat, chats
from tests.data.test_dual_tokenization import prepare

__all__ = ["chats", "prepare"]  # fixtures


def test_a_run_without_a_teachers_side_stops(
    chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    rows = [chat("2+2?", "<think>two and two</think>four", "x?", "<think>y</think>z")]
    with pytest.raises(UserError, match="No row of the data has a teacher's side"):
        prepare(chats(rows, {"teacher": {"chat_template": "qwen3"}}))


@pytest.mark.parametrize("kind", ["name", "file", "mark", "jinja", "named"])
def test_a_teachers_template_goes_by_name_file_or_text(
    kind: str, chats: Callable[..., dict[str, Any]], prepare: Prepare, tmp_path: Path, lab: Path
) -> None:
    (tmp_path / "own.jinja").write_text(("\ufeff" if kind == "mark" else "") + CHAT_TEMPLATE)
    teacher = tmp_path / "teacher"
    shutil.copytree(lab / "teacher", teacher)
    if kind == "named":
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        tokenizer.chat_template = {"default": CHAT_TEMPLATE, "rag": "{{ messages[0].content }}"}
        (teacher / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(teacher)
    asked = {
        "name": "chatml",
        "file": str(tmp_path / "own.jinja"),
        "mark": str(tmp_path / "own.jinja"),  # with a byte-order mark, as some editors write it
        "jinja": CHAT_TEMPLATE,
        "named": None,
    }
    block = {"teacher": {"base_model": str(teacher), "chat_template": asked[kind]}}
    datasets, report = prepare(chats([chat("And?", "Nothing.")] * 3, block))
    assert report.counts == {KEPT: 3}
    text = AutoTokenizer.from_pretrained(teacher).decode(
        datasets.train_dataset[0]["teacher_input_ids"]
    )
    assert text.startswith("<|im_start|>user\nAnd?<|im_end|>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("chatlm", "neither Jinja, nor a file"),
        ("{{ bos_token }}hello", "leaves out what was said"),
        ("{{ raise_exception('no') }}", "cannot render a question and its answer"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused(
    template: str, words: str, chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    with pytest.raises(UserError, match=words):
        prepare(chats([chat("And?", "Nothing.")], {"teacher": {"chat_template": template}}))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"chat_template_jinja": "none.jinja"}, "`none.jinja` is neither Jinja nor a file"),
        ({"chat_template_jinja": "own.jinja"}, "begins with a byte-order mark"),
        ({"chat_template": "chatlm"}, "cannot be read: Template 'chatlm' not found"),
    ],
)
def test_a_students_template_that_cannot_be_meant_is_refused(
    template: dict[str, str],
    words: str,
    chats: Callable[..., dict[str, Any]],
    prepare: Prepare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.jinja").write_text("\ufeff" + CHAT_TEMPLATE)
    settings = chats([chat("And?", "Nothing.")], {})
    settings["datasets"][0] |= {"chat_template": "jinja"} | template
    with pytest.raises(UserError, match=words):
        prepare(settings)


def test_the_teachers_turns_end_as_its_template_has_it(
    chats: Callable[..., dict[str, Any]], prepare: Prepare, tmp_path: Path, lab: Path
) -> None:
    """A base model's end of sequence isn't in ChatML: its answers would have no labelled end."""
    teacher = tmp_path / "teacher"
    shutil.copytree(lab / "teacher", teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(teacher)
    datasets, report = prepare(
        chats([chat("And?", "Nothing.")], {"teacher": {"base_model": str(teacher)}})
    )
    labels = [label for label in datasets.train_dataset[0]["teacher_labels"] if label != -100]
    assert tokenizer.decode(labels) == "Nothing.<|im_end|>"
    assert report.unpaired_ends.get("student", 0) == 0
