"""The strategies that axolotl tokenises a data set's rows with, once for each side."""

from __future__ import annotations

import copy
import difflib
import pkgutil
from collections.abc import Callable
from typing import Any

import axolotl.prompt_strategies as axolotl_strategies
import axolotl.utils.data.wrappers as axolotl_wrappers
from axolotl.prompt_strategies.completion import CompletionPromptTokenizingStrategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dwakd_plugin.data.answers import AnswerReader
from dwakd_plugin.data.dual_strategy import DualStrategy
from dwakd_plugin.data.teacher_side import default_template, message_mapping
from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.schema import DWAKDConfig
from dwakd_plugin.tokenizers.alignment import TokenAligner
from dwakd_plugin.tokenizers.loading import follows_its_file

WHOLE = 1 << 30  # tokens: longer than any row


def dual_strategy(
    original: Callable[..., Any],
    dataset_config: DictDefault,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    recipes: tuple[DictDefault, DictDefault],
    config: DWAKDConfig,
    kwargs: dict[str, Any],
) -> tuple[DualStrategy, Any, dict[str, Any]]:
    """What tokenises a data set's rows for both sides, the prompter, and what axolotl maps it with.

    `original` is axolotl's `get_dataset_wrapper`, and `kwargs` what it is given beside the data
    set's settings, the tokenizer and the recipe. Raises UserError where it has no such strategy.
    """
    (student_tokenizer, teacher_tokenizer), (cfg, teacher_cfg) = tokenizers, recipes
    folder = student_tokenizer.name_or_path
    if not follows_its_file(student_tokenizer, folder, cfg.revision_of_model):
        raise UserError(
            f"The student's tokenizer, loaded as {type(student_tokenizer).__name__}, doesn't cut "
            f"texts as the tokenizer.json in {folder} does, so the model "
            "would read another text than it knows. Set `tokenizer_type: PreTrainedTokenizerFast` "
            "in the recipe, which takes that file as it is."
        )
    name = f"{dataset_config.path} (type: {dataset_config.type})"
    if not isinstance(kwargs["dataset"], Dataset):
        raise UserError(
            f"{name} is streamed, and the two sides of a streamed row cannot be checked before "
            "training. Remove `streaming`, so that the rows are prepared first."
        )
    _check_template(dataset_config, student_tokenizer, cfg)
    student_dataset_config, teacher_dataset_config = templates(
        dataset_config, student_tokenizer, cfg, teacher_cfg, config
    )
    student_strategy, prompter, process_kwargs = capture_strategy(
        original, name, student_dataset_config, student_tokenizer, cfg, kwargs
    )
    teacher_strategy, _, _ = capture_strategy(
        original, name, teacher_dataset_config, teacher_tokenizer, teacher_cfg, kwargs
    )
    excess_length = (cfg.excess_length_strategy or "drop").lower()
    strategy = DualStrategy(
        student_strategy,
        teacher_strategy,
        name,
        readers=(
            AnswerReader(student_tokenizer, cfg.eot_tokens or ()),
            AnswerReader(teacher_tokenizer, teacher_cfg.eot_tokens or ()),
        ),
        lengths=(cfg.sequence_len, teacher_cfg.sequence_len),
        excess_length=excess_length,
        aligner=_cutting_aligner(*tokenizers) if excess_length == "truncate" else None,
        different_answers=config.different_answers,
        messages=dataset_config.field_messages or "messages",
        tools=dataset_config.field_tools or "tools",
        thinking=dataset_config.field_thinking,
        teacher_name=config.teacher.tokenizer or config.teacher.base_model,
    )
    return strategy, prompter, process_kwargs


def _cutting_aligner(student_tokenizer: Any, teacher_tokenizer: Any) -> TokenAligner:
    try:
        return TokenAligner(student_tokenizer, teacher_tokenizer)
    except UserError as error:
        raise UserError(
            f"{error}\nexcess_length_strategy: truncate cuts both sides of a row at the same byte. "
            "Have long rows dropped (`excess_length_strategy: drop`)."
        ) from error


def _check_template(
    dataset_config: DictDefault, tokenizer: PreTrainedTokenizerBase, cfg: DictDefault
) -> None:
    """Raises UserError where a data set has chats, and the student nothing to render them with."""
    if not _has_chats(dataset_config):
        return
    if (dataset_config.chat_template or cfg.chat_template) in (None, "tokenizer_default"):
        if tokenizer.chat_template:
            return
        raise UserError(
            f"The student's tokenizer ({tokenizer.name_or_path}) has no chat template, "
            f"and {dataset_config.path} (type: {dataset_config.type}) needs one. Name one that "
            "axolotl has, as `chat_template: chatml`, or give `chat_template: jinja` and "
            "`chat_template_jinja`."
        )
    try:
        template = get_chat_template_from_config(cfg, dataset_config, tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The student's chat template cannot be read: {error}. Name one that axolotl has, as "
            "`chat_template: chatml`, or give `chat_template: jinja` and, as "
            "`chat_template_jinja`, Jinja or a UTF-8 file of it."
        ) from error
    if isinstance(template, str) and "{{" not in template:
        raise UserError(
            f"The student's chat template `{template}` is neither Jinja nor a file that is there: "
            "it would write the same for every row. Give `chat_template_jinja` as one of the two."
        )
    if isinstance(template, str) and template.startswith("\ufeff"):
        raise UserError(
            "The file of the student's chat template begins with a byte-order mark, which would be "
            "a token at the beginning of every row. Save it as UTF-8 without one."
        )


