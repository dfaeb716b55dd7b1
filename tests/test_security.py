"""Files and texts of others: nothing in them runs, leaves its folder, or steers a terminal."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from transformers import AutoTokenizer

from dwakd_cli import train as train_command
from dwakd_cli.alignment_picture import AlignedSample
from dwakd_cli.alignment_picture import html_page as alignment_page
from dwakd_cli.console import PlainConsole
from dwakd_cli.main import error_boundary, main
from dwakd_cli.terminal import progress_bar
from dwakd_cli.token_picture import html_page as check_page
from dwakd_plugin.data.teacher_side import load_teacher_tokenizer
from dwakd_plugin.errors import UserError, printable
from dwakd_plugin.evaluate.model import (
    Held,
    Source,
    find_model,
    load_config,
    load_model,
    run_record,
)
from dwakd_plugin.export.card import model_card
from dwakd_plugin.export.run_student import find_student
from dwakd_plugin.loss import Alignment
from dwakd_plugin.models.projectors import Projectors, load_projectors, save_projectors
from dwakd_plugin.models.teacher.cache import INDEX, LOCK, TeacherCache
from dwakd_plugin.models.teacher.loaded import load_teacher, teacher_config
from dwakd_plugin.plan.model_sizes import model_config
from dwakd_plugin.plan.recipe_models import shared_tokens
from dwakd_plugin.recipe import Recipe as ReadRecipe
from dwakd_plugin.recipe.schema import TeacherConfig
from dwakd_plugin.tokenizers.loading import load_tokenizer
from dwakd_plugin.tokenizers.pair import ByteCutter, cut_both
from dwakd_plugin.tokenizers.side import load_side
from dwakd_plugin.train.launch import prepare
from dwakd_plugin.train.run_folder import check_output_folder, run_facts

Recipe = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for folder in ("dwakd_plugin", "cli", "recipes", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)


# Code -------------------------------------------------------------------------------------------


def _calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a file, by the name that is called, as `torch.load`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _given(call: ast.Call, name: str) -> str | None:
    """An argument as it is written; None where it is not given."""
    found = [ast.unparse(each.value) for each in call.keywords if each.arg == name]
    return found[0] if found else None


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_of_a_file_is_executed(file: Path) -> None:
    """No pickle, no YAML with tags of Python, no shell, no eval, and no trust by default."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in [*node.names, ast.alias(getattr(node, "module", None) or "")]
    }
    assert not imported & {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
    }
    for name, call in _calls(file):
        assert name not in ("eval", "exec", "os.system", "os.popen", "torch.load"), name
        assert name not in ("yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.save"), name
        assert _given(call, "shell") in (None, "False")
        assert _given(call, "allow_pickle") in (None, "False")
        assert _given(call, "weights_only") in (None, "True")
        assert _given(call, "trust_remote_code") != "True"
        assert _given(call, "safe_serialization") != "False"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_loading_says_whether_it_trusts(file: Path) -> None:
    """Where nothing is said, transformers asks on the terminal, and takes a `y`."""
    if "benchmarks" in file.parts:
        return
    for name, call in _calls(file):
        kind, _, method = name.rpartition(".")
        if method == "from_pretrained" and kind.rpartition(".")[2].startswith("Auto"):
            spread = [ast.unparse(each.value) for each in call.keywords if each.arg is None]
            assert _given(call, "trust_remote_code") is not None or "options" in spread, (
                ast.unparse(call)
            )


