"""What prepared rows depend on, in one name: with any of it changed, they are prepared again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from dwakd_plugin.data.teacher_side import TeacherSide
from dwakd_plugin.tokenizers.template_date import today

# What transformers makes a tokenizer and its chat templates of.
_OF_A_TOKENIZER = ("*token*.json", "*token*.model", "vocab.*", "merges.txt", "*.jinja", "*/*.jinja")


def fingerprint(cfg: DictDefault, sides: list[TeacherSide]) -> str:
    """Names what prepared rows depend on and axolotl's own hash ignores: the teachers' sides,
    the state of local files, which axolotl knows by name only, and the day, where a template prints
    it."""
    each = [_fingerprint_of(cfg, side) for side in sides]
    if len(sides) == 1:
        return each[0]
    own = [(side.teacher.name, side.teacher.datasets) for side in sides]
    return hashlib.sha256(json.dumps([each, own]).encode()).hexdigest()[:16]


def _fingerprint_of(cfg: DictDefault, side: TeacherSide) -> str:
    config, own, tokenizer = side.config, side.recipe, side.tokenizer
    content = _identity(tokenizer) | {
        "columns": "teacher_input_ids, teacher_labels, source_row; answers, unread; all fields",
        "chat_template": own.chat_template_jinja,
        "eot_tokens": own.eot_tokens,
        "sequence_len": own.sequence_len,
        "excess_length_strategy": cfg.excess_length_strategy,
        "min_sample_len": cfg.min_sample_len,
        "eval_sequence_len": cfg.eval_sequence_len,
        "different_answers": config.different_answers,
        "thinking_key": config.teacher.thinking_key,
        "files": [_state(file) for file in [*local_files(cfg), *_student_files(cfg)]],
    }
    if any("strftime_now" in text for text in _templates(cfg, own)):
        content["day"] = today().isoformat()
    if (cfg.excess_length_strategy or "").lower() == "truncate":
        content["cut"] = "both sides at the same byte"
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # All of it: two tokenizers may share a vocabulary and cut or begin texts in different ways.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return {
        "tokenizer": hashlib.sha256(json.dumps(rules).encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "class": type(tokenizer).__name__,
    }


def strategy_name(
    cfg: DictDefault, dataset_config: DictDefault, tokenizer: PreTrainedTokenizerBase
) -> str:
    """All that a data set's rows depend on: the student's `tokenizer`, the recipe, and in its
    `dataset_prepared_path`, as it is while rows are prepared, the `fingerprint` of the rest."""
    content = [
        *(cfg.to_dict(), dataset_config.to_dict()),
        *(_identity(tokenizer), tokenizer.chat_template),
        *(version(package) for package in ("dwakd", "axolotl", "transformers")),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def local_files(cfg: DictDefault) -> list[Path]:
    """The data files of the recipe that lie on this machine, also those in folders and patterns;
    nothing hidden, and nothing that a run writes."""
    written = [cfg.dataset_prepared_path, cfg.output_dir]
    outputs = [Path(str(each)).absolute() for each in written if each]
    files: list[Path] = []
    for dataset in [*(cfg.datasets or []), *(cfg.test_datasets or [])]:
        for name in _names(dataset.data_files or [dataset.path, dataset.data_dir]):
            places = [name, *sorted(glob(name, recursive=True))]  # noqa: PTH207 (absolute too)
            files += [file for place in places for file in _inside(Path(place))]
    found = dict.fromkeys(files)
    return [file for file in found if not any(each in file.absolute().parents for each in outputs)]


def _inside(place: Path) -> list[Path]:
    """A file, or all that a folder has, but what is hidden; nothing where there is neither."""
    if not place.is_dir():
        return [place] if place.is_file() else []
    open_ = (
        file
        for file in place.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(place).parts)
    )
    return sorted(file for file in open_ if file.is_file())


def _names(value: object) -> list[str]:
    """Of a name, a list or a mapping of them."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [name for each in value for name in _names(each)]
    return [] if value is None else [str(value)]


def _student_files(cfg: DictDefault) -> list[Path]:
    """The student's tokenizer, where it is a folder, and chat templates that are files."""
    folder = Path(str(cfg.tokenizer_config or cfg.base_model))
    files = [file for pattern in _OF_A_TOKENIZER for file in sorted(folder.glob(pattern))]
    return [file for file in [*files, *_template_files(cfg)] if file.is_file()]


def _template_files(cfg: DictDefault) -> list[Path]:
    named = [each.chat_template_jinja for each in (cfg, *(cfg.datasets or []))]
    return [Path(name) for name in named if name and "{" not in name]


def _templates(cfg: DictDefault, own: DictDefault) -> Iterator[str]:
    """The texts in which both sides' chat templates are."""
    yield own.chat_template_jinja or ""
    for each in (cfg, *(cfg.datasets or [])):
        yield each.chat_template_jinja or ""
        with suppress(ValueError):  # none of axolotl's
            yield get_chat_template(each.chat_template or "")
    for file in _student_files(cfg):
        if file.name == "tokenizer_config.json" or file.suffix == ".jinja":
            yield file.read_text(encoding="utf-8", errors="replace")


def _state(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return str(file), found.st_size, found.st_mtime_ns
