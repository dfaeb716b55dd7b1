"""Rows to evaluate on: prompts with references, as token ids for each model.

The prompt must be the one that the student was trained on. A recipe is rendered by axolotl itself,
as in training; plain rows by axolotl's alpaca format, by the model's chat template, or by a
template of the user's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dwakd_plugin.data.answers import last_answer
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.model import Source, run_record
from dwakd_plugin.io.files import user_path
from dwakd_plugin.io.json_rows import json_rows
from dwakd_plugin.recipe import Recipe
from dwakd_plugin.tokenizers.pair import is_byte_level, token_bytes

_WANTED = (
    'A row is {"instruction": ..., "input": ..., "output": ...}, output one text or a list of '
    'references, or {"messages": [...]} that ends with the assistant\'s.'
)


@dataclass(frozen=True)
class Row:
    """What is asked, as chat messages before the answer, and the answers that count as right.

    `instruction` and `input` are None in rows that came as messages.
    """

    messages: tuple[dict[str, str], ...]
    references: tuple[str, ...]
    instruction: str | None = None
    input: str = ""


class Encoded(NamedTuple):
    """A row as one model reads it: token ids of the prompt, and of a response with its end."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Format:
    """How a row becomes a prompt: `alpaca`, `chat`, or `text` with a template. `why`: in words."""

    kind: str
    why: str
    template: str = ""


# Reading ------------------------------------------------------------------------------------


def read_rows(file: Path) -> list[Row]:
    """Rows of a JSONL file, or of a JSON list. Raises UserError with the place of what is wrong."""
    return [_row(where, row) for where, row in json_rows(file, _WANTED)]


def _row(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where} isn't a JSON object. {_WANTED}")
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
        if not messages or not all(
            isinstance(each, dict)
            and isinstance(each.get("role"), str)
            and isinstance(each.get("content"), str)
            for each in messages
        ):
            raise UserError(f"{where} has a message without `role` and `content`. {_WANTED}")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise UserError(
                f"{where} has no answer: its last message isn't the assistant's. {_WANTED}"
            )
        asked = tuple({"role": m["role"], "content": m["content"]} for m in messages[:-1])
        return Row(asked, _references(where, messages[-1]["content"]))
    if not isinstance(row.get("instruction"), str):
        raise UserError(f"{where} has no `instruction`. {_WANTED}")
    if "output" not in row:
        raise UserError(f"{where} has no reference: `output` is missing. {_WANTED}")
    more = row.get("input") or ""
    if not isinstance(more, str):
        raise UserError(f"{where} has an `input` that isn't text. {_WANTED}")
    question = row["instruction"] + (f"\n\n{more}" if more else "")
    return Row(
        ({"role": "user", "content": question},),
        _references(where, row["output"]),
        row["instruction"],
        more,
    )


def _references(where: str, output: Any) -> tuple[str, ...]:
    texts = output if isinstance(output, list) else [output]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where} has an `output` that is neither a text nor a list of texts.")
    if not all(text.strip() for text in texts):
        raise UserError(f"{where} has an empty response. Leave the row out.")
    return tuple(texts)


# Rendering ----------------------------------------------------------------------------------


def choose_format(option: str, rows: Sequence[Row], source: Source, tokenizer: Any) -> Format:
    """The format of plain rows: `option` is auto, alpaca, chat, a template, or a file with one.

    auto: chats are chats; what the model was trained on, where its run says so; its chat template;
    alpaca. Raises UserError where the format does not fit rows or tokenizer.
    """
    chats = any(row.instruction is None for row in rows)
    if option == "auto":
        chosen = _automatic(chats, source, tokenizer)
    elif option in ("alpaca", "chat"):
        chosen = Format(option, "as asked")
    else:
        chosen = Format("text", "as asked", _template(option))
    if chosen.kind == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of `{source.name}` has no chat template, and "
            + ("the rows are chats." if option == "auto" else "--prompt-template asks for it.")
            + " Give a model that has one, or rows with `instruction`."
        )
    if chosen.kind != "chat" and chats:
        raise UserError(
            f"--prompt-template {option} is for rows with `instruction`, and the data holds "
            "messages. Leave it out."
        )
    if chosen.kind == "text" and "{input}" not in chosen.template:
        for number, row in enumerate(rows, 1):
            if row.input:
                raise UserError(
                    f"Row {number} has an input, and the prompt template has no {{input}} for it."
                )
    return chosen