def test_a_resumed_run_unpickles_tensors_alone() -> None:
    """Optimizer, scheduler and generators of a checkpoint are read by transformers' trainer."""
    loads = [
        call
        for name, call in _calls(Path(str(transformers.trainer.__file__)))
        if name == "torch.load"
    ]
    assert loads
    assert {_given(call, "weights_only") for call in loads} == {"True"}


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_teacher_in_a_pickle_runs_nothing(lab: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "teacher", tmp_path / "ran"
    shutil.copytree(lab / "teacher", folder)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as stream:
        pickle.dump({"model.norm.weight": _Bomb(marker)}, stream)
    with pytest.raises((UserError, pickle.UnpicklingError)) as error:
        load_teacher(TeacherConfig.model_validate(str(folder)), "cpu")
    assert isinstance(error.value, UserError)
    assert not marker.exists()
    with pytest.raises(UserError, match="pickled weights, which are not read"):
        find_model(str(folder))


@pytest.fixture(scope="module")
def trap(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with code of its own, which leaves a file `ran` beside it when it runs."""
    folder = tmp_path_factory.mktemp("trap") / "model"
    shutil.copytree(lab / "teacher", folder)
    (folder / "trap.py").write_text(
        "import pathlib\n"
        f"pathlib.Path({str(folder.parent / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class TrapConfig(LlamaConfig):\n    model_type = 'trap'\n"
        "class TrapModel(LlamaForCausalLM):\n    config_class = TrapConfig\n"
        "class TrapTokenizer(PreTrainedTokenizerFast):\n    pass\n",
        encoding="utf-8",
    )
    for name, changes in {
        "config.json": {
            "model_type": "trap",
            "architectures": ["TrapModel"],
            "auto_map": {"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.TrapModel"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "TrapTokenizer",
            "auto_map": {"AutoTokenizer": ["trap.TrapTokenizer", "trap.TrapTokenizer"]},
        },
    }.items():
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")
    return folder


def _source(folder: Path) -> Source:
    return Source(str(folder), str(folder), None, str(folder))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "a teacher's tokenizer": lambda f: load_teacher_tokenizer(TeacherConfig.model_validate(str(f))),
    "a teacher's config": lambda f: teacher_config(TeacherConfig.model_validate(str(f))),
    "a teacher": lambda f: load_teacher(TeacherConfig.model_validate(str(f)), "cpu"),
    "dwakd check": lambda f: load_side("teacher", str(f), False),
    "dwakd plan": lambda f: model_config(str(f), "base_model", trust_remote_code=False),
    "dwakd plan's tokenizers": lambda f: shared_tokens(str(f), str(f)),
    "dwakd evaluate's tokenizer": lambda f: load_tokenizer(f, "Its tokenizer"),
    "dwakd evaluate's config": lambda f: load_config(_source(f), trust_remote_code=False),
    "dwakd evaluate's model": lambda f: load_model(
        _source(f), transformers.LlamaConfig(), Held("cpu")
    ),
}


@pytest.mark.parametrize("what", LOADERS)
def test_a_models_own_code_does_not_run_unasked(
    what: str, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a hurried user would answer
    with contextlib.suppress(UserError):
        LOADERS[what](trap)
    assert not (trap.parent / "ran").exists()


def test_a_models_own_code_runs_when_asked(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would show nothing."""
    copy = tmp_path / "model"
    shutil.copytree(trap, copy)
    marker = tmp_path / "ran"
    code = (copy / "trap.py").read_text(encoding="utf-8")
    (copy / "trap.py").write_text(code.replace(str(trap.parent / "ran"), str(marker)))
    for module in ("dynamic_module_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{module}.HF_MODULES_CACHE", str(tmp_path / "modules"))
    teacher_config(
        TeacherConfig.model_validate({"base_model": str(copy), "trust_remote_code": True})
    )
    assert marker.exists()


# Paths ------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A teacher cache of one row, and beside it what it must not reach."""
    folder = tmp_path / "cache"
    one = TeacherCache(folder, {"hidden_size": 4})
    one.append({"0" * 32: torch.ones(3, 4)})
    (tmp_path / "outside.safetensors").write_bytes((folder / _shard(folder)).read_bytes())
    return folder


def _shard(folder: Path) -> str:
    return next(file.name for file in folder.glob("states-*"))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "../../x",
        "/etc/passwd",
        "states-/../../outside.safetensors",
        "states-\0.safetensors",
        "..",
        "",
        "other.safetensors",
    ],
)
def test_an_index_names_files_of_the_cache_alone(name: str, cache: Path) -> None:
    index = cache / INDEX
    head, line = index.read_text(encoding="utf-8").splitlines()
    entry = json.loads(line) | {"file": name}
    index.write_text(f"{head}\n{json.dumps(entry)}\n", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        TeacherCache(cache, {"hidden_size": 4})


@pytest.mark.parametrize(
    "line",
    ["3", "[]", "{}", '{"file": 3}', '{"file": "x", "bytes": "y", "crc32": 1}', "null", "[" * 9999],
)
def test_an_index_of_anything_is_damaged(line: str, cache: Path) -> None:
    index = cache / INDEX
    head = index.read_text(encoding="utf-8").splitlines()[0]
    for content in (f"{head}\n{line}\n", f"{line}\n"):
        index.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"damaged"):
            TeacherCache(cache, {"hidden_size": 4})