def _has_chats(dataset_config: DictDefault) -> bool:
    return str(dataset_config.type).startswith(("chat_template", "messages"))


def templates(
    dataset_config: DictDefault,
    student_tokenizer: PreTrainedTokenizerBase,
    cfg: DictDefault,
    teacher_cfg: DictDefault,
    config: DWAKDConfig,
) -> tuple[DictDefault, DictDefault]:
    """The data set's settings for each side: the same, but for the chat templates."""
    student, teacher = copy.deepcopy(dataset_config), copy.deepcopy(dataset_config)
    if _has_chats(dataset_config):
        asked = dataset_config.chat_template or cfg.chat_template or "tokenizer_default"
        own = isinstance(student_tokenizer.chat_template, dict)
        if own and asked.startswith("tokenizer_default"):
            student.chat_template = "jinja"
            student.chat_template_jinja = default_template(
                student_tokenizer.chat_template, "The student's tokenizer", "chat_template_jinja"
            )
        try:
            students = get_chat_template_from_config(cfg, student, student_tokenizer)
        except ValueError:  # it has none; where only the teacher's side is made, none is needed
            if not teacher_cfg.chat_template_jinja:
                raise
            students = ""
        # A teacher without a chat template of its own renders the student's.
        teacher.chat_template = "jinja"
        teacher.chat_template_jinja = teacher_cfg.chat_template_jinja or students
        if config.teacher.thinking_key is not None:
            teacher.template_thinking_key = config.teacher.thinking_key
        student.update(message_mapping(student, students))
        teacher.update(message_mapping(teacher, teacher.chat_template_jinja))
    return student, teacher


def capture_strategy(
    original: Callable[..., Any],
    name: str,
    dataset_config: DictDefault,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DictDefault,
    kwargs: dict[str, Any],
) -> tuple[Any, Any, dict[str, Any]]:
    """The strategy that axolotl would have used, its prompter, and how many processes it wanted.

    It cuts no text: some of axolotl's cut an answer at `sequence_len` where they tokenise it, which
    is another byte for each tokenizer, and `DualStrategy` has to see both sides whole.
    """
    captured: list[tuple[Any, dict[str, Any]]] = []

    def capture(strategy: Any, dataset: Any, **process_kwargs: Any) -> Any:
        captured.append((strategy, process_kwargs))
        return dataset

    wrap = axolotl_wrappers.wrap_dataset_for_tokenized_prompt
    axolotl_wrappers.wrap_dataset_for_tokenized_prompt = capture
    try:
        _, prompter = original(
            dataset_config=dataset_config,
            tokenizer=tokenizer,
            cfg=DictDefault({**cfg, "sequence_len": WHOLE}),
            **kwargs,
        )
    except ValueError as error:
        if "unhandled prompt tokenization strategy" in str(error):
            raise UserError(_unknown_type(str(dataset_config.type))) from error
        raise
    finally:
        axolotl_wrappers.wrap_dataset_for_tokenized_prompt = wrap
    if not captured:
        raise UserError(
            f"{name} is tokenised already, or in a way that axolotl does not expose, so it cannot "
            "be tokenised again for the teacher. Give the rows as text, for example with "
            "`type: alpaca`, `type: chat_template` or `type: input_output`."
        )
    strategy, process_kwargs = captured[0]
    if isinstance(strategy, CompletionPromptTokenizingStrategy):
        raise UserError(
            f"{name} cuts texts into chunks of tokens, and the chunks of two tokenizers do not "
            "match. Use a type with one response a row: `type: alpaca`, `type: chat_template`, "
            "`type: input_output` or a prompt format of your own."
        )
    return strategy, prompter, process_kwargs


def _unknown_type(kind: str) -> str:
    """What is wrong with a type that axolotl doesn't have, and the nearest that it has."""
    modules = pkgutil.iter_modules(axolotl_strategies.__path__)
    known = [*axolotl_wrappers.DATASET_HANDLERS, *(each.name for each in modules if not each.ispkg)]
    nearest = difflib.get_close_matches(kind, known, n=1)
    usual = "the usual ones are `alpaca`, `chat_template` and `input_output`"
    hint = f"did you mean `{nearest[0]}`?" if nearest else usual
    return f"axolotl has no data set type `{kind}`; {hint}"
