"""`dwakd train` and `dwakd recipes`: what is checked, what axolotl is given, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from typer.testing import CliRunner

import dwakd_plugin
from dwakd_cli.axolotl_command import distill
from dwakd_cli.main import app
from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.reading import with_distillation
from dwakd_plugin.train import child_process
from dwakd_plugin.train.launch import prepare
from dwakd_plugin.train.preflight import check_all
from tests.runs import wait_for

Recipe = Callable[..., dict[str, Any]]
COMMAND = [sys.executable, "-c", "from dwakd_cli.main import main; main()"]


def dry_run(file: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(
        app, ["train", str(file), "--dry-run", "--json", *options], catch_exceptions=False
    )
    assert result.exit_code == 0
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def error_of(file: Path, *options: str) -> str:
    with pytest.raises(UserError) as error:
        CliRunner().invoke(app, ["train", str(file), "--dry-run", *options], catch_exceptions=False)
    return str(error.value)


def test_a_variant_goes_before_the_recipes_own(recipe: Recipe, write: Callable[..., Path]) -> None:
    file = write(recipe({"variant": "dskd"}))
    folder = dry_run(file, "--variant", "mapped")["output_dir"]
    launch = prepare(
        file, [], teacher={}, variant="mapped", launcher=None, processes=None, resume=False
    )
    assert launch.seen.config.loss.matching == "mapped" and str(launch.output) == folder
    assert launch.recipe.keys["dwakd"]["variant"] == "mapped"
    message = error_of(file, "--variant", "maped")
    assert "dwakd.variant" in message and "'maped'" in message and "'mapped'" in message


# Before the start ---------------------------------------------------------------------------


def test_a_plain_recipe_takes_a_teacher_without_an_edit(
    recipe: Recipe, write: Callable[..., Path], lab: Path, tmp_path: Path
) -> None:
    plain = recipe(
        None,
        batch_flattening=True,
        loss_watchdog_threshold=5.0,
        plugins=["axolotl.integrations.liger.LigerPlugin"],
    )
    effective, changes = with_distillation(plain, {"base_model": "big", "load_in_8bit": True})
    assert effective["distillation"] == "dwakd"
    assert effective["dwakd"] == {"teacher": {"base_model": "big", "load_in_8bit": True}}
    assert effective["plugins"] == [*plain["plugins"], "dwakd_plugin.DWAKDPlugin"]
    assert not effective["batch_flattening"]
    assert "batch_flattening is off" in changes[0]
    assert "loss_watchdog_threshold" not in effective and "left out" in changes[1]
    assert (
        plain["batch_flattening"] and plain["loss_watchdog_threshold"]
    )  # the caller's is untouched

    teacher = str(lab / "teacher")
    facts = dry_run(write(recipe(None)), "--teacher", teacher, "--load-in-4bit")
    assert (facts["teacher"], facts["teacher_precision"]) == (teacher, "4 bit")
    assert facts["launcher"] == "python"
    assert facts["command"][1:4] == ["-m", "axolotl.cli.main", "train"]
    assert not (tmp_path / "out").exists()


def test_of_several_teachers_each_is_shown_and_other_commands_ask_for_one(
    recipe: Recipe, write: Callable[..., Path], lab: Path
) -> None:
    folder = str(lab / "teacher")
    teachers = [
        {"name": "maths", "weight": 0.7, "cache": "states"},
        {"name": "code", "datasets": [str(lab / "rows.jsonl")]},
    ]
    file = write(recipe({"variant": "mapped", "teachers": teachers}))
    facts = dry_run(file)
    assert [(one["name"], one["weight"], one["teacher"]) for one in facts["teachers"]] == [
        ("maths", 0.7, folder),
        ("code", 1.0, folder),
    ]
    assert facts["teachers"][0]["teacher_cache"] == "states" and "teacher" not in facts
    result = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    shown = f"maths: {folder}, auto, cache states; weight 0.7, of all rows"
    assert "".join(shown.split()) in re.sub(r"[\s│]", "", result.output)  # it is broken into lines
    assert dry_run(file, "--teacher", "code")["teacher_cache"] is None
    for command, how in (
        (["train", str(file), "--adapt"], "--teacher maths"),
        (["train", str(file), "--answers"], "--teacher maths"),
        (["adapt", str(file)], "--teacher maths"),
        (["answers", str(file)], "--teacher maths"),
        (["align", str(file)], "--teacher maths"),
        (["warmup", str(file)], "--teacher maths"),
        (["check", "--data", str(file)], "TEACHER: maths"),
    ):
        with pytest.raises(UserError) as error:
            CliRunner().invoke(app, command, catch_exceptions=False)
        assert f"has several teachers (maths, code), and `dwakd {command[0]}" in str(error.value)
        assert f"is about one: name it (`{how}`)" in str(error.value)


def test_the_command_line_teacher_goes_before_the_recipes(recipe: Recipe) -> None:
    own = {"load_in_8bit": True, "tokenizer": "of-another", "base_model": "other"}
    given = recipe(None) | {"dwakd": {"teacher": own, "loss": {"temperature": 1.0}}}
    effective, _ = with_distillation(given, {"base_model": "big"})
    assert effective["dwakd"]["teacher"] == {"base_model": "big", "load_in_8bit": True}
    assert effective["dwakd"]["loss"] == {"temperature": 1.0}
    same, _ = with_distillation(given, {"base_model": "other", "cache": "states"})
    assert same["dwakd"]["teacher"] == own | {"cache": "states"}
    short, _ = with_distillation({"dwakd": {"teacher": "other"}}, {"load_in_4bit": True})
    assert short["dwakd"]["teacher"] == {"base_model": "other", "load_in_4bit": True}


def test_every_problem_is_named_at_once(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(
        {"los": {}, "projectors": {"path": "gone.safetensors"}},
        base_model="./no-student",
        batch_flattening=True,
        datasets=[{"path": "no-rows.jsonl", "type": "alpaca"}, {"path": "hub/rows"}],
    )
    message = error_of(write(settings))
    for part in (
        "dwakd.los: unknown key; did you mean `loss`?",
        "batch_flattening: True — ",
        "base_model: ./no-student — no such folder",
        "dwakd.projectors.path: gone.safetensors — no such file",
        "datasets[0].path: no-rows.jsonl — no such file",
        "datasets[1].path: hub/rows — no such folder, not among the downloaded data sets",
    ):
        assert part in message
    with monkeypatch.context() as online:
        online.delenv("HF_HUB_OFFLINE")
        assert "hub/rows" not in error_of(write(settings))  # it may be there

    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    bad = recipe({"teacher": {"base_model": "some/teacher"}}, rl="dpo")
    message = error_of(write(bad))
    assert "rl: dpo — " in message
    assert "some/teacher — no such folder, not among the downloaded models" in message  # offline
    assert "holds a run already" in message


def test_a_dry_run_looks_at_the_rows(recipe: Recipe, write: Callable[..., Path], lab: Path) -> None:
    rows = str(lab / "rows.jsonl")
    message = error_of(write(recipe({}, datasets=[{"path": rows, "type": "alpacca"}])))
    assert f"datasets[0] ({rows})" in message and "did you mean `alpaca`?" in message


def test_looking_does_not_touch_checkpoints(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)  # begun, and never finished
    check_all(ReadRecipe(recipe({}, auto_resume_from_checkpoints=True)))
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_an_output_folder_below_a_file_is_refused(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    message = error_of(write(recipe({}, output_dir=str(tmp_path / "file" / "out"))))
    assert "is a file. Give another output_dir." in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("a: [1", "isn't valid YAML"),
        ("- 1", "has no keys"),
        ("base_model: x", "names no teacher. Give one with `--teacher ID`"),
    ],
)
def test_what_is_no_recipe(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    if content is not None:
        file.write_text(content)
    assert message in error_of(file)
    assert "is a folder" in error_of(tmp_path)


def test_further_arguments_reach_axolotl_and_the_checks(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(recipe({}, reward_model=True))
    further = ["--no-reward-model", "--output-dir", "elsewhere", "--learning-rate=1e-4"]
    facts = dry_run(file, "--nproc", "2", "--", *further, "--", "--master_port=29511")
    assert facts["output_dir"] == "elsewhere"
    assert facts["command"][4:] == [
        "elsewhere/dwakd/recipe.yml",
        *["--launcher", "torchrun", *further],
        *["--", "--nproc_per_node", "2", "--master_port=29511"],
    ]
    assert "does not know: --leraning-rate=1" in error_of(file, "--", "--leraning-rate=1")
    assert "before the `--`" in error_of(file, "--", "--launcher", "torchrun")
    assert "runs one recipe, here" in error_of(file, "--", "--sweep", str(file))
    assert "one process" in error_of(file, "--launcher", "python", "--nproc", "2")
    # axolotl drops what a strict recipe does not have, so the checks must not believe it.
    strict = write(recipe({}, strict=True))
    assert dry_run(strict, "--", "--rl", "dpo")["output_dir"] == str(tmp_path / "out")


def test_a_plugin_that_cannot_be_imported_stops_axolotl(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of an ImportError axolotl would only take note, and train without a teacher.
    monkeypatch.setitem(dwakd_plugin._HOMES, "DWAKDPlugin", "dwakd_plugin.not_there")
    PluginManager.get_instance().plugins.clear()
    with pytest.raises(RuntimeError, match="cannot be used in this environment"):
        prepare_plugins(DictDefault(plugins=["dwakd_plugin.DWAKDPlugin"]))


def test_a_run_without_the_plugin_is_an_error(
    recipe: Recipe, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "execute", lambda *_, **__: (0, None))
    with pytest.raises(UserError, match="plugin was not part of it"):
        CliRunner().invoke(app, ["train", str(write(recipe({})))], catch_exceptions=False)


# The process --------------------------------------------------------------------------------


def test_exit_codes_are_passed_through() -> None:
    assert child_process.execute([sys.executable, "-c", "raise SystemExit(7)"], {}) == (7, None)
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert child_process.execute([sys.executable, "-c", killed], {}) == (137, None)


def test_a_second_signal_kills_what_does_not_stop(tmp_path: Path) -> None:
    # A child in a session of its own, as torchrun's workers are, and the first deaf to SIGTERM.
    deaf = (
        "import signal, subprocess, sys, time, pathlib; "
        "signal.signal(signal.SIGTERM, lambda *_: pathlib.Path('heard').touch()); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
        "start_new_session=True); "
        "pathlib.Path('child').write_text(str(child.pid)); time.sleep(60); time.sleep(60)"
    )
    script = (
        "import os, sys; from dwakd_plugin.train.child_process import execute; "
        f"print(execute([sys.executable, '-c', {deaf!r}], dict(os.environ)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    process.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "heard").exists)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0].strip() == f"(137, {int(signal.SIGTERM)})"
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not Path(f"/proc/{child}").exists())


# Recipes ------------------------------------------------------------------------------------


def test_recipes_are_listed_shown_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["recipes", *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return str(result.stdout)

    listed = json.loads(invoke("list", "--json"))
    assert all(recipe["purpose"] and recipe["student"] for recipe in listed)
    (mine,) = [recipe for recipe in listed if recipe["name"] == "quickstart-dwakd"]
    assert (mine["student"], mine["teacher"]) == ("student", "teacher")
    assert "quickstart-dwakd" in invoke("list")

    shown = invoke("show", "quickstart-dwakd")
    assert invoke("copy", "quickstart-dwakd").strip() == "quickstart-dwakd.yml"
    assert (tmp_path / "quickstart-dwakd.yml").read_text() == shown
    with pytest.raises(UserError, match="exists"):
        invoke("copy", "quickstart-dwakd.yml")
    (tmp_path / "quickstart-dwakd.yml").write_text("mine")
    invoke("copy", "quickstart-dwakd", ".", "--force")
    assert (tmp_path / "quickstart-dwakd.yml").read_text() == shown
    with pytest.raises(UserError, match="did you mean `quickstart-sft`"):
        invoke("show", "quickstart-stf")
    with pytest.raises(UserError, match="cannot be written"):
        invoke("copy", "quickstart-sft", "no/such/folder.yml")
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart-dwakd.yml"]


def test_axolotl_has_the_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    context = distill.make_context("distill", ["gone.yml", "--teacher", "x", "--", "--lr", "1"])
    assert context.params["further"] == ("--lr", "1")
    with pytest.raises(SystemExit) as stopped:
        distill.invoke(context)
    assert stopped.value.code == 1
    assert "`gone.yml` does not exist" in capsys.readouterr().err