@pytest.mark.parametrize("name", ["shard", INDEX])
def test_a_cache_follows_no_link(name: str, cache: Path, tmp_path: Path) -> None:
    file = cache / (_shard(cache) if name == "shard" else name)
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(UserError, match="damaged"):
        TeacherCache(cache, {"hidden_size": 4})


def test_a_lock_that_is_a_link_is_not_written_through(cache: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me", encoding="utf-8")
    (cache / LOCK).unlink(missing_ok=True)
    (cache / LOCK).symlink_to(precious)
    opened = TeacherCache(cache, {"hidden_size": 4})
    with pytest.raises(UserError, match="cannot be written"), opened.writing(wait=False):
        pass
    assert precious.read_text(encoding="utf-8") == "keep me"


@pytest.mark.parametrize(
    "signature", ["", "not JSON", "3", "{}", '["a"]', "[" * 9999, "null", '[1, "NaN"]']
)
def test_a_projector_file_of_another_is_refused(signature: str, tmp_path: Path) -> None:
    projectors, file = Projectors(4, 6), tmp_path / "projectors.safetensors"
    ours = {"student_head": "[7, 4, 1.0]", "teacher_head": "[11, 6, 1.0]"}
    save_projectors(projectors.state_dict(), file, ours | {"student_head": signature})
    with pytest.raises(UserError, match="belong to another pair"):
        load_projectors(projectors, file, ours)


def test_a_projector_file_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    file, marker = tmp_path / "projectors.safetensors", tmp_path / "ran"
    file.write_bytes(pickle.dumps(_Bomb(marker)))
    with pytest.raises(UserError, match="cannot be read"):
        load_projectors(Projectors(4, 6), file, {})
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../x"])
def test_an_export_takes_no_weights_from_elsewhere(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "dwakd").mkdir(parents=True)
    (run / "dwakd" / "run.json").write_text("{}", encoding="utf-8")
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"x": name}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="outside of the folder"):
        find_student(run)


JUNK = ["", "null", "3", '"text"', "[]", "[1]", '{"identity": "x"}', "{", "\udcff", "[" * 9999]


