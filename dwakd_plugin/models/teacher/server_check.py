"""Whether a server holds the teacher, asked before a run, and how it tells probabilities.

Every way in which it does not is one message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.teacher.server import Refused, Server
from dwakd_plugin.models.teacher.server_answers import (
    Echo,
    Left,
    TokenTexts,
    Unreadable,
    by_ids,
    top_tokens,
)
from dwakd_plugin.recipe.schema import TeacherConfig

Rows = list[dict[int, float] | None]  # log p by token id, for each token of a row

# Words, digits, white space, letters beyond ASCII: what tokenizers cut differently. The last two
# begin alike, and end otherwise.
TEXTS = (
    "The capital of France is Paris, and 1234 + 5678 = 6912.",
    "def größe(x):\n\treturn x['数学'] ** 2  # naïve",
    "One, two, three, four, five, six",
    "One, two, three, four, five, mice",
)
_A_LIMIT = re.compile(
    r"(?i)max|at most|less than|greater than|no more|limit|between|must be|exceed"
)
SAME = 0.1  # nats that one probability may differ by between two requests, rounded in the server


@dataclass(frozen=True)
class Way:
    """How a server is asked: by token ids and `prompt_logprobs`, or by a text and `echo`.

    late: it says of a token what it should say of the next one, in rows without and with BOS.
    adds_bos: it puts BOS before texts.
    """

    model: str
    top_k: int
    by_ids: bool
    late: tuple[bool, bool] = (False, False)
    adds_bos: bool = False

    def prompt(self, ids: list[int], tokenizer: Any) -> list[int] | str | None:
        """A row as it is sent; None where it must be a text and none is cut into its tokens."""
        if self.by_ids:
            return ids
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            return None
        if not self.adds_bos:
            return str(text)
        begins = ids and ids[0] == tokenizer.bos_token_id
        return str(text).removeprefix(tokenizer.bos_token) if begins else None

    def body(self, prompt: Sequence[int] | str) -> dict[str, Any]:
        """The request for one row; one token is generated, as 0 is not what all take."""
        asked = {"prompt_logprobs": self.top_k} if self.by_ids else {}
        if not self.by_ids:
            asked = {"echo": True, "logprobs": self.top_k}
        return {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0, **asked}

    def read(
        self, answer: Mapping[str, Any], ids: Sequence[int], texts: TokenTexts, left: Left
    ) -> Rows:
        """Raises Unreadable."""
        if self.by_ids:
            return by_ids(answer, ids)
        late = self.late[ids[0] == texts.bos]
        return Echo.of(answer).by_ids(ids, texts, late=late, left=left)

    def __str__(self) -> str:
        if self.by_ids:
            return "token ids and prompt_logprobs"
        late = ", whose log-probabilities come one token late" * any(self.late)
        return f"texts with echo{late}"


def find_way(
    server: Server, config: TeacherConfig, tokenizer: Any, texts: TokenTexts, longest: int
) -> Way:
    """How the server tells the probabilities of a text, tried on a few.

    longest: the tokens of the longest row. Raises UserError where it does not, or is not the
    teacher that the recipe names.
    """
    _check_model(server, config, longest)
    assert config.top_k is not None
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    way = Way(config.called, config.top_k, by_ids=True)
    refused: list[Refused] = []
    first = _asked(server, way, ids[0], refused)
    if first is None or not _has_ids(first):
        way = Way(config.called, config.top_k, by_ids=False)
        first = _asked(server, way, TEXTS[0], refused)
        if first is None or not _has_echo(first, len(ids[0])):
            raise UserError(_no_probabilities(server, refused))
    usage = first.get("usage") or {}
    if not way.by_ids and usage.get("prompt_tokens") == len(ids[0]) + 1:
        way = replace(way, adds_bos=True)
    # As texts, so that the server cuts them.
    extra = {"add_special_tokens": False} if way.by_ids else {}
    answers = [server.ask("/completions", way.body(text) | extra) for text in TEXTS]
    for text, own, answer in zip(TEXTS, ids, answers, strict=True):
        _check_tokens(server, config, tokenizer, way, text, own, answer, texts)
    if not way.by_ids:
        way = replace(way, late=(_is_late(server, way, ids, tokenizer, texts), way.late[1]))
        if texts.bos is not None:
            begun = [[texts.bos, *own] for own in ids]
            late = _is_late(server, way, begun, tokenizer, texts)
            way = replace(way, late=(way.late[0], late))
    elif _is_late(server, way, ids, tokenizer, texts):
        raise UserError(_not_causal(server))
    _check_again(server, way, ids[2], answers[2], texts)
    for own, answer in zip(ids, answers, strict=True):
        try:
            rows = way.read(answer, own, texts, Left(way.top_k))
            top_tokens(rows, way.top_k, texts.size)
        except Unreadable as error:
            raise UserError(f"{server.name} answers, and {error}. It cannot teach.") from error
    _check_count(server, way, answers, len(tokenizer))
    return way


def _check_model(server: Server, config: TeacherConfig, longest: int) -> None:
    """Whether the server has the model, where it lists them, and room for the rows."""
    try:
        found = server.ask("/models").get("data")
    except Refused as refused:
        if refused.status in (404, 405):
            return
        raise
    models = {
        str(each["id"]): each.get("max_model_len")
        for each in (found if isinstance(found, list) else [])
        if isinstance(each, dict) and "id" in each
    }
    if models and config.called not in models:
        raise UserError(
            f"{server.name} has no model `{config.called}`. It has: {', '.join(sorted(models))}. "
            "Give one of them as dwakd.teacher.model."
        )
    room = models.get(config.called)
    if isinstance(room, int) and room <= longest:
        raise UserError(
            f"{server.name} takes {room:,} tokens at most, the longest row has {longest:,}, and "
            f"one more is generated. Start it with more (vLLM: --max-model-len {longest + 1}), or "
            f"set dwakd.teacher.sequence_len: {room - 1}."
        )


def _asked(
    server: Server, way: Way, prompt: Sequence[int] | str, refused: list[Refused]
) -> dict[str, Any] | None:
    """The server's answer; None where it does not take the request, which joins the `refused`.

    Raises UserError where that is for the number of log-probabilities.
    """
    try:
        return server.ask("/completions", way.body(prompt), form=True)
    except Refused as error:
        if error.status in (401, 403):
            raise
        if "logprobs" in error.words and _A_LIMIT.search(error.words):
            raise UserError(_too_few(server, way.top_k, f"It says: {error.words}")) from error
        refused.append(error)
        return None


def _too_few(server: Server, top_k: int, found: str) -> str:
    return (
        f"{server.name} gives fewer log-probabilities a token than dwakd.teacher.top_k: {top_k} "
        f"asks for. {found}\nStart it with more (vLLM: --max-logprobs {top_k}), or lower top_k."
    )


def _no_probabilities(server: Server, refused: list[Refused]) -> str:
    words = "".join(f"\n  it said: {error.status} {error.words}" for error in refused)
    return (
        f"{server.name} gives no log-probabilities of a prompt: neither as `prompt_logprobs` "
        "(vLLM) nor by `echo` with `logprobs` (llama-cpp-python with --logits_all true). A server "
        f"without them cannot teach; llama.cpp's own llama-server has none.{words}"
    )


def _has_ids(answer: Mapping[str, Any]) -> bool:
    choices = answer.get("choices")
    return bool(isinstance(choices, list) and choices and choices[0].get("prompt_logprobs"))


def _has_echo(answer: Mapping[str, Any], count: int) -> bool:
    """Whether the prompt's tokens are among those with log-probabilities, and not one alone."""
    try:
        found = Echo.of(answer)
    except Unreadable:
        return False
    return len(found.tokens) > min(2, count - 1) and any(found.top)


