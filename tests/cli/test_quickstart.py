"""The quickstart's stages: true progress, what is kept, what is said when it fails, the report."""

from __future__ import annotations

import doctest
import io
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwakd_cli import logged_run, quickstart, stages
from dwakd_cli.console import PlainConsole
from dwakd_plugin.errors import UserError
from dwakd_plugin.train.launch import axolotl_environment
from dwakd_plugin.train.progress import read_progress
from dwakd_plugin.train.progress_callback import callbacks
from tests.conftest import tiny_recipe

STEPS = 200


@pytest.fixture
def stage(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a stage on a recipe for the tiny student; returns what was heard of its progress."""

    def run(**settings: Any) -> list[tuple[float, list[float]]]:
        keys = tiny_recipe(lab, tmp_path, **settings) | {
            "plugins": ["dwakd_plugin.DWAKDPlugin"],
            "output_dir": "sft",
            "save_strategy": "no",
        }
        keys.pop("save_steps")
        monkeypatch.setattr(quickstart, "_recipe", lambda name: yaml.safe_dump(keys))
        (tmp_path / "sft.yml").write_text(yaml.safe_dump(keys))
        heard: list[tuple[float, list[float]]] = []
        environment = axolotl_environment() | {"HF_HUB_OFFLINE": "1"}
        quickstart.train(
            tmp_path,
            "sft",
            environment,
            lambda share, figures=(): heard.append((share, list(figures))),
        )
        return heard

    return run


@pytest.mark.slow
def test_a_stage_says_how_far_it_is(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "evaluate.py").write_text("raise SystemExit('a file of the user is imported')")
    heard = stage(max_steps=STEPS, logging_steps=1)
    shares = [share for share, _ in heard]
    assert shares == sorted(shares) and shares[0] == 0.0
    assert len({share for share in shares if 0 < share < 1}) > 1
    assert all(len(losses) >= share * STEPS - 1 for share, losses in heard)
    whole = read_progress(tmp_path / "sft.progress.jsonl")
    assert (whole.step, whole.steps, whole.share) == (STEPS, STEPS, 1.0)
    assert len(whole.losses) == STEPS and whole.losses[-1] < 0.6 * whole.losses[0]
    assert quickstart.is_done(tmp_path, "sft")
    # Another recipe, as of another version, is another run.
    (tmp_path / "sft" / "quickstart-done").write_text("another")
    assert not quickstart.is_done(tmp_path, "sft")


@pytest.mark.slow
def test_a_stage_that_fails_shows_the_end_of_its_log(stage: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exit code 1 on .*sft\.yml(?s:.*)not-there"):
        stage(datasets=[{"path": "not-there.jsonl", "type": "alpaca"}])
    assert not quickstart.is_done(tmp_path, "sft")


def test_ctrl_c_in_a_stage_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logged_run, "execute", lambda *_, **__: (143, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        quickstart.train(tmp_path, "sft", {}, lambda share, figures=(): None)


def test_what_is_stopped_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "prepare", stopped)
    monkeypatch.setattr(quickstart.os, "environ", dict(quickstart.os.environ))
    with pytest.raises(KeyboardInterrupt):
        quickstart.run(tmp_path / "first", json_output=False)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Stopped. The same command goes on" in said
        and not (tmp_path / "first/report.json").exists()
    )


def test_progress_is_written_where_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DWAKD_PROGRESS", raising=False)
    assert callbacks() == []
    monkeypatch.setenv("DWAKD_PROGRESS", "steps.jsonl")
    assert len(callbacks()) == 1


def test_a_line_half_written_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    assert read_progress(file).share == 0.0
    file.write_text('{"step": 1, "steps": 4, "loss": 2.5}\n{"step": 2, "st')
    assert read_progress(file) == (1, 4, [2.5])


def test_curves_and_times() -> None:
    assert doctest.testmod(stages).failed == 0
    assert stages.curve([]) == ""
    assert stages.curve([1.0]) == "▁"
    assert len(stages.curve(range(1000))) == 12


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_goes_by_the_pace_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stages.time, "monotonic", clock)
    console = PlainConsole()
    console.file = io.StringIO()
    seen = []
    with stages.Stages(console, {"one": 100.0, "was there": 500.0, "two": 300.0}) as work:

        def half(hear: stages.Hear) -> None:
            clock.now += 100.0  # twice what was expected
            hear(0.5, [3.0, 2.0])
            seen.append(work._bars.tasks[0].fields["note"])
            clock.now += 100.0

        work.run("one", "The first", half)
        work.skip("was there")
        work.run("two", "The second", lambda hear: None)
    assert seen == ["28.5 min left"]  # 850 of 900 to go, at 2 s each
    assert work.seconds == {"one": 200.0, "two": 0.0}
    assert work._bars.tasks[0].total == 400.0 and work._bars.tasks[0].completed == 400.0
    # No terminal: a line where a stage begins, and one where it ends.
    assert (
        console.file.getvalue() == "The first …\nThe first: 200 s\nThe second …\nThe second: 0 s\n"
    )


@pytest.mark.parametrize(
    ("taught", "verdict"),
    [(1.1, "The teacher saved 0.100 bits"), (1.3, "did not help here: 0.100 bits per byte behind")],
)
def test_the_report_has_every_answer_under_its_question(taught: float, verdict: str) -> None:
    answers = {"documentation": "Stop it. " * 30, **dict.fromkeys(quickstart.MODELS, "It\nends.")}
    report = {
        "held_out_rows": 100,
        "bits_per_byte": dict(zip(quickstart.MODELS, (2.0, 1.2, taught, 1.0), strict=True)),
        "answers": [{"question": "What does stop do?", **answers}],
        "warnings": ["A warning."],
        "seconds": {"all": 12.3},
    }
    console = PlainConsole()
    console.file = io.StringIO()
    console.width = 80
    quickstart.show(report, console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    first = lines.index("What does stop do?")
    assert lines[first + 1].startswith("  documentation")
    for title in quickstart.MODELS:
        assert any(line.split(title)[-1].strip() == "It ends." for line in lines if title in line)
    assert verdict in " ".join(console.file.getvalue().split())
    assert lines[-1] == "A warning."
    assert max(map(len, lines)) <= 80


def test_recipes_differ_by_their_teacher_alone() -> None:
    sft, taught = (yaml.safe_load(quickstart._recipe(name)) for name in ("sft", "dwakd"))
    differing = {key for key in {*sft, *taught} if sft.get(key) != taught.get(key)}
    assert differing == {"distillation", "dwakd", "output_dir"}
    row = {"instruction": "What is it?", "input": "", "output": "A list."}
    kind = sft["datasets"][0]["type"]
    assert kind["format"].format(**row) == kind["no_input_format"].format(**row)
    assert kind["format"].format(**row) == quickstart.prompt(row)


def test_threads_wait_without_spinning_unless_the_user_says_so() -> None:
    environment = axolotl_environment({})
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE" and environment["PYTHONSAFEPATH"] == "1"
    assert axolotl_environment({"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"
