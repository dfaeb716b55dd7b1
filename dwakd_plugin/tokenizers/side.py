"""The two sides of a check: each tokenizer with what is known of its model, and what they make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import user_path
from dwakd_plugin.tokenizers.figures import measure, vocabulary_figures
from dwakd_plugin.tokenizers.findings import findings_of
from dwakd_plugin.tokenizers.loading import load_and_name
from dwakd_plugin.tokenizers.pair import ByteCutter
from dwakd_plugin.tokenizers.verdict import Side, verdict_of

# What a folder with a tokenizer has at least one of.
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")


def load_side(role: Literal["teacher", "student"], name: str, trust_remote_code: bool) -> Side:
    """Loads one side's tokenizer from a folder or the hub, and reads the rows of its model's head
    where a config.json lies beside it.

    Raises UserError where there is no tokenizer, or none that can be compared.
    """
    folder = user_path(name)
    if folder.is_dir():
        if not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
            raise UserError(
                f"The {role}'s folder {name} has no tokenizer (no tokenizer.json, tokenizer.model "
                "or vocabulary). Give the folder that `tokenizer.save_pretrained` wrote to, or a "
                "hub id."
            )
        name = str(folder)
    elif folder.exists():
        raise UserError(f"The {role} {name} is a file. Give the folder that it lies in.")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"The {role}'s folder {name} does not exist. Give a folder or a hub id.")

    from transformers.utils import logging

    logging.set_verbosity_error()
    title = f"The {role}'s tokenizer `{name}`"
    tokenizer, refused = load_and_name(
        name,
        title,
        "Give a folder that AutoTokenizer can load, or a hub id (name/model).",
        trust_remote_code=trust_remote_code,
    )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{title} ({type(tokenizer).__name__}) is a slow one, in Python "
            "alone. Convert it to a tokenizer.json first (transformers' convert_slow_tokenizer), "
            "or choose a model that ships one."
        )
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise UserError(
            f"{title} has no vocabulary but its special tokens: its "
            "tokenizer.json or vocabulary file is missing."
        )
    return Side(role, tokenizer, ByteCutter(tokenizer, role), head_rows(name), refused)


def head_rows(name: str) -> int | None:
    """`vocab_size` of the config.json beside a tokenizer; None where there is none."""
    from transformers.utils import cached_file

    file = cached_file(
        name,
        "config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} isn't a model configuration: it doesn't hold a JSON object.")
    text_config = config.get("text_config") or {}
    rows = config.get("vocab_size", text_config.get("vocab_size"))
    return rows if isinstance(rows, int) else None


def examine(
    teacher: Side,
    student: Side,
    texts: Sequence[str] | None,
    sample: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """All figures, findings and the verdict; texts None: over the sample, which is always counted.

    `sample` has its texts by what they are: languages, code, numbers.
    """
    vocabulary = vocabulary_figures(teacher.cutter, student.cutter)
    groups = {
        name: measure(teacher.cutter, student.cutter, group) for name, group in sample.items()
    }
    all_sample = [text for group in sample.values() for text in group]
    figures = measure(teacher.cutter, student.cutter, all_sample if texts is None else texts)
    findings = findings_of(
        teacher, student, vocabulary, figures, groups, own_texts=texts is not None
    )
    totals = figures.as_dict()
    verdict, reasons = verdict_of(totals, findings)
    counts = {}
    for name, group in groups.items():
        counted = group.as_dict()
        counts[name] = {key: counted[key] for key in ("teacher_tokens", "student_tokens")} | {
            "length_ratio": (counted["length_ratio"] or {}).get("corpus"),
            "identical_span_share": counted["identical_span_share"],
        }
    return {
        "verdict": verdict,
        "verdict_reasons": reasons,
        **vocabulary,
        "teacher_head_rows": teacher.head_rows,
        "student_head_rows": student.head_rows,
        **totals,
        "sample": counts,
        "findings": [finding._asdict() for finding in findings],
    }
