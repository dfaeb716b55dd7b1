"""`dwakd adapt`: the teacher's own recipe, its loss on responses, and when nothing is to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from axolotl.utils.dict import DictDefault
from safetensors.torch import load_file
from typer.testing import CliRunner

from dwakd_cli.main import app
from dwakd_plugin import DWAKDPlugin
from dwakd_plugin.errors import UserError
from dwakd_plugin.models.teacher.loaded import load_teacher
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.schema import TeacherConfig
from dwakd_plugin.tokenizers.loading import load_tokenizer
from dwakd_plugin.train.adaptation import (
    WEIGHTS_FILE,
    adaptation,
    fingerprint,
    response_loss,
)

Recipe = Callable[..., dict[str, Any]]


def adapt(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["adapt", *arguments], catch_exceptions=False)


def test_the_teachers_recipe_has_the_rows_and_nothing_of_the_student(
    recipe: Recipe, write: Callable[..., Path], lab: Path
) -> None:
    settings = recipe(
        {"teacher": {"load_in_4bit": True, "sequence_len": 200}},
        adapter="lora",
        lora_r=64,
        special_tokens={"pad_token": "<s>"},
        num_epochs=20,
        learning_rate=1.0,
        val_set_size=0.2,
    )
    file = write(settings)
    keys = yaml.safe_load(adapt(str(file), "--dry-run", "--rank", "8").stdout)
    assert keys["base_model"] == str(lab / "teacher") and keys["datasets"] == settings["datasets"]
    assert keys["adapter"] == "qlora" and keys["load_in_4bit"] is True and keys["lora_r"] == 8
    assert keys["num_epochs"] == 3 and keys["learning_rate"] == 2e-4
    assert keys["sequence_len"] == 200 and keys["val_set_size"] == 0.2
    assert "distillation" not in keys and "dwakd" not in keys and "special_tokens" not in keys
    assert keys["output_dir"] == settings["output_dir"] + "-teacher"


def test_chats_are_rendered_by_the_teachers_template(recipe: Recipe, lab: Path) -> None:
    chats = [{"path": str(lab / "rows.jsonl"), "type": "chat_template", "chat_template": "llama3"}]
    settings = recipe(
        {"teacher": {"thinking_key": "thoughts"}}, datasets=chats, chat_template="llama3"
    )
    keys = adaptation(ReadRecipe(settings), Path("adapter"))
    own = json.loads((lab / "teacher" / "tokenizer_config.json").read_text())
    own = own.get("chat_template") or (lab / "teacher" / "chat_template.jinja").read_text()
    assert keys["chat_template"] == "jinja" and keys["chat_template_jinja"] == own
    assert keys["datasets"] == [
        {
            "path": chats[0]["path"],
            "type": "chat_template",
            "template_thinking_key": "thoughts",
            "message_property_mappings": {
                "thoughts": "reasoning_content",
                "role": "role",
                "content": "content",
            },
        }
    ]
    assert keys["val_set_size"] == 0.05


def test_a_students_template_is_of_the_revision_that_it_trains(
    recipe: Recipe, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def seen(name: str, title: str, *, revision: str | None) -> Any:
        asked.append((name, revision))
        return load_tokenizer(name, title)

    monkeypatch.setattr("dwakd_plugin.train.adaptation.load_tokenizer", seen)
    teacher = tmp_path / "no-template"
    shutil.copytree(lab / "teacher", teacher)
    (teacher / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (teacher / "tokenizer_config.json").write_text(json.dumps(config))
    chats = [{"path": str(lab / "rows.jsonl"), "type": "chat_template"}]
    settings = recipe(
        {"teacher": {"base_model": str(teacher)}}, datasets=chats, revision_of_model="0123abc"
    )
    with pytest.raises(UserError, match="Neither the teacher nor the student has a chat template"):
        adaptation(ReadRecipe(settings), Path("adapter"))
    asked.clear()
    student = str(lab / "teacher")
    keys = adaptation(ReadRecipe(settings | {"base_model": student}), Path("adapter"))
    assert asked == [(student, "0123abc")]
    assert keys["chat_template_jinja"] == load_tokenizer(student, "It").chat_template


def test_a_changed_row_asks_for_another_adapter(recipe: Recipe, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    settings = recipe({}, datasets=[{"path": str(rows), "type": "alpaca"}])
    before = fingerprint(adaptation(ReadRecipe(settings), Path("adapter")))
    assert fingerprint(adaptation(ReadRecipe(settings), Path("adapter"))) == before
    rows.write_text('{"instruction": "a", "output": "c"}\n')
    assert fingerprint(adaptation(ReadRecipe(settings), Path("adapter"))) != before


def test_the_loss_of_responses_and_of_their_ends(lab: Path) -> None:
    teacher = load_teacher(TeacherConfig(base_model=str(lab / "teacher")), "cpu")
    generator = torch.Generator().manual_seed(0)
    rows, expected, ends = [], [], []
    for length, turns in ((9, [(3, 6), (7, 9)]), (5, [(1, 5)]), (6, []), (12, [(11, 12)])):
        ids = torch.randint(300, (length,), generator=generator)
        labels = torch.full_like(ids, -100)
        for begin, end in turns:
            labels[begin:end] = ids[begin:end]
        rows.append((ids, labels))
        logits = teacher.model(input_ids=ids[None]).logits[0].float()  # type: ignore[misc]
        for begin, end in turns:
            for place in range(begin, end):
                nats = -logits[place - 1].log_softmax(-1)[ids[place]].item()
                (ends if place == end - 1 else expected).append(nats)
    found = response_loss(teacher, rows, batch_size=3)
    assert (found.tokens, found.ends) == (len(expected), len(ends))
    assert found.per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert found.per_end == pytest.approx(sum(ends) / len(ends), rel=1e-5)


def test_what_cannot_be_adapted_is_said_and_nothing_written(
    recipe: Recipe, write: Callable[..., Path], lab: Path, tmp_path: Path
) -> None:
    def message(settings: dict[str, Any], *options: str) -> str:
        with pytest.raises(UserError) as error:
            adapt(str(write(settings)), *options)
        return str(error.value)

    assert "names no teacher" in message(recipe(None))
    assert "no such folder" in message(recipe({"teacher": {"base_model": "./missing"}}))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    adapted = message(recipe({"teacher": {"adapter": str(tmp_path / "lora")}}))
    assert "dwakd.teacher.adapter is" in adapted and "Remove the key" in adapted
    assert not (tmp_path / "out-teacher").exists()
    assert "holds something else" in message(recipe({}), "--output", str(lab / "teacher"))


def test_train_says_that_the_teacher_would_learn_first(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")  # a run that is resumed has one
    arguments = ["train", str(write(recipe({}))), "--adapt", "--dry-run"]
    result = CliRunner().invoke(app, [*arguments, "--resume"], catch_exceptions=False)
    assert result.exit_code == 0
    words = "".join(result.output.split())  # a path may be folded anywhere
    assert "Theteacherwouldlearntherowsfirst" in words and "out-teacher" in words
    assert not (tmp_path / "out-teacher").exists()
    with pytest.raises(UserError, match="holds a run already"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_what_is_left_of_a_checkpoint_is_no_harm(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come while one is written; axolotl would resume from the latest by its name."""
    folder, seen = tmp_path / "out-teacher", []

    def train_logged(file: Path, *_: Any) -> None:
        seen.append(sorted(path.name for path in file.parent.glob("*checkpoint-*")))
        if len(seen) == 1:
            (folder / "checkpoint-10").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("dwakd_cli.logged_run.train_logged", train_logged)
    arguments = str(write(recipe({}, val_set_size=8)))
    for _ in range(2):
        assert adapt(arguments).exit_code == 130
    assert seen == [[], ["incomplete-checkpoint-10"]]


