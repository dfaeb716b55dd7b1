"""Which of a teacher's answers are kept, and the rows that they become."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dwakd_plugin.data.answers import without_reasoning
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate.answer_files import AnswerFiles, write_rows
from dwakd_plugin.evaluate.responses import Response
from dwakd_plugin.tokenizers.sampled import special_tokens

if TYPE_CHECKING:
    from dwakd_plugin.data.raw_rows import Prompt, Prompts

Keep = Literal["all", "shortest", "likeliest"]

# Why an answer isn't kept, and how that is said.
DROPPED = {
    "unended": "didn't end",
    "empty": "are empty",
    "not_text": "have a special token or half a character in them",
    "too_long": "are too long for sequence_len with their prompt",
}


class Answer(NamedTuple):
    """A response that is kept, and its text as it goes into the row."""

    response: Response
    text: str


class _Dropped(Exception):
    """Why an answer isn't kept: a key of DROPPED."""


def write_answers(
    files: AnswerFiles,
    prompts: Prompts,
    held_out: frozenset[int],
    responses: Sequence[Sequence[Response]],
    keep: Keep,
    keep_unended: bool,
    with_labels: bool,
) -> dict[str, Any]:
    """Writes the rows, and says what they are. responses: by sample, of each prompt.

    Raises UserError where no answer can be kept.
    """
    chosen, dropped = choose(prompts, responses, keep, keep_unended)
    made = [response for of_sample in responses for response in of_sample]
    kept = [answer.response for _, answers in chosen for answer in answers]
    if not kept:
        raise UserError(
            f"None of {len(made):,} answers can be kept: "
            + ", ".join(f"{dropped[reason]:,} {words}" for reason, words in DROPPED.items())
            + ". Where none ends, raise --max-new-tokens, or look whether the teacher was trained "
            "for chats; --keep-unended keeps those too."
        )
    return {
        "prompts": len(prompts.found),
        "held_out_rows": len(held_out),
        "rows_left_out": dict(prompts.left_out),
        "answers": len(made),
        "ended": sum(response.ended for response in made) / len(made),
        "dropped": dict(dropped),
        "prompts_without_answer": sum(not answers for _, answers in chosen),
        "kept": len(kept),
        "tokens": _lengths(made),
        "tokens_kept": _lengths(kept),
        "log_probability": _mean_log_probability(made),
        "log_probability_kept": _mean_log_probability(kept),
        **_write(files, prompts, held_out, chosen, with_labels),
    }


def choose(
    prompts: Prompts, responses: Sequence[Sequence[Response]], keep: Keep, keep_unended: bool
) -> tuple[list[tuple[Prompt, list[Answer]]], Counter[str]]:
    """What is kept of each prompt's answers, and how many were dropped and why.

    likeliest: of the highest mean log-probability a token, its end included.
    """
    special = special_tokens(prompts.tokenizer)
    added = prompts.tokenizer.added_tokens_decoder
    unwanted = ["\ufffd", *(added[index].content for index in special)]
    dropped: Counter[str] = Counter(dict.fromkeys(DROPPED, 0))
    chosen = []
    for prompt, samples in zip(prompts.found, zip(*responses, strict=True), strict=True):
        room = prompts.longest - prompts.behind - len(prompt.ids)
        answers = []
        for response in samples:
            try:
                answers.append(Answer(response, _text(response, unwanted, room, keep_unended)))
            except _Dropped as reason:
                dropped[str(reason)] += 1
        if keep == "shortest":
            answers = sorted(answers, key=lambda each: each.response.tokens)[:1]
        elif keep == "likeliest":
            answers = sorted(answers, key=lambda each: -_log_probability(each.response))[:1]
        chosen.append((prompt, answers))
    return chosen, dropped


def _text(response: Response, unwanted: Sequence[str], room: int, keep_unended: bool) -> str:
    """An answer without its reasoning, which chat templates leave out, and white space around it.

    Raises _Dropped where it is none to learn from.
    """
    text = without_reasoning(response.text)
    if text is None or not (response.ended or keep_unended):
        raise _Dropped("unended")
    if any(each in text for each in unwanted):
        raise _Dropped("not_text")
    if not text.strip():
        raise _Dropped("empty")
    if response.tokens > room:
        raise _Dropped("too_long")
    return text.strip()


# Rows ---------------------------------------------------------------------------------------


def _write(
    files: AnswerFiles,
    prompts: Prompts,
    held_out: frozenset[int],
    chosen: list[tuple[Prompt, list[Answer]]],
    with_labels: bool,
) -> dict[str, Any]:
    """A file for each shape of rows, and the data sets of a recipe that trains on them."""
    shapes = [json.dumps(table.shape, sort_keys=True, default=str) for table in prompts.tables]
    datasets, tests = [], []
    for number, shape in enumerate(dict.fromkeys(shapes)):
        tables = {place for place, each in enumerate(shapes) if each == shape}
        settings = {"ds_type": "json", **prompts.tables[min(tables)].shape}
        mine = [each for each in chosen if each[0].table in tables]
        if any(answers for _, answers in mine):
            file = files.rows(number)
            write_rows(file, _rows(prompts, mine, with_labels))
            datasets.append({"path": str(file), **settings})
        apart = list(_as_they_were(prompts, held_out, tables))
        if apart:
            file = files.held_out(number)
            write_rows(file, apart)
            tests.append({"path": str(file), "split": "train", **settings})
    return {
        "out": [each["path"] for each in datasets],
        "held_out": [each["path"] for each in tests],
        "datasets": datasets,
        "test_datasets": tests or None,
    }


def _rows(
    prompts: Prompts, chosen: list[tuple[Prompt, list[Answer]]], with_labels: bool
) -> Iterator[dict[str, Any]]:
    for prompt, answers in chosen:
        table = prompts.tables[prompt.table]
        if with_labels and table.has_answer(prompt.row):
            yield table.rows[prompt.row]
        for answer in answers:
            yield table.answered(prompt.row, answer.text)


def _as_they_were(
    prompts: Prompts, held_out: frozenset[int], tables: set[int]
) -> Iterator[dict[str, Any]]:
    source = 0
    for number, table in enumerate(prompts.tables):
        for row in range(len(table.rows)):
            if source in held_out and number in tables:
                yield table.rows[row]
            source += 1


# Figures ------------------------------------------------------------------------------------


def _lengths(responses: Sequence[Response]) -> dict[str, Any]:
    lengths = np.array([response.tokens for response in responses])
    return {
        "mean": round(float(lengths.mean()), 1),
        "quartiles": np.quantile(lengths, (0.25, 0.5, 0.75)).tolist(),
        "longest": int(lengths.max()),
    }


def _log_probability(response: Response) -> float:
    assert response.log_probability is not None  # every teacher's answer is scored
    return response.log_probability


def _mean_log_probability(responses: Sequence[Response]) -> float:
    """Of a token, over all tokens, in nats."""
    total = sum(response.tokens * _log_probability(response) for response in responses)
    return round(total / max(1, sum(response.tokens for response in responses)), 4)