def _check_tokens(
    server: Server,
    config: TeacherConfig,
    tokenizer: Any,
    way: Way,
    text: str,
    ids: list[int],
    answer: Mapping[str, Any],
    texts: TokenTexts,
) -> None:
    """Raises UserError where the server cuts a text otherwise than the tokenizer here."""
    own = [tokenizer.decode([index]) for index in ids]
    theirs: str
    try:
        rows = way.read(answer, ids, texts, Left(way.top_k))
        # The token itself is always among those of its place.
        strange = [
            own[place]
            for place, (index, row) in enumerate(zip(ids, rows, strict=True))
            if way.by_ids and row is not None and index not in row
        ]
        if not strange:
            return
        theirs = f"at {', '.join(map(repr, strange[:5]))} into others"
    except Unreadable:
        if way.by_ids:
            count = len(answer["choices"][0]["prompt_logprobs"] or [])
            theirs = f"into {count} others"
        else:
            theirs = f"into {Echo.of(answer).tokens}"
    raise UserError(
        f"{server.name} has another tokenizer than `{config.tokenizer or config.base_model}` "
        f"(dwakd.teacher.tokenizer): it cuts {text!r} {theirs}, and that one into {own}. Name the "
        "tokenizer of the served model."
    )


def _is_late(
    server: Server, way: Way, ids: list[list[int]], tokenizer: Any, texts: TokenTexts
) -> bool:
    """Whether the server says of a token what it should say of the next one.

    The last two texts are one up to some token, and nothing that follows a token may change what is
    said of it. Raises UserError where it does either way.
    """
    one, other = ids[2], ids[3]
    prompts = [way.prompt(each, tokenizer) for each in (one, other)]
    if None in prompts:  # nor will rows like these be sent
        return False
    answers = [server.ask("/completions", way.body(prompt or "")) for prompt in prompts]
    place = next(n for n, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1)
    for late in (False, True):
        tried = replace(way, late=(late, late))
        rows = [
            tried.read(answer, own, texts, Left(way.top_k))[place]
            for own, answer in zip((one, other), answers, strict=True)
        ]
        # Its own token is of each text alone.
        own = {one[place], other[place]}
        said = [row and {token: row[token] for token in row if token not in own} for row in rows]
        if _alike(*said):
            return late
    raise UserError(_not_causal(server))


