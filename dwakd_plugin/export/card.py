"""The README of an exported student: what it learned, from whom, from what, and how well."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import printable

PACKAGES = ("axolotl", "transformers", "peft", "torch")
LOSSES = {
    "loss": "the whole objective, as trained",
    "ce": "cross-entropy of the labels",
    "t2s_ce": "cross-entropy of the projected teacher",
    "student_kd": "divergence in the student's space",
    "teacher_kd": "divergence in the teacher's space",
    "hidden_dtw": "soft-DTW of hidden states",
    "embed_dtw": "soft-DTW of embeddings",
    "eval_loss": "cross-entropy of the labels, held-out rows",
}
KINDS = {
    "full": "all weights",
    "merged": "all weights, the LoRA adapter merged into its base model",
    "adapter": "a LoRA adapter, to be loaded with its base model",
}


def model_card(record: dict[str, Any], log: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """The card as Markdown.

    `record` is what the run says of itself (run.json), `log` the trainer's history, `report` what
    the export found. Local folders appear by their last name alone.
    """
    student = record.get("identity", {}).get("student")
    variant = record.get("settings", {}).get("variant")
    alone = variant == "sft"  # whose run may have named a teacher, and loaded none
    teachers = [] if alone else [public_name(name) for name, _ in _teachers(record)]
    header = [
        "---",
        "library_name: peft" if report["kind"] == "adapter" else "library_name: transformers",
    ]
    if student and _is_hub_id(student):
        header.append(f"base_model: {student}")
    header += ["tags:", *([] if alone else ["- knowledge-distillation"]), "- dwakd", "---", ""]
    nobody = "none" if alone else "not recorded"
    taught_by = _cell(", ".join(dict.fromkeys(teachers)) or nobody)
    names = {
        "student": _cell(public_name(student) if student else "not recorded"),
        "teachers" if len(teachers) > 1 else "teacher": taught_by,
        "data": ", ".join(record.get("data", [])) or "not recorded",
        "contents": f"{KINDS[report['kind']]}; {report['parameters']:,} parameters, "
        f"{report['dtype']}; no projector and no teacher",
    }
    lines = [
        f"# {public_name(report['destination'])}",
        "",
        f"**{names['student']}**, " + _how(taught_by, variant),
        "",
        *_table(("", ""), names),
        "",
        *_settings(record),
        *_losses(log),
        "## Checked",
        "",
        _checked(report["verification"]),
        "",
        "## Versions",
        "",
        ", ".join(_versions(record)),
        "",
    ]
    return "\n".join(header + lines)


def _how(taught_by: str, variant: str | None) -> str:
    """By whom and by which method a student was taught; only the paper's form is DWA-KD."""
    if variant == "sft":
        return "fine-tuned on its labels alone, without a teacher."
    method = f"`{variant}` of dwakd" if variant else "dwakd"
    if variant in ("paper", "full"):
        method = "DWA-KD, [arXiv 2602.21669](https://arxiv.org/abs/2602.21669)"
    return f"taught by **{taught_by}** with cross-tokenizer knowledge distillation ({method})."


def _teachers(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Of each teacher, its model and what the run's settings say of it."""
    settings = record.get("settings", {})
    if several := settings.get("teachers"):
        return [(str(one.get("model") or one["base_model"]), one) for one in several]
    name = record.get("identity", {}).get("teacher")
    return [(str(name), settings.get("teacher", {}))] if name else []


def public_name(name: str) -> str:
    """A hub id as it is; of a path the last part, which says nothing about the machine.

    >>> public_name("/home/me/models/small"), public_name("Qwen/Qwen1.5-1.8B")
    ('small', 'Qwen/Qwen1.5-1.8B')
    """
    return name if _is_hub_id(name) else Path(name).name


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _settings(record: dict[str, Any]) -> list[str]:
    """What shaped the training; nothing that names a place on the machine."""
    settings = record.get("settings", {})
    shown: dict[str, Any] = dict(record.get("training", {}))
    if settings:
        shown["variant"] = settings.get("variant")
        for _, own in _teachers(record):
            whose = f"teacher {own['name']}" if "name" in own else "teacher"
            shown[f"{whose}'s precision"] = (
                "8 bit"
                if own.get("load_in_8bit")
                else "4 bit"
                if own.get("load_in_4bit")
                else own.get("dtype")
            )
            shown[f"{whose}'s weight"] = own.get("weight")
        for block in ("loss", "soft_dtw", "projectors"):
            for key, value in settings.get(block, {}).items():
                if key != "path":
                    shown[f"{block}.{key}"] = value
    rows = {key: value for key, value in shown.items() if value is not None}
    return ["## Settings", "", *_table(("setting", "value"), rows), ""] if rows else []


def _losses(log: list[dict[str, Any]]) -> list[str]:
    """The last value of each loss, and the step it is of."""
    last = {
        name: (line[name], line.get("step", "?"))
        for line in log
        for name in LOSSES
        if isinstance(line.get(name), int | float)
    }
    if not last:
        return ["## Losses", "", "The run kept no log (it saved no checkpoint).", ""]
    lines = ["## Losses", "", "In nats per student or teacher token, as last logged.", ""]
    lines += ["| loss | last value | step | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {last[name][0]:.4g} | {last[name][1]} | {meaning} |"
        for name, meaning in LOSSES.items()
        if name in last
    ]
    return [*lines, ""]


def _checked(check: dict[str, Any]) -> str:
    difference = check["relative_logit_difference"]
    logits = (
        "its logits equal those of the run's student exactly"
        if difference == 0
        else f"its logits differ from those of the run's student by {difference:.2g} of their size "
        f"({check['tolerance']:g} was allowed)"
    )
    return (
        f"Loaded in a process of its own, {logits}, over {check['tokens_compared']} tokens in "
        f"float32; it generated {check['tokens_generated']} more."
    )


def _versions(record: dict[str, Any]) -> list[str]:
    found = [f"dwakd {record['version']} (training)"] if "version" in record else []
    for package in ("dwakd", *PACKAGES):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def _table(titles: tuple[str, str], rows: dict[str, Any]) -> list[str]:
    return [
        f"| {titles[0]} | {titles[1]} |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in rows.items()),
    ]


def _cell(value: Any) -> str:
    """A value within a line of a table: what a run says of itself ends neither."""
    text = printable(" ".join(str(value).split()))
    return re.sub(r"(?<!\\)\|", r"\|", text).replace("<", "&lt;")
