"""A row as the teacher's side sees it: its tokenizer, its chat template, where its turns end."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from dwakd_plugin.errors import UserError, first_line
from dwakd_plugin.io.files import user_path
from dwakd_plugin.recipe.schema import DWAKDConfig, NamedTeacher, TeacherConfig
from dwakd_plugin.tokenizers.loading import load_tokenizer

# Words that no template has, to see what it makes of a conversation.
_PROBE = (
    {"role": "user", "content": "Zq7Question"},
    {"role": "assistant", "content": "Zq7Answer"},
)
# What a message may have beside role and content.
_MESSAGE_FIELDS = (
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
)


@dataclass(frozen=True)
class TeacherSide:
    """One of the teachers, and what its side of a row is made with.

    `config` are the settings with this teacher alone, `recipe` the recipe as its side sees it.
    """

    teacher: NamedTeacher
    config: DWAKDConfig
    tokenizer: PreTrainedTokenizerBase
    recipe: DictDefault


def teacher_sides(cfg: DictDefault, config: DWAKDConfig) -> list[TeacherSide]:
    """Each teacher's side, in the recipe's order. Raises UserError."""
    sides = []
    for teacher in config.each_teacher:
        tokenizer = load_teacher_tokenizer(teacher)
        own = teacher_recipe(cfg, teacher, tokenizer)
        sides.append(TeacherSide(teacher, config.of(teacher), tokenizer, own))
    return sides


def load_teacher_tokenizer(teacher: TeacherConfig) -> PreTrainedTokenizerBase:
    """The teacher's own tokenizer. Raises UserError where there is none to load."""
    name = teacher.tokenizer or teacher.base_model
    return load_tokenizer(
        name,
        f"The teacher's tokenizer `{name}`",
        "Give a folder with tokenizer files or a hub id as dwakd.teacher.base_model (or "
        "dwakd.teacher.tokenizer).",
        end_remedy="Give a tokenizer that has one as dwakd.teacher.tokenizer.",
        revision=teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
    )


def teacher_template(teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The teacher's chat template as Jinja text; None where neither recipe nor tokenizer has one.

    `dwakd.teacher.chat_template` may be Jinja, a file of it, one of axolotl's names (`chatml`), or
    the name of one of the tokenizer's own; of several of those, `default` is taken. Raises
    UserError where it is none of these.
    """
    own, asked = tokenizer.chat_template, teacher.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {}
    if asked is None or asked == "tokenizer_default":
        return default_template(own, "The teacher's tokenizer", "dwakd.teacher.chat_template")
    if asked in named:
        return named[asked]
    if "{{" in asked or "{%" in asked:
        return asked
    try:
        if user_path(asked).is_file():
            return user_path(asked).read_text(encoding="utf-8-sig")  # some editors' first mark
        return get_chat_template(asked)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"dwakd.teacher.chat_template: {asked} cannot be read: {error}") from error
    except ValueError as error:
        others = f" The teacher's tokenizer has: {', '.join(named)}." if named else ""
        raise UserError(
            f"dwakd.teacher.chat_template: `{asked}` is neither Jinja, nor a file, nor the name of "
            f"a template that axolotl has, such as chatml or llama3.{others} Leave the key out for "
            "the teacher tokenizer's own."
        ) from error


def default_template(own: Any, whose: str, key: str) -> str | None:
    """Of a tokenizer's templates the one that is meant where none is named. Raises UserError."""
    if not isinstance(own, dict):
        return own
    if "default" in own:
        return own["default"]
    raise UserError(
        f"{whose} has several chat templates ({', '.join(own)}) and none called `default`. Give "
        f"one as {key}."
    )


def end_of_turn(template: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that ends the teacher's turns, found by rendering one; None where none does.

    Raises UserError where the template cannot render an answer, or leaves it out.
    """
    place = "The teacher's chat template (dwakd.teacher.chat_template, or its tokenizer's own)"
    try:
        text = str(
            tokenizer.apply_chat_template(
                [dict(message) for message in _PROBE], chat_template=template, tokenize=False
            )
        )
    except Exception as error:  # templates raise whatever they like
        raise UserError(
            f"{place} cannot render a question and its answer: {first_line(error)}\nGive another "
            "one, such as dwakd.teacher.chat_template: chatml."
        ) from error
    missing = [str(message["content"]) for message in _PROBE if message["content"] not in text]
    if missing:
        raise UserError(
            f"{place} leaves out what was said: asked to render a question and its answer, it "
            f"wrote {text[:200]!r}. Give a template that renders the messages' content."
        )
    after = text.rpartition(str(_PROBE[1]["content"]))[2].lstrip()
    known = sorted((str(token) for token in tokenizer.get_added_vocab()), key=len, reverse=True)
    return next((token for token in known if after.startswith(token)), None)


def teacher_recipe(
    cfg: DictDefault, teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase
) -> DictDefault:
    """The recipe as the teacher's side of each row sees it: its length, its template, no overrides.

    The student's special-token overrides and end-of-turn tokens are not the teacher's; where the
    teacher's turns end with another token than its end of sequence, its own is named instead.
    Raises UserError.
    """
    own = copy.deepcopy(cfg)
    own.sequence_len = teacher.sequence_len or cfg.sequence_len
    own.special_tokens = None
    own.eot_tokens = None
    own.chat_template_jinja = teacher_template(teacher, tokenizer)
    if own.chat_template_jinja is not None and renders_chats(cfg):
        end = end_of_turn(own.chat_template_jinja, tokenizer)
        if end not in (None, tokenizer.eos_token) and end in own.chat_template_jinja:
            own.eot_tokens = [end]
    return own


def message_mapping(dataset: Mapping[str, Any], template: str) -> dict[str, Any]:
    """Of a data set's settings what gives its chat template all that it reads of a message.

    Beside role and content axolotl hands on what a template reads of a variable called `message`:
    `msg.tool_calls` would be left out, silently. And it leaves `field_thinking` and
    `template_thinking_key` aside where there is a mapping of properties, of which its schema makes
    one where the recipe has none.
    """
    own = {name: name for name in _MESSAGE_FIELDS if re.search(rf"\b{name}\b", template)}
    field, key = dataset.get("field_thinking"), dataset.get("template_thinking_key")
    if field or key:
        own[key or "reasoning_content"] = field or "reasoning_content"
    mapped = dataset.get("message_property_mappings") or {"role": "role", "content": "content"}
    return {"message_property_mappings": {**own, **mapped}} if own else {}


def renders_chats(cfg: DictDefault) -> bool:
    """Whether any data set of the recipe goes through a chat template."""
    return any(
        str(dataset.type).startswith(("chat_template", "messages"))
        for dataset in [*(cfg.datasets or []), *(cfg.test_datasets or [])]
    )