def _automatic(chats: bool, source: Source, tokenizer: Any) -> Format:
    if chats:
        return Format("chat", "the rows are chats")
    trained_on = [str(data).rpartition("(")[2].rstrip(")") for data in _data_of(source)]
    if trained_on:
        if all(kind == "alpaca" for kind in trained_on):
            return Format("alpaca", "the model was trained on `type: alpaca`")
        if all(kind.startswith("chat_template") for kind in trained_on) and tokenizer.chat_template:
            return Format("chat", "the model was trained on `type: chat_template`")
        raise UserError(
            f"`{source.name}` was trained on {', '.join(sorted(set(trained_on)))}, which is "
            "neither alpaca nor chat_template alone. Give the recipe itself as DATA, so that "
            "axolotl renders the prompts, or choose with --prompt-template."
        )
    if tokenizer.chat_template:
        return Format("chat", "the tokenizer has a chat template")
    return Format("alpaca", "the tokenizer has no chat template")


def _data_of(source: Source) -> list[Any]:
    data = run_record(source).get("data")
    return data if isinstance(data, list) else []


def _template(option: str) -> str:
    template = option
    if "{instruction}" not in option:
        file = user_path(option)
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompt-template {option}: neither auto, alpaca, chat, a text with "
                f"{{instruction}}, nor a file that can be read ({error})."
            ) from error
        if "{instruction}" not in template:
            raise UserError(f"The prompt template {option} has no {{instruction}}.")
    return template


def prompt_text(row: Row, form: Format, tokenizer: Any) -> str:
    """All text before the response."""
    if form.kind == "chat":
        return _rendered(tokenizer, list(row.messages), add_generation_prompt=True)
    assert row.instruction is not None  # choose_format made sure of it
    if form.kind == "text":
        # The input first: an instruction may speak of {input}.
        parts = form.template.split("{instruction}")
        return row.instruction.join(part.replace("{input}", row.input) for part in parts)
    from axolotl.prompters import AlpacaPrompter

    return str(next(iter(AlpacaPrompter().build_prompt(row.instruction, row.input))))


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise UserError(f"The chat template cannot render a row: {error}") from error


def encode(row: Row, form: Format, tokenizer: Any, stop: Sequence[int]) -> Encoded:
    """Token ids of the prompt, and of the first reference with one end token after it.

    As axolotl trains on them: prompt and response are tokenised apart, a chat in one piece.
    """
    prompt = prompt_text(row, form, tokenizer)
    answer = row.references[0]
    if not prompt:
        raise UserError("A row's prompt is empty. Leave the row out.")
    if form.kind != "chat":
        prompt_ids = list(tokenizer(prompt)["input_ids"])
        if len(prompt_ids) > 1 and prompt_ids[-1] == tokenizer.eos_token_id:
            prompt_ids.pop()  # of tokenizers that end every text
        response = list(tokenizer(answer)["input_ids"])
        if response and response[0] == tokenizer.bos_token_id:
            response = response[1:]
        return Encoded(prompt_ids, _ended(response, stop, tokenizer))
    whole = _rendered(tokenizer, [*row.messages, {"role": "assistant", "content": answer}])
    if not whole.startswith(prompt):
        raise UserError(
            "The chat template begins an answer differently from how it ends a prompt, so a prompt "
            "cannot be cut off. Use --prompt-template, or give the recipe as DATA."
        )
    prompt_ids = _ids(tokenizer, prompt)
    ids = _ids(tokenizer, whole)
    if ids[: len(prompt_ids)] == prompt_ids:
        response = ids[len(prompt_ids) :]
    else:
        response = _ids(tokenizer, whole[len(prompt) :])
    return Encoded(prompt_ids, _ended(response, [*stop, *end_of_turn(tokenizer)], tokenizer))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ended(response: list[int], stop: Sequence[int], tokenizer: Any) -> list[int]:
    """The response up to its first end token, which is added where it has none."""
    for place, index in enumerate(response):
        if index in stop:
            return response[: place + 1]
    return [*response, int(tokenizer.eos_token_id)]


def end_of_turn(tokenizer: Any) -> list[int]:
    """The special token after an answer in the chat template, which may not be the end of sequence.

    A list of one, or of none where the template has none.
    """
    if not tokenizer.chat_template:
        return []
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "answer"}]
    after = _rendered(tokenizer, turn).rpartition("answer")[2]
    added = tokenizer.added_tokens_decoder
    return [i for i in _ids(tokenizer, after) if i in added and added[i].special][:1]


# Bytes --------------------------------------------------------------------------------------


def bytes_of_tokens(tokenizer: Any) -> list[bytes]:
    """What each token id stands for; special tokens stand for nothing."""
    byte_level = is_byte_level(tokenizer)
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index not in added:
            table[index] = token_bytes(token, byte_level=byte_level)
        elif not added[index].special:
            table[index] = added[index].content.encode()
    return table