def _not_causal(server: Server) -> str:
    return (
        f"{server.name} says other probabilities of a token where another one follows it, so they "
        "are not a language model's, or not those of the text that was sent. With vLLM, switch "
        "prefix caching off (--no-enable-prefix-caching)."
    )


def _check_again(
    server: Server, way: Way, ids: list[int], answer: Mapping[str, Any], texts: TokenTexts
) -> None:
    """Raises UserError where the server says other probabilities of the same text."""
    again = server.ask("/completions", way.body(ids if way.by_ids else TEXTS[2]))
    before, after = (way.read(each, ids, texts, Left(way.top_k)) for each in (answer, again))
    if not all(map(_alike, before, after)):
        raise UserError(
            f"{server.name} says other probabilities of the same text when it is asked again. With "
            "vLLM, switch prefix caching off (--no-enable-prefix-caching)."
        )


def _alike(one: dict[int, float] | None, other: dict[int, float] | None) -> bool:
    """Whether two places say the same of their likeliest tokens, but for rounding."""
    if one is None or other is None:
        return one is other
    likeliest = sorted(one, key=lambda token: -one[token])[:5]
    differences = [abs(one[token] - other[token]) for token in likeliest if token in other]
    # What is hardly there at all may be on one side alone.
    return len(differences) >= min(3, len(one)) and max(differences, default=0.0) < SAME


def _check_count(server: Server, way: Way, answers: list[Any], vocabulary: int) -> None:
    """Raises UserError where no place has as many tokens as were asked for.

    Among texts that count falls short by itself, where two tokens are written alike.
    """
    counts: list[int] = []
    for answer in answers:
        choice = answer["choices"][0]
        entries = choice["prompt_logprobs"] if way.by_ids else choice["logprobs"]["top_logprobs"]
        counts += [len(entry) for entry in entries if entry]
    wanted = min(way.top_k, vocabulary)
    if max(counts) < (wanted if way.by_ids else 0.75 * wanted):
        raise UserError(
            _too_few(server, way.top_k, f"Of {wanted} asked for, it gives {max(counts)}.")
        )
