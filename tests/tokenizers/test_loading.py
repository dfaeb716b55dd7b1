"""A tokenizer is what its own file says, whatever class its config names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dwakd_plugin.errors import UserError
from dwakd_plugin.tokenizers.loading import PROBE, follows_its_file, load_tokenizer
from dwakd_plugin.tokenizers.model_findings import class_findings
from dwakd_plugin.tokenizers.side import load_side
from tests.conftest import SHARED
from tests.tokenizers.small_tokenizers import byte_level


@pytest.fixture
def misnamed(tmp_path: Path) -> Path:
    """A byte-level tokenizer whose config names Llama's class, as DeepSeek-V3's does."""
    byte_level().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    file.write_text(json.dumps(config))
    return tmp_path


def test_a_byte_level_tokenizer_that_is_called_llama_keeps_its_spaces(misnamed: Path) -> None:
    ids = Tokenizer.from_file(str(misnamed / "tokenizer.json")).encode(PROBE).ids
    tokenizer = load_tokenizer(misnamed, "The tokenizer")
    assert tokenizer(PROBE, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids) == PROBE
    # The reason for all this: if it is gone, so can be what stands against it.
    assert not follows_its_file(AutoTokenizer.from_pretrained(misnamed), misnamed)


def test_a_damaged_file_is_named(misnamed: Path) -> None:
    (misnamed / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="The tokenizer cannot be loaded"):
        load_tokenizer(misnamed, "The tokenizer", "Give another.")


@pytest.mark.skipif(not (SHARED / "tokenizers").is_dir(), reason="no real tokenizers here")
def test_real_tokenizers_follow_their_files() -> None:
    folders = sorted((SHARED / "tokenizers").iterdir())
    assert len(folders) >= 5
    for folder in folders:
        assert follows_its_file(AutoTokenizer.from_pretrained(folder), folder), folder.name


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_check_names_a_class_that_misreads(
    misnamed: Path, role: Literal["teacher", "student"], tmp_path: Path
) -> None:
    side = load_side(role, str(misnamed), trust_remote_code=False)
    assert side.refused is not None and side.refused.startswith("Llama")
    (finding,) = class_findings(side)
    assert (finding.code, finding.severity) == (f"{role}_class_misreads", "problem")
    byte_level().save_pretrained(tmp_path / "plain")
    assert not class_findings(load_side(role, str(tmp_path / "plain"), trust_remote_code=False))


@pytest.mark.parametrize("kept", [{"padding": True}, {"truncation": True}])
def test_padding_and_truncation_kept_in_a_file_change_no_text(
    kept: dict[str, bool], tmp_path: Path
) -> None:
    """A tokenizer.json may keep what it was last called with; a call of transformers' asks anew."""
    byte_level().save_pretrained(tmp_path)
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if "padding" in kept:
        own.enable_padding(length=512)
    else:
        own.enable_truncation(max_length=2)
    own.save(str(tmp_path / "tokenizer.json"))
    assert follows_its_file(AutoTokenizer.from_pretrained(tmp_path), tmp_path)
    side = load_side("teacher", str(tmp_path), trust_remote_code=False)
    assert side.refused is None
    plain = byte_level()(PROBE, add_special_tokens=False)["input_ids"]
    assert side.tokenizer(PROBE, add_special_tokens=False)["input_ids"] == plain
