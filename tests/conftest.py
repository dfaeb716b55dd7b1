"""Tiny models, tokenizers and rows for every test, and axolotl run within the process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before transformers and axolotl are imported: no network, no telemetry (it hangs without one).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
# Its copy of the output replaces sys.stdout, and what it puts back later is that of another test.
os.environ["AXOLOTL_TEE_STDOUT"] = "0"
# Threads that wait without spinning: tiny models on a busy machine would wait for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are taken by other workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

import pytest
import yaml
from hypothesis import settings

settings.register_profile("fuzz")  # many cases: tests/fuzz, benchmarks/fuzz.py

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # published tokenizers and texts, which may not be there
ROWS = [
    {
        "instruction": f"What does function number {index} do?",
        "input": "It is part of the library." if index % 3 == 0 else "",
        "output": f"Function {index} returns the {word} of its {index % 7 + 1} arguments, "
        + "and raises an error if there is none. " * (index % 4)
        + f"See also {word}_{index}.",
    }
    for index, word in enumerate(
        ["sum", "product", "mean", "median", "list", "name", "path", "größte", "数", "end"] * 4
    )
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher, a tinier student with another tokenizer, and rows."""
    return make_lab(tmp_path_factory.mktemp("lab"))


def make_lab(folder: Path) -> Path:
    """Fills the folder as `lab` has it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.small_student import create_student
    from dwakd_plugin.tokenizers.training import train_tokenizer

    texts = [f"{row['instruction']} {row['input']} {row['output']}" for row in ROWS]
    student_tokenizer = train_tokenizer(texts, 400)
    create_student(
        folder / "student",
        student_tokenizer,
        hidden_size=24,
        layers=2,
        heads=2,
        intermediate_size=48,
        seed=1,
    )
    teacher_tokenizer = train_tokenizer(texts[::2], 320)
    teacher_tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    teacher_tokenizer.eos_token = "<|im_end|>"
    teacher_tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(2)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(teacher_tokenizer) + 10,  # a padded head, as many models have
            hidden_size=40,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            initializer_range=0.3,
        )
    )
    teacher.save_pretrained(folder / "teacher")
    teacher_tokenizer.save_pretrained(folder / "teacher")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "test.jsonl", ROWS[:6])
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def recipe(lab: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Builds a recipe for the tiny pair; `dwakd` is its block, other arguments override keys."""

    def build(dwakd: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        return tiny_recipe(lab, tmp_path, dwakd, **settings)

    return build


def tiny_recipe(
    lab: Path, folder: Path, dwakd: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """A recipe for the pair in `lab` that writes into `folder`."""
    base: dict[str, Any] = {
        "base_model": str(lab / "student"),
        "datasets": [{"path": str(lab / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 256,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": False,
        "fp16": False,
        "logging_steps": 1,
        "save_steps": 2,
        "seed": 3,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "pad_to_sequence_len": False,
    }
    if dwakd is not None:
        named = "variant" in dwakd or "matching" in dwakd.get("loss", {})
        block = {**({} if named else {"variant": "paper"}), **dwakd}  # which has all parts
        own = {"base_model": str(lab / "teacher")}
        if "teachers" in dwakd:
            block["teachers"] = [own | teacher for teacher in dwakd["teachers"]]
        else:
            block["teacher"] = own | (dwakd.get("teacher") or {})
        base |= {
            "plugins": ["dwakd_plugin.DWAKDPlugin"],
            "distillation": "dwakd",
            "dwakd": block,
        }
    return base | settings


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB of its own, unmounted whatever becomes of this process."""
    if os.getuid() != 0:
        pytest.skip("mounts a small disk, which takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("this system does not let us mount")
    # It reads until we close the pipe, or are gone.
    script = 'read -r _; umount -l "$1"'
    guard = subprocess.Popen(
        ["sh", "-c", script, "sh", str(disk)], stdin=subprocess.PIPE, start_new_session=True
    )
    yield disk
    guard.communicate()
    assert not disk.is_mount()


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], list[dict[str, Any]]]]:
    """Trains a recipe with axolotl in this process; returns the log, line by line."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.integrations.base import PluginManager

    def run(settings: dict[str, Any]) -> list[dict[str, Any]]:
        file = tmp_path / "recipe.yml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        PluginManager.get_instance().plugins.clear()
        do_train(load_cfg(str(file)), TrainerCliArgs())
        checkpoints = Path(settings["output_dir"]).glob("checkpoint-*/trainer_state.json")
        last = max(checkpoints, key=lambda path: int(path.parent.name.split("-")[1]))
        log: list[dict[str, Any]] = json.loads(last.read_text())["log_history"]
        return log

    yield run
    PluginManager.get_instance().plugins.clear()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Path]:
    """Writes a recipe into the current folder, which is a temporary one."""
    monkeypatch.chdir(tmp_path)

    def to_file(settings: dict[str, Any]) -> Path:
        file = tmp_path / "recipe.yml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return file

    return to_file
