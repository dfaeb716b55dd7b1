"""The reference tables of `docs/configuration.md`: `python -m dwakd_plugin.recipe.reference`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from dwakd_plugin.recipe.blocks import OwnAnswersConfig, ProjectorConfig, SoftDTWConfig
from dwakd_plugin.recipe.schema import DWAKDConfig, LossConfig, NamedTeacher, TeacherConfig


def configuration_table() -> str:
    """Every key of the `dwakd:` block as Markdown tables, one a block, from the schema."""
    sections = []
    for prefix, block in (
        ("dwakd", DWAKDConfig),
        ("dwakd.teacher", TeacherConfig),
        ("dwakd.teachers[]", NamedTeacher),
        ("dwakd.loss", LossConfig),
        ("dwakd.soft_dtw", SoftDTWConfig),
        ("dwakd.projectors", ProjectorConfig),
        ("dwakd.own_answers", OwnAnswersConfig),
    ):
        lines = [f"### `{prefix}`", "", "| key | values | default | meaning |", "|---|---|---|---|"]
        shown = _own_fields(block)
        for name, field in shown.items():
            values = _values(field.annotation) + _bounds(field.metadata)
            default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
            if values in ("block", "blocks"):
                default = "see below"
            lines.append(f"| `{name}` | {values} | {default} | {field.description} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _own_fields(block: type[BaseModel]) -> dict[str, Any]:
    """The keys of a block that the block which it is a kind of doesn't have."""
    inherited = getattr(block.__base__, "model_fields", {})
    return {name: field for name, field in block.model_fields.items() if name not in inherited}


def _values(annotation: Any) -> str:
    """A field's type in a reader's words."""
    parts = get_args(annotation) or (annotation,)
    if any(isinstance(part, type) and issubclass(part, BaseModel) for part in parts):
        return "block"
    words = []
    for part in parts:
        if get_origin(part) is Annotated:
            part = get_args(part)[0]
        if get_origin(part) is Literal:
            words += [f"`{value}`" for value in get_args(part)]
        elif get_origin(part) in (dict, list):
            words.append("mapping" if get_origin(part) is dict else "list of texts")
        elif isinstance(part, type):
            names = {str: "text", bool: "true, false", float: "number", int: "whole number"}
            words.append(names.get(part, "null"))
        else:
            words.append(f"`{part}`")
    return ", ".join(words)


def _bounds(metadata: list[Any]) -> str:
    """A number's bounds in a reader's words; none for texts."""
    least, above, most = (
        next((getattr(each, name) for each in metadata if hasattr(each, name)), None)
        for name in ("ge", "gt", "le")
    )
    if most is None:
        return ""
    lower = f" {least:g}" if least is not None else f" above {above:g}"
    return f",{lower} to {most if isinstance(most, int) else f'{most:g}'}"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(configuration_table())
