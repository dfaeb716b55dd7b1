"""`dwakd cut`: what it writes, says and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from dwakd_cli.cut import kept_of, ranges
from dwakd_cli.main import app
from dwakd_plugin.errors import UserError
from dwakd_plugin.models.cutting import keep_layers
from dwakd_plugin.tokenizers.training import train_tokenizer
from tests import families
from tests.cutting import TEXTS, deep, ids_of, load, logits


def cut(*words: Any) -> Any:
    return CliRunner().invoke(app, ["cut", *map(str, words)])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(text.replace("\n", " ") for text in TEXTS), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2", "qwen2-instruct", "mistral"])
def test_layers_and_tokenizer(name, tmp_path, monkeypatch, texts):
    folder = deep(name, tmp_path / "model", monkeypatch)
    GenerationConfig(
        temperature=0.7, do_sample=True, eos_token_id=[1, 2], suppress_tokens=[5]
    ).save_pretrained(folder)
    train_tokenizer(TEXTS, 420).save_pretrained(tmp_path / "bpe")
    result = cut(
        *(folder, tmp_path / "cut", "--layers", 2, "--tokenizer", tmp_path / "bpe"),
        *("--texts", texts, "--tokens", 64, "--json"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "cut" / "dwakd_cut.json").read_text())
    assert len(report["kept"]) == 2 and len(report["influence"]) == 4
    best = min(report["choices"], key=lambda choice: choice["loss"])
    assert sorted(report["kept"] + best["left_out"]) == [0, 1, 2, 3]
    assert list(report["bits_per_byte"]) == ["as it is", "2 layers", "2 layers, new tokenizer"]
    assert (tmp_path / "cut" / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "cut").glob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == len(tokenizer) == 420
    generation = GenerationConfig.from_pretrained(tmp_path / "cut")
    assert generation.temperature == pytest.approx(0.7) and generation.suppress_tokens is None
    assert generation.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_layers_alone_keep_tokenizer_and_generation(tmp_path, monkeypatch, texts):
    folder = deep("smollm2", tmp_path / "model", monkeypatch)
    result = cut(folder, tmp_path / "cut", "--keep-layers", "0,2-3", "--texts", texts)
    assert result.exit_code == 0, result.output
    assert "Layers kept: 0,2-3" in result.output and "3 layers" in result.output
    old, new = (AutoTokenizer.from_pretrained(f) for f in (folder, tmp_path / "cut"))
    assert old.get_vocab() == new.get_vocab() and old.chat_template == new.chat_template
    model = load(folder)
    keep_layers(model, [0, 2, 3])
    assert torch.equal(logits(load(tmp_path / "cut"), ids_of(model)), logits(model, ids_of(model)))
    assert not (tmp_path / "cut" / "layers.png").exists()


def test_a_tokenizer_trained_on_texts_alone(tmp_path, monkeypatch, texts):
    folder = deep("llama3", tmp_path / "model", monkeypatch)
    words = ("--train-tokenizer", texts, "--vocabulary", 600, "--texts", texts)
    result = cut(folder, tmp_path / "cut", *words, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert list(report["bits_per_byte"]) == ["as it is", "all layers, new tokenizer"]
    assert report["choices"] == [] and report["kept"] == [0, 1, 2, 3]
    assert (
        report["tokenizer"]["tokens"]
        == AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.vocab_size
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "cut").eos_token == "<|eot_id|>"


def test_all_layers_by_number_is_the_same_model(tmp_path, monkeypatch, texts):
    folder = deep("llama", tmp_path / "model", monkeypatch)
    result = cut(folder, tmp_path / "cut", "--layers", 4, "--texts", texts, "--json")
    bits = json.loads(result.stdout)["bits_per_byte"]
    assert bits["as it is"] == bits["all layers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to do"),
        (["--layers", 5], "--layers 5: The model has 4 layers, 0 to 3"),
        (["--layers", 0], "Keep between 1 and 4"),
        (["--keep-layers", "0,4"], "has 4 layers, 0 to 3"),
        (["--keep-layers", "0,x"], "`x` isn't a layer"),
        (["--keep-layers", "0-2", "--layers", 2], "names 3 layers and --layers says 2"),
        (["--tokenizer", "a", "--train-tokenizer", "b"], "not both"),
        (["--layers", 2, "--texts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--tokenizer", "./nowhere"], "does not exist"),
        (["--tokenizer", "WORDS"], "no tokens for single bytes"),
        (["--layers", 2, "--device", "cuda:99"], "no such GPU"),
    ],
)
def test_what_cannot_be_cut_is_said_and_nothing_written(words, message, tmp_path, monkeypatch):
    folder = deep("llama", tmp_path / "model", monkeypatch)
    _words(tmp_path / "WORDS")
    words = [tmp_path / word if word == "WORDS" else word for word in words]
    _refused([folder, tmp_path / "out" / "cut", *words], message)
    assert not (tmp_path / "out").exists()


def _refused(words: list[Any], message: str) -> None:
    result = cut(*words)
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)


def _words(folder: Path) -> None:
    """SentencePiece's way, without a byte fallback."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>"
    ).save_pretrained(folder)


def test_folders_that_are_no_model_or_in_use(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    _refused([tmp_path / "empty", tmp_path / "cut", "--layers", 1], "holds neither a model")
    folder = deep("llama", tmp_path / "model", monkeypatch)
    _refused([folder, tmp_path / "used", "--layers", 1], "exists and is not empty")
    opt = families.create("opt", tmp_path / "opt")
    _refused([opt, tmp_path / "cut", "--layers", 1], "kind `opt` cannot be cut")
    (folder / "model.safetensors").write_bytes(b"half")
    _refused([folder, tmp_path / "cut", "--layers", 1], "cannot be loaded")
    assert not (tmp_path / "cut").exists()


def test_layers_are_written_as_they_are_read():
    assert kept_of("3,0-1,7", None, 8) == [0, 1, 3, 7]
    assert kept_of(None, None, 2) == kept_of(None, 2, 2) == [0, 1]
    assert kept_of(None, 1, 2) is None
    assert ranges([0, 1, 3, 7]) == "0-1,3,7"
