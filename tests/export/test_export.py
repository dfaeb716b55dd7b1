"""`dwakd export`: the run's student and nothing else, whole or not there at all."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dwakd_cli import export as export_command
from dwakd_cli.main import app
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.model import Held, find_model, load_config, load_model
from dwakd_plugin.export import export as module
from dwakd_plugin.export import verify
from dwakd_plugin.export.card import model_card
from dwakd_plugin.export.export import export
from dwakd_plugin.export.hub import check_push, push
from dwakd_plugin.export.new_process import NewProcess
from dwakd_plugin.export.run_student import find_student, load_student
from dwakd_plugin.io.folders import new_folder
from tests.conftest import CHAT_TEMPLATE

PRIVATE = "/home/somebody/models"
LOG = [
    {"loss": 3.0, "ce": 2.5, "student_kd": 0.4, "step": 1},
    {"loss": 2.0, "ce": 1.75, "student_kd": 0.25, "step": 2},
    {"eval_loss": 1.875, "step": 2},
]
TEXT = "Function 3 returns the median of its 4 arguments."


def sign(run: Path, student: str) -> None:
    """What a run leaves beside its student."""
    (run / "dwakd").mkdir(parents=True, exist_ok=True)
    record = {
        "identity": {"student": student, "teacher": f"{PRIVATE}/big-teacher", "adapter": "none"},
        "version": "0.1.0",
        "settings": {
            "variant": "full",
            "teacher": {"base_model": f"{PRIVATE}/big-teacher", "load_in_8bit": True},
            "loss": {"temperature": 1.5},
            "projectors": {"path": f"{PRIVATE}/projectors.safetensors"},
        },
        "data": ["rows.jsonl (alpaca)"],
        "training": {"learning_rate": 0.001},
    }
    (run / "dwakd" / "run.json").write_text(json.dumps(record))
    save_file({"query.weight": torch.ones(2, 2)}, run / "dwakd" / "projectors.safetensors")
    (run / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))


@pytest.fixture(scope="module")
def full_run(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of full fine-tuning in float32, with a chat template and an end of turn."""
    run = tmp_path_factory.mktemp("full")
    model = AutoModelForCausalLM.from_pretrained(lab / "student")
    tokenizer = AutoTokenizer.from_pretrained(lab / "student")
    tokenizer.chat_template = CHAT_TEMPLATE
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    sign(run, str(lab / "student"))
    return run