@pytest.mark.parametrize("seed", [0, 7])
def test_a_new_lora_starts_from_the_recipes_seed(seed: int) -> None:
    """axolotl seeds later: two adapters of one recipe had nothing in common."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        DWAKDPlugin().pre_model_load(DictDefault(seed=seed))
        found = torch.rand(4)
        torch.manual_seed(seed)
        assert torch.equal(found, torch.rand(4))


@pytest.mark.slow
def test_a_teacher_learns_once_and_is_found_by_train(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(recipe({}, val_set_size=8))
    options = [str(file), "--epochs", "4", "--learning-rate", "5e-3", "--json"]
    result = adapt(*options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert not report["skipped"] and report["before"]["ends"] == 8
    assert report["after"]["per_token"] < report["before"]["per_token"]
    weights = load_file(tmp_path / "out-teacher" / WEIGHTS_FILE)
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    again = json.loads(adapt(*options).stdout)
    assert again == report | {"skipped": True}
    assert adapt(*options, "--output", str(tmp_path / "second")).exit_code == 0
    second = load_file(tmp_path / "second" / WEIGHTS_FILE)
    assert all(torch.equal(weight, second[name]) for name, weight in weights.items())
    with pytest.raises(UserError, match="another teacher or other settings"):
        adapt(str(file), "--epochs", "1")
