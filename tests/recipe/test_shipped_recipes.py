"""The shipped recipes: axolotl's schema, dwakd's checks, two steps with models of their kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.prompters import AlpacaPrompter
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dwakd_cli.main import app
from dwakd_cli.recipes import GROUPS, _shipped, describe
from dwakd_plugin.recipe.schema import DWAKDArgs
from dwakd_plugin.train.launch import prepare
from tests.conftest import ROWS, write_rows
from tests.families import create
from tests.runs import TERMS

RECIPES = {name: yaml.safe_load(file.read_text()) for name, file in _shipped().items()}
DISTILLING = [name for name, recipe in RECIPES.items() if "dwakd" in recipe]
HOPPER = {"bf16": True, "tf32": True, "fp8": True, "n_gpu": 1, "compute_capability": "sm_90"}

# What the recipes name, and what takes its place here: a family of tests/families.py.
MODELS = {
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-medium": "gpt2",
    "openai-community/gpt2-xl": "gpt2",
    "facebook/opt-2.7b": "opt",
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": "llama",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "Qwen/Qwen1.5-1.8B": "qwen2",
    "Qwen/Qwen2.5-7B": "qwen2",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2-instruct",
    "Qwen/Qwen3-8B": "qwen3",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "smollm2",
    "meta-llama/Llama-3.2-1B-Instruct": "llama3",
    "NousResearch/Llama-3.2-1B": "llama3",
}
DATA = {
    "databricks/databricks-dolly-15k": lambda row: {
        "instruction": row["instruction"],
        "context": row["input"],
        "response": row["output"],
        "category": "open_qa",
    },
    "mlabonne/FineTome-100k": lambda row: {
        "conversations": [
            {"from": "human", "value": row["instruction"]},
            {"from": "gpt", "value": row["output"]},
        ]
    },
    "teknium/GPT4-LLM-Cleaned": lambda row: row,
}
# The recipe that makes a teacher which another recipe names, and what it is given for that.
TEACHERS = {
    "./outputs/qwen1.5-1.8b-dolly": ("paper-teacher-qwen1.5-1.8b", "Qwen/Qwen1.5-1.8B"),
    "./outputs/qwen2.5-7b-dolly": ("paper-teacher-7b", "Qwen/Qwen2.5-7B"),
    "./outputs/qwen2.5-7b-instruct-dolly": ("paper-teacher-7b", "Qwen/Qwen2.5-7B-Instruct"),
    "./outputs/mistral-7b-dolly": ("paper-teacher-7b", "mistralai/Mistral-7B-v0.1"),
}
ON_A_CPU = {
    "bf16": False,
    "fp16": False,
    "attn_implementation": "sdpa",
    "max_steps": 2,
    "save_steps": 1,
    "eval_steps": 1,
    "logging_steps": 1,
    "warmup_steps": 0,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
}
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


# What they say --------------------------------------------------------------------------------


def test_each_has_a_line_of_its_own_and_a_group() -> None:
    assert {name.partition("-")[0] for name in RECIPES} == set(GROUPS)
    for name, file in _shipped().items():
        purpose = describe(name, file.read_text())["purpose"]
        assert 20 < len(purpose) <= 100 and purpose.endswith("."), name
    result = CliRunner().invoke(app, ["recipes", "list"], catch_exceptions=False)
    places = [result.stdout.index(title) for title in GROUPS.values()]
    assert places == sorted(places)
    assert all(name in result.stdout for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_axolotls_schema_takes_it_whole(name: str) -> None:
    recipe = RECIPES[name]
    known = {*AxolotlInputConfig.model_fields, *DWAKDArgs.model_fields}
    assert set(recipe) <= known  # axolotl drops what it does not know without a word
    cfg = DictDefault(yaml.safe_load(yaml.safe_dump(recipe)))
    PluginManager.get_instance().plugins.clear()
    prepare_plugins(cfg)
    valid = validate_config(cfg, HOPPER, {"torch_version": "2.9.0"})
    PluginManager.get_instance().plugins.clear()
    for key in ("base_model", "distillation", "learning_rate", "attn_implementation"):
        assert valid[key] == recipe.get(key)
    if "dwakd" in recipe:
        given, kept = (
            block.get("teachers") or [block["teacher"]]
            for block in (recipe["dwakd"], valid["dwakd"])
        )
        for own, found in zip(given, kept, strict=True):
            assert {key: found[key] for key in own} == own


@pytest.mark.parametrize("name", DISTILLING)
def test_dwakds_own_checks_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")  # what is on the hub may be there
    for folder in TEACHERS:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
    for data in ("train", "held_out"):
        Path("data").mkdir(exist_ok=True)
        (Path("data") / f"{data}.jsonl").touch()
    invoke = ["recipes", "copy", name]
    assert CliRunner().invoke(app, invoke, catch_exceptions=False).exit_code == 0
    launch = prepare(
        Path(f"{name}.yml"),
        [],
        teacher={},
        variant=None,
        launcher=None,
        processes=None,
        resume=False,
    )
    assert launch.recipe.base_model == RECIPES[name]["base_model"]


def test_dollys_prompt_is_alpacas() -> None:
    """The comment says so: axolotl's `type: alpaca` and the recipes write the same prompt."""
    for name, recipe in RECIPES.items():
        if not name.startswith("paper-"):
            continue
        kind = recipe["datasets"][0]["type"]
        for row in (ROWS[0], ROWS[1]):
            written = kind["format" if row["input"] else "no_input_format"].format(**row)
            assert written == next(AlpacaPrompter().build_prompt(row["instruction"], row["input"]))