def token_ends(response: Sequence[int], text: str, table: Sequence[bytes]) -> list[int] | None:
    """Where each token of a response but its last (the end) ends in the text, in UTF-8 bytes.

    What the template puts before or after the text lies before 0 or beyond its length. None where
    the tokens do not spell the text: the tokenizer has normalised it.

    >>> token_ends([0, 1, 2, 3], "ab c", [b" a", b"b ", b"c", b""])
    [1, 3, 4]
    """
    pieces = [table[index] for index in response[:-1]]
    begin = b"".join(pieces).find(text.encode())
    if begin < 0:
        return None
    ends, place = [], -begin
    for piece in pieces:
        place += len(piece)
        ends.append(place)
    return ends


# Recipes ------------------------------------------------------------------------------------


def recipe_rows(
    recipe: Recipe, readers: Sequence[tuple[Source, Any, Sequence[int]]]
) -> tuple[list[str], list[list[Encoded]]]:
    """The recipe's evaluation rows: reference texts, and the rows as each reader has them.

    A reader is a model's source, tokenizer and stop tokens. axolotl renders the rows as in
    training: `test_datasets`, else those that `val_set_size` holds out. The first reader takes the
    student's place; the others are rendered as a teacher is, with their own tokenizer and chat
    template. Of several turns, the last one that is trained on is the response. Raises UserError.
    """
    first, tokenizer, _ = readers[0]
    own = _for_evaluation(recipe).but(base_model=first.weights, tokenizer_config=first.tokenizer)
    rows = _opened(own, first if "dwakd" not in recipe.keys else None, held_out=True)
    if not rows:
        raise UserError("The recipe's evaluation rows are all too long, or have no response.")
    rows.sort(key=lambda row: row.get("source_row", 0))
    encoded = [[_cut(row["input_ids"], row["labels"], *readers[0][1:]) for row in rows]]
    for source, *reader in readers[1:]:
        theirs = {
            tuple(row["input_ids"]): (row["teacher_input_ids"], row["teacher_labels"])
            for row in _opened(own, source, held_out=False)
        }
        try:
            sides = [theirs[tuple(row["input_ids"])] for row in rows]
        except KeyError:
            raise UserError(
                f"A row of the recipe cannot be rendered for `{source.name}`: nothing of its "
                "response is left."
            ) from None
        encoded.append([_cut(*side, *reader) for side in sides])
    texts = [tokenizer.decode(one.response[:-1], skip_special_tokens=True) for one in encoded[0]]
    return texts, encoded


def _for_evaluation(recipe: Recipe) -> Recipe:
    """The recipe with its prompts masked, and its test rows where the training rows were."""
    off = ("train_on_inputs", "sample_packing", "eval_sample_packing", "batch_flattening")
    own = recipe.but(**dict.fromkeys(off, False))
    if tests := recipe.keys.get("test_datasets"):
        return own.but("test_datasets", datasets=tests, val_set_size=0)
    if not recipe.keys.get("val_set_size"):
        raise UserError(
            "The recipe has no evaluation rows. Add `test_datasets` or `val_set_size` to it, or "
            "give a JSONL file as DATA."
        )
    return own


def _opened(recipe: Recipe, second: Source | None, *, held_out: bool) -> list[Any]:
    """Rows with both sides' ids; `second` takes the teacher's place, None leaves the recipe's."""
    from dwakd_plugin.train.open_run import open_rows

    if second is not None:
        own = recipe.but("dwakd", "distillation")
        teacher = {"base_model": second.weights, "tokenizer": second.tokenizer}
        # So long that no row is lost to this side.
        recipe = Recipe.completed(dict(own.keys), teacher | {"sequence_len": 1 << 20})
    with open_rows(recipe) as (_, (train, evaluation), _):
        # Test rows stand where training rows do, and then nothing is held out.
        held = evaluation if evaluation is not None else train
        kept = [held] if held_out else [train, evaluation]
        return [row for rows in kept if rows is not None for row in rows.with_format(None)]


def _cut(ids: list[int], labels: list[int], tokenizer: Any, stop: Sequence[int]) -> Encoded:
    """Prompt and response: the last run of labels that count is the response, with its end."""
    begin, end = last_answer(labels)
    if not 0 < begin < end:
        raise UserError("A row of the recipe has no prompt or no response.")
    ends = [*stop, *end_of_turn(tokenizer)]
    return Encoded(list(ids[:begin]), _ended(list(ids[begin:end]), ends, tokenizer))