@pytest.fixture(scope="module")
def lora_run(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run that added two tokens to its student's vocabulary."""
    run = tmp_path_factory.mktemp("lora")
    tokenizer = AutoTokenizer.from_pretrained(lab / "student")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(run)
    model = AutoModelForCausalLM.from_pretrained(lab / "student")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj"], modules_to_save=["embed_tokens"]
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(run)
    with torch.no_grad():
        logits = adapted(**tokenizer(TEXT, return_tensors="pt")).logits
    save_file({"logits": logits}, run / "expected-logits")
    sign(run, str(lab / "student"))
    return run


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads exports back in this process, for tests of something else: a new one takes seconds."""

    class ThisProcess(NewProcess):
        def __enter__(self) -> ThisProcess:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def verify(self, request: dict[str, Any]) -> dict[str, Any]:
            try:
                return verify._verify(json.loads(json.dumps(request)))
            except UserError as error:
                raise UserError(f"The export cannot be used, and was not kept:\n{error}") from error

    for place in (module, export_command):
        monkeypatch.setattr(place, "NewProcess", ThisProcess)


@torch.no_grad()
def logits_of(folder: Path, model: Any = None) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(**tokenizer(TEXT, return_tensors="pt")).logits


def test_full_fine_tuning_is_exported_exactly(full_run: Path, tmp_path: Path) -> None:
    dest = tmp_path / "new" / "student"
    result = CliRunner().invoke(
        app,
        ["export", str(full_run), str(dest), "--shard-size", "40KB", "--json"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["verification"]["max_logit_difference"] == 0
    assert report["verification"]["tokens_compared"] > 30
    assert (report["kind"], report["dtype"]) == ("full", "float32")
    assert len(report["weights"]) > 1
    assert (dest / "model.safetensors.index.json").is_file()
    assert report["parameters"] == sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(dest).parameters()
    )

    exported = [load_file(dest / name) for name in report["weights"]]
    found = {name: tensor for shard in exported for name, tensor in shard.items()}
    expected = load_file(full_run / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    assert not (dest / "dwakd").exists()
    tokenizer = AutoTokenizer.from_pretrained(dest)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    generation = json.loads((dest / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id

    card = (dest / "README.md").read_text()
    assert PRIVATE not in card
    assert str(full_run.parent) not in card
    for part in (
        "| student | student |",
        "| teacher | big-teacher |",
        "rows.jsonl (alpaca)",
        "| loss.temperature | 1.5 |",
        "| teacher's precision | 8 bit |",
        "| `ce` | 1.75 | 2 |",
        "| `eval_loss` | 1.875 | 2 |",
        "equal those of the run's student exactly",
        f"torch {version('torch')}",
    ):
        assert part in card
    assert [path.name for path in dest.parent.iterdir()] == ["student"]
    assert (dest / report["weights"][0]).stat().st_mode & 0o777 == 0o644


def test_a_lora_is_loaded_on_the_revision_that_it_learnt_on(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    settings = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(settings | {"revision": "0123abc"}))
    asked = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, **options: Any) -> Any:
        asked.append(options.get("revision"))
        return load(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_student(find_student(run), None, trust_remote_code=False)
    source = find_model(str(run))
    load_model(source, load_config(source, trust_remote_code=False), Held(device="cpu"))
    assert asked == ["0123abc", "0123abc"]


@pytest.mark.usefixtures("one_process")
def test_lora_is_merged(lora_run: Path, tmp_path: Path) -> None:
    report = export(lora_run, tmp_path / "merged")
    expected = load_file(lora_run / "expected-logits")["logits"]
    found = logits_of(tmp_path / "merged")
    # W + B A is rounded once here, and each product by itself in the adapted model.
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert report["kind"] == "merged"
    assert 0 <= report["verification"]["relative_logit_difference"] < 1e-5
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert "the LoRA adapter merged" in (tmp_path / "merged" / "README.md").read_text()


def test_lora_is_kept(lora_run: Path, lab: Path, tmp_path: Path) -> None:
    dest = tmp_path / "adapter"
    report = export(lora_run, dest, keep_adapter=True)
    assert report["verification"]["max_logit_difference"] == 0
    assert load_file(dest / "adapter_model.safetensors").keys() == (
        load_file(lora_run / "adapter_model.safetensors").keys()
    )
    assert (dest / "generation_config.json").is_file()
    base = AutoModelForCausalLM.from_pretrained(lab / "student")
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(dest)), mean_resizing=False)
    found = logits_of(dest, PeftModel.from_pretrained(base, dest))
    assert torch.equal(found, load_file(lora_run / "expected-logits")["logits"])
    assert str(lab) not in (dest / "README.md").read_text()


@pytest.mark.usefixtures("one_process")
def test_a_killed_export_leaves_no_model(full_run: Path, tmp_path: Path) -> None:
    dest = tmp_path / "student"
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from dwakd_plugin.export.export import export\n"
        "def die(doing):\n"
        "    if doing.startswith('Reading'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "export(Path(sys.argv[1]), Path(sys.argv[2]), say=die)"
    )
    killed = subprocess.Popen([sys.executable, "-c", script, full_run, dest])
    assert killed.wait() == -signal.SIGKILL
    assert not dest.exists()
    left = tmp_path / ".student.partial"
    assert (left / "model.safetensors").is_file()  # it was in the middle of it

    report = export(full_run, dest, dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert all(
        tensor.dtype == torch.bfloat16 for tensor in load_file(dest / "model.safetensors").values()
    )
    assert 0 < report["verification"]["relative_logit_difference"] < 0.05
    assert json.loads((dest / "config.json").read_text())["dtype"] == "bfloat16"
    sign(dest, "student")  # as if it had been trained in bfloat16: nothing is left to be rounded
    again = export(dest, tmp_path / "again")
    assert again["dtype"] == "bfloat16"
    assert again["verification"]["max_logit_difference"] == again["verification"]["tolerance"] == 0


@pytest.mark.usefixtures("one_process")
def test_a_student_that_changed_is_not_kept(
    full_run: Path, lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "student"
    # As if bfloat16 had to be exact: found by the new process.
    monkeypatch.setitem(verify.TOLERANCE, torch.bfloat16, 0.0)
    with pytest.raises(UserError, match="The export changed the student"):
        export(full_run, dest, dtype="bfloat16")
    # As if the adapter were left out.
    monkeypatch.setattr(module, "_merged", lambda model: model.unload())
    with pytest.raises(UserError, match="Merging changed the student"):
        export(lora_run, dest)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "student"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # bytes; the weights need 85,000
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*File too large"):
            export(full_run, dest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match=r"needs 0.07 GB, and \S+ has 0.00 GB left"):
        export(full_run, dest)
    assert list(tmp_path.iterdir()) == []


def test_destinations_in_use(full_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    (tmp_path / "file").touch()
    for dest, force, message in (
        (tmp_path / "mine", False, "exists already"),
        (tmp_path / "mine", True, "isn't a model, and --force only replaces models"),
        (tmp_path / "file" / "below", False, "cannot be written"),
        (full_run, True, "is the run itself"),
        (full_run.parent, True, "is the run itself, or holds it"),
    ):
        with pytest.raises(UserError, match=message):
            export(full_run, dest, force=force)
    assert (tmp_path / "mine" / "letter.txt").exists()

    dest = tmp_path / "student"
    with (
        new_folder(dest) as partial,
        pytest.raises(UserError, match=f"is being written by process {os.getpid()} on"),
    ):
        (partial / "config.json").touch()
        export(full_run, dest)

    # A model is replaced with --force, and only once the new one is whole.
    def check(dest: Path) -> None:
        module._check_destination(full_run, dest, force=True)

    with new_folder(dest, check) as partial:
        (partial / "new").touch()
        assert (dest / "config.json").exists()
    assert [path.name for path in dest.iterdir()] == ["new"]
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_whole_run(full_run: Path, lora_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match="does not exist"):
        find_student(run)
    run.mkdir()
    with pytest.raises(UserError, match="isn't a run"):
        find_student(run)
    sign(run, "student")
    with pytest.raises(UserError, match="holds no student yet"):
        find_student(run)
    shutil.copytree(full_run, run / "checkpoint-2")
    shutil.rmtree(run / "checkpoint-2" / "dwakd")
    with pytest.raises(UserError, match=r"its last whole checkpoint does: \S+checkpoint-2"):
        find_student(run)
    # A checkpoint finds what the run above it says, and is whole when its last file is there.
    assert find_student(run / "checkpoint-2").record["identity"]["student"] == "student"
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"trainer_state\.json is missing"):
        find_student(run / "checkpoint-2")

    cut = tmp_path / "cut"
    shutil.copytree(full_run, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        find_student(cut)
    (cut / "model.safetensors").unlink()
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (cut / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is missing"):
        find_student(cut)

    foreign = tmp_path / "foreign"
    shutil.copytree(full_run, foreign, ignore=shutil.ignore_patterns("dwakd"))
    with pytest.raises(UserError, match="a model that no run of dwakd wrote"):
        find_student(foreign)
    with pytest.raises(UserError, match="--shard-size is `2`; write it like 500MB"):
        export(full_run, tmp_path / "student", shard_size="2")
    with pytest.raises(UserError, match="no adapter to keep"):
        export(full_run, tmp_path / "student", keep_adapter=True)


def test_an_adapter_without_its_base_model(lora_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    config = json.loads((run / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/base"
    (run / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"`/nowhere/base`, which is not there.*--base-model"):
        export(run, tmp_path / "student")
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        export(run, tmp_path / "student")


def test_a_card_of_a_run_that_recorded_little() -> None:
    identity = {"student": "owner/small", "teacher": "owner/big"}
    record: dict[str, Any] = {"identity": identity}
    check = {
        "relative_logit_difference": 0.01,
        "tolerance": 0.1,
        "tokens_compared": 9,
        "tokens_generated": 8,
    }
    report = {
        "kind": "full",
        "dtype": "bfloat16",
        "parameters": 5,
        "destination": "/a/b/mine",
        "verification": check,
    }
    card = model_card(record, [], report)
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: owner/small\n")
    assert "# mine\n" in card
    assert "kept no log" in card
    assert "differ from those of the run's student by 0.01 of their size (0.1 was allowed)" in card
    assert "## Settings" not in card

    teachers = [
        {"name": "maths", "base_model": f"{PRIVATE}/big", "load_in_8bit": True, "weight": 0.7},
        {"name": "code", "base_model": "owner/tokens", "model": "owner/huge", "dtype": "auto"},
    ]
    record["settings"] = {"teachers": teachers}
    card = model_card(record, [], report)
    assert "taught by **big, owner/huge** with" in card
    assert "| teachers | big, owner/huge |" in card
    for line in ("maths's precision | 8 bit", "maths's weight | 0.7", "code's precision | auto"):
        assert f"| teacher {line} |" in card
    assert PRIVATE not in card

    cards = {}
    for variant in ("sft", "mapped", "paper"):
        cards[variant] = model_card(record | {"settings": {"variant": variant}}, [], report)
    assert "fine-tuned on its labels alone, without a teacher" in cards["sft"]
    assert "owner/big" not in cards["sft"] and "knowledge-distillation" not in cards["sft"]
    assert (
        "taught by **owner/big** with" in cards["mapped"] and "`mapped` of dwakd" in cards["mapped"]
    )
    assert ["DWA-KD" in card for card in cards.values()] == [False, False, True]


def test_the_hub_is_asked_at_the_start_and_the_export_survives_it(
    lora_run: Path, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(repo: str, run: Path = full_run, keep_adapter: bool = False) -> None:
        check_push(repo, run, keep_adapter=keep_adapter, base_model=None)

    with pytest.raises(UserError, match="OWNER/NAME"):
        start("no/such/name")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        start("me/student")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token"):
        start("me/student")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    start("me/student")
    with pytest.raises(UserError, match="is the local folder"):
        start("me/student", lora_run, keep_adapter=True)

    calls: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> str:
            return f"https://hub/{repo}?private={options['private']}"

        def upload_folder(self, **options: Any) -> None:
            calls.update(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push(tmp_path, "me/student", private=True) == "https://hub/me/student?private=True"
    assert (calls["repo_id"], calls["folder_path"]) == ("me/student", tmp_path)

    def fail(self: Hub, **_: Any) -> None:
        raise OfflineModeIsEnabled("no way out")

    monkeypatch.setattr(Hub, "upload_folder", fail)
    with pytest.raises(UserError, match=r"(?s)is whole in .*no way out.*hf upload me/student"):
        push(tmp_path, "me/student", private=True)