def test_axolotls_lora_kernels_are_off_where_they_cannot_patch() -> None:
    """axolotl turns them on by itself; GPT-2 and OPT have neither its attention nor its layers."""
    for name, recipe in RECIPES.items():
        family = MODELS.get(recipe["base_model"])
        if recipe.get("adapter") and family in ("gpt2", "opt"):
            kernels = [f"lora_{part}_kernel" for part in ("mlp", "qkv", "o", "embedding")]
            assert [recipe.get(kernel) for kernel in kernels] == [False] * 4, name


# What they do ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all runs, with the data; models and tuned teachers are added when needed."""
    folder = tmp_path_factory.mktemp("workshop")
    for path, shape in DATA.items():
        write_rows(folder / f"{Path(path).name}.jsonl", [shape(row) for row in ROWS])
    return folder


def stand_in(model: str, workshop: Path) -> str:
    folder = workshop / "models" / model
    return str(folder if folder.is_dir() else create(MODELS[model], folder))


def tiny(name: str, workshop: Path, **changes: Any) -> dict[str, Any]:
    """A shipped recipe with its models and data replaced, and with what a CPU asks for."""
    recipe = yaml.safe_load(yaml.safe_dump(RECIPES[name])) | changes
    recipe["base_model"] = stand_in(recipe["base_model"], workshop)
    for dataset in recipe["datasets"]:
        dataset["path"] = str(workshop / f"{Path(dataset['path']).name}.jsonl")
        if "split" in dataset:
            dataset["split"] = "train"
    for key in ("evals_per_epoch", "saves_per_epoch", "warmup_ratio", "lora_model_dir"):
        recipe.pop(key, None)
    recipe |= ON_A_CPU | {"val_set_size": 8}
    recipe["dataset_prepared_path"] = "prepared"
    if recipe.get("adapter"):
        recipe |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    if "dwakd" in recipe:
        teacher = recipe["dwakd"]["teacher"]
        if not teacher["base_model"].startswith("."):
            teacher["base_model"] = stand_in(teacher["base_model"], workshop)
        recipe["dwakd"].setdefault("projectors", {})["warmup_steps"] = 2
    return recipe


def fine_tuned(folder: str, workshop: Path, train: Train) -> None:
    """Runs the recipe that makes a teacher, unless an earlier test did."""
    if not (workshop / folder).is_dir():
        name, model = TEACHERS[folder]
        log = train(tiny(name, workshop, base_model=model, output_dir=folder))
        assert all(math.isfinite(line["loss"]) for line in log if "loss" in line)


# Of those that differ in their models alone, one; test_architectures.py has the models, and
# test_packing.py and test_axolotl.py what the others add.
ALSO = (
    "axolotl-llama3-lora-1b",
    "paper-qwen1.5-1.8b-to-gpt2",
    "paper-qwen2.5-7b-to-gpt2-1.5b",
    "chat-qwen3-8b-to-llama3.2-1b",
    "paper-mistral-7b-to-tinyllama-1.1b",
    "paper-qwen2.5-7b-instruct-to-opt-2.7b",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ALSO else [])
        for name in DISTILLING
        # `dwakd quickstart` runs its own as they are; tests/train/ has a server, and several.
        if not name.startswith(("quickstart", "served", "several"))
    ],
)
def test_two_steps(
    name: str, workshop: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop)
    teacher = RECIPES[name]["dwakd"]["teacher"]
    for folder in (teacher["base_model"], teacher.get("adapter")):
        if folder in TEACHERS:
            fine_tuned(folder, workshop, train)
    log = train(tiny(name, workshop))
    steps = [line for line in log if "loss" in line]
    assert len(steps) == 2
    for line in steps:
        assert all(math.isfinite(line[term]) and line[term] > 0 for term in TERMS)
        assert math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
    output = Path(RECIPES[name]["output_dir"])
    one, two = output / "checkpoint-1", output / "checkpoint-2"
    for pattern in ("*model.safetensors", "dwakd/projectors.safetensors"):
        before, after = (load_file(next(folder.glob(pattern))) for folder in (one, two))
        assert before.keys() == after.keys()
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        # LoRA's first step leaves its A as it was; of the rest, a row that nothing reads.
        assert len(moved) > 0.9 * len(before), (pattern, set(before) - set(moved))
    if RECIPES[name].get("adapter"):
        assert not (output / "model.safetensors").exists()
    else:
        student = AutoModelForCausalLM.from_pretrained(output)
        assert all(value.isfinite().all() for value in student.parameters())


def test_a_chat_template_that_thinks_aligns_the_answers_alone(
    workshop: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3 opens an answer with an empty <think> block: it isn't part of the response."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets

    from dwakd_plugin.data.dual_tokenization import dual_tokenization
    from dwakd_plugin.recipe.schema import parse_recipe

    monkeypatch.chdir(workshop)
    recipe = tiny("chat-qwen3-8b-to-smollm2-1.7b", workshop)
    Path("think.yml").write_text(yaml.safe_dump(recipe))
    PluginManager.get_instance().plugins.clear()
    cfg = load_cfg("think.yml")
    config = parse_recipe(recipe)
    assert config is not None
    with dual_tokenization(cfg, config):
        rows = load_datasets(cfg=cfg).train_dataset
    student, teacher = (
        AutoTokenizer.from_pretrained(folder)
        for folder in (recipe["base_model"], config.teacher.base_model)
    )
    answers = {row["output"] for row in ROWS}
    assert len(rows) == len(ROWS) - 8  # which are held out
    for row in rows:
        own = student.decode([label for label in row["labels"] if label != -100])
        theirs = teacher.decode([label for label in row["teacher_labels"] if label != -100])
        assert own.removesuffix("<|im_end|>") in answers
        assert theirs.strip() == own
        assert "<think>\n\n</think>" in teacher.decode(row["teacher_input_ids"])