@pytest.mark.parametrize("content", JUNK)
def test_a_run_file_of_anything_ends_in_a_message(
    content: str, recipe: Recipe, tmp_path: Path
) -> None:
    from dwakd_plugin.recipe.schema import parse_recipe

    settings = recipe({})
    config = parse_recipe(settings)
    assert config is not None
    out = Path(settings["output_dir"])
    (out / "dwakd").mkdir(parents=True)
    (out / "dwakd" / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    save_file({"x": torch.ones(1)}, out / "model.safetensors")
    with pytest.raises(UserError):
        check_output_folder(ReadRecipe(settings))
    source = _source(out)
    for read in (lambda: find_student(out), lambda: run_record(source)):
        try:
            read()
        except UserError as error:
            assert "damaged" in str(error) or "incomplete" in str(error)


# Texts ------------------------------------------------------------------------------------------

PAYLOAD = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></td><!--"


class _Page(HTMLParser):
    """The elements of a page, and what is wrong with them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form"), tag
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("src", "href"):
                assert (value or "").startswith("data:image/png"), value

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


class _Named:
    """A tokenizer whose tokens have names that attack."""

    def convert_ids_to_tokens(self, _: int) -> str:
        return PAYLOAD


def test_the_page_of_check_shows_texts_and_runs_none(lab: Path) -> None:
    cutters = [
        ByteCutter(AutoTokenizer.from_pretrained(lab / side), side)
        for side in ("teacher", "student")
    ]
    (pair,) = cut_both(*cutters, [PAYLOAD])
    assert pair is not None
    report = {
        "verdict": PAYLOAD,
        "teacher": PAYLOAD,
        "student": PAYLOAD,
        "verdict_reasons": [PAYLOAD],
        "findings": [{"severity": "info", "message": PAYLOAD, "code": PAYLOAD}],
    }
    page = check_page(report, [(PAYLOAD, PAYLOAD)], [(PAYLOAD, pair)], [_Named(), _Named()])
    assert _Page(page).texts.count(PAYLOAD) >= 5


def test_the_page_of_align_shows_texts_and_runs_none() -> None:
    even = torch.full((2, 2), 0.5)
    alignment = Alignment(even, even > 0, even, even)
    tokens = [PAYLOAD, PAYLOAD]
    sample = AlignedSample(1, PAYLOAD, tokens, tokens, {PAYLOAD: alignment})
    facts = {"student": PAYLOAD, "teacher": PAYLOAD, "gamma": 0.8}
    texts = _Page(alignment_page(facts, [(sample, b"\x89PNG")], 8)).texts
    assert any(PAYLOAD in text for text in texts)


WORDS = "[red]a[/red] [/nothing] :smile: \x1b[2J\x1b]0;title\x07\x9b2J\x08\x7f \u202e"


@pytest.mark.parametrize("colour", [False, True])
def test_the_terminal_obeys_no_text(
    colour: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "400")
    console = PlainConsole()
    table = Table(title=WORDS, caption=WORDS)
    table.add_column(WORDS)
    table.add_row(WORDS)
    table.add_row(Text(WORDS, "red"))
    console.print(table)
    console.print(Panel(Text(WORDS), title=Text(WORDS)))
    console.print(WORDS, style="yellow")
    with progress_bar(console) as progress:
        progress.add_task(WORDS, total=1)
    out = capsys.readouterr().out
    assert out.count("[red]a[/red] [/nothing] :smile: \\x1b[2J\\x1b]0;") >= 8
    assert "\x1b[2J" not in out and "\x1b]" not in out
    assert not {"\x07", "\x08", "\x7f", "\x9b", "\u202e"} & set(out)


def test_an_error_message_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), error_boundary():
        raise UserError(f"The model {WORDS} of https://me:secret@host/x?token=secret is not there.")
    said = capsys.readouterr().err
    assert printable(WORDS) in said
    assert "secret" not in said


NO_FOLDERS = ["x" * 5000, "/dev/null/x"]
NAMES = [*NO_FOLDERS, "~nobody-of-this-name/x", "[/x]/y"]
NAMED = [
    ["train", "NAME"],
    ["check", "NAME", "gpt2"],
    ["evaluate", "NAME", "rows.jsonl"],
    ["export", "NAME", "dest"],
    ["recipes", "copy", "quickstart-dwakd", "NAME"],
]


@pytest.mark.parametrize(
    ("arguments", "name"),
    # A folder of any name will do for the quickstart, and then it takes minutes.
    [*product(NAMED, NAMES), *product([["quickstart", "--folder", "NAME"]], NO_FOLDERS)],
)
def test_a_name_of_anything_ends_in_a_message(
    arguments: list[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dwakd", *(name if a == "NAME" else a for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert stopped.value.code in (0, 1) and (arguments[0] == "recipes" or stopped.value.code)
    assert "Traceback" not in said.err and (said.err.strip() or stopped.value.code == 0)


def test_commands_write_to_no_other_console() -> None:
    for file in (ROOT / "cli").glob("*.py"):
        names = {name for name, _ in _calls(file)}
        assert not names & {"Console", "rich.print", "Text.from_markup", "rich.console.Console"}


# Secrets ----------------------------------------------------------------------------------------

SECRET = "s3cr3t-0123456789abcdef"
VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "MY_TOKEN")


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)


def _told(folder: Path) -> list[str]:
    return [
        str(file)
        for file in folder.rglob("*")
        if file.is_file() and SECRET.encode() in file.read_bytes()
    ]


def test_a_secret_of_the_recipe_goes_into_no_file(
    secrets: None, recipe: Recipe, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"https://me:{SECRET}@host/rows.jsonl?token={SECRET}"
    keys = {"hub_token": SECRET, "wandb_api_key": SECRET, "comet_api_key": SECRET}
    monkeypatch.delenv("HF_TOKEN")
    settings = recipe({}, **keys, datasets=[{"path": address, "type": "alpaca"}])
    launch = prepare(
        write(settings),
        [],
        teacher={},
        variant=None,
        launcher="python",
        processes=None,
        resume=False,
    )
    assert launch.environment["HF_TOKEN"] == launch.environment["COMET_API_KEY"] == SECRET
    assert len([change for change in launch.recipe.changes if "into no file" in change]) == 3
    assert SECRET not in json.dumps(train_command._facts(launch))
    # axolotl needs the address as it is.
    launch.write_recipe("recipe.yml")
    written = yaml.safe_load(launch.file.read_text(encoding="utf-8"))
    assert not keys.keys() & written.keys()
    assert SECRET not in json.dumps(run_facts(ReadRecipe(settings)))


def export_report(destination: str) -> dict[str, Any]:
    """What an export says of itself, as the model card takes it."""
    return {
        "kind": "full",
        "destination": destination,
        "parameters": 1,
        "dtype": "float32",
        "verification": {
            "relative_logit_difference": 0,
            "tolerance": 0,
            "tokens_compared": 1,
            "tokens_generated": 1,
        },
    }


@pytest.mark.slow
def test_a_secret_of_the_environment_goes_into_no_file(
    secrets: None,
    recipe: Recipe,
    train: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = recipe({}, save_steps=4)
    log = train(settings)
    out = Path(settings["output_dir"])
    record = json.loads((out / "dwakd" / "run.json").read_text(encoding="utf-8"))
    card = model_card(record, log, export_report(str(out)))
    assert SECRET not in card
    assert str(tmp_path) not in card
    assert not _told(out)
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


def test_a_run_file_cannot_write_into_the_card() -> None:
    evil = "x | y\n---\n<script>\n# Title"
    record = {"identity": {"student": evil, "teacher": evil}, "data": [evil], "version": "1"}
    card = model_card(record, [], export_report("out"))
    assert "<script>" not in card
    assert "\n# Title" not in card
    assert card.count("\n---\n") == 1  # the header's end


# The wheel --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = ["pyproject.toml", "README.md", "LICENSE", "dwakd_plugin", "cli", "recipes", "tests"]
    for name in [*names, "benchmarks", "docs"]:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, source / name)
    for stray in (".env", "dwakd_plugin/.env", "dwakd_plugin/key.pem", "cli/notes.txt"):
        (source / stray).write_text(SECRET, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = tmp_path.glob("dwakd-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        inside = opened.namelist()
        contents = b"".join(opened.read(name) for name in inside)
    expected = {
        f"{package}/{file.relative_to(ROOT / folder)}"
        for package, folder in (
            ("dwakd_plugin", "dwakd_plugin"),
            ("dwakd_cli", "cli"),
            ("dwakd_recipes", "recipes"),
        )
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".yml") or file.name == "py.typed"
    }
    packed = {name for name in inside if ".dist-info/" not in name}
    assert packed == expected
    assert SECRET.encode() not in contents
    about = {name.partition(".dist-info/")[2] for name in inside} - {""}
    assert about == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }
