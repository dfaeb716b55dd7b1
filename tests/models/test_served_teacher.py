"""A teacher on a server: its probabilities are the model's own, and each failure has its words."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.teacher import server as server_module
from dwakd_plugin.models.teacher.served import ServedTeacher, Stopped
from dwakd_plugin.models.teacher.server import KEY, ServerGone
from dwakd_plugin.models.teacher.server_answers import Echo, Left, TokenTexts, by_ids, top_tokens
from dwakd_plugin.models.teacher.top_tokens import top_of_states
from dwakd_plugin.recipe.schema import TeacherConfig
from tests.served import MODEL, Behaviour, serving

SECRET = "sk-not-to-be-seen"


@pytest.fixture(scope="module")
def tiny(lab: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(lab / "teacher", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(lab / "teacher")
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2 has it
    model.resize_token_embeddings(len(tokenizer))  # what has no name, no server says
    return model, tokenizer


@pytest.fixture
def server(tiny: tuple[Any, Any]) -> Iterator[Behaviour]:
    with serving(*tiny) as behaviour:
        yield behaviour


@pytest.fixture
def teacher(
    server: Behaviour, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ServedTeacher]:
    """Connects to the server; keywords are keys of `dwakd.teacher`."""
    monkeypatch.setattr(server_module, "PROMPTLY", 0.3)

    def connect(longest: int = 64, said: list[str] | None = None, **keys: Any) -> ServedTeacher:
        settings = {
            "server": server.address,
            "model": MODEL,
            "tokenizer": str(lab / "teacher"),
            "top_k": 8,
            "server_patience": 1,
        }
        config = TeacherConfig(**{**settings, **keys})
        say = [] if said is None else said
        return ServedTeacher(config, server.tokenizer, longest, say.append)

    return connect


def row(tokenizer: Any, text: str, prompt: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A row whose first tokens are a prompt."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    labels = ids.clone()
    labels[:prompt] = -100
    return ids, labels


def oracle(model: Any, ids: torch.Tensor, labels: torch.Tensor, k: int) -> Any:
    """What the cache of a local teacher would hold of the row."""
    from dwakd_plugin.models.causal_lm import hidden_states, output_head

    with torch.no_grad():
        states = hidden_states(model, ids[None], None)[0][:-1][labels[1:] != -100]
    return top_of_states(states, output_head(model), k)


TEXT = "Function 12 returns the größte of its 3 arguments, and raises an error.<|im_end|>"
CHAT = (
    f"<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n{TEXT}\n<|im_start|>user\nThe sum."
)


@pytest.mark.parametrize("text", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("shape", ["vllm", "echo", "late"])
def test_what_it_says_of_a_row_is_the_models_own(
    shape: Any, text: str, server: Behaviour, teacher: Callable[..., ServedTeacher]
) -> None:
    server.shape = shape
    served = teacher()
    assert (served.way.by_ids, served.way.late) == (shape == "vllm", (shape == "late", False))
    ids, labels = row(server.tokenizer, text, prompt=5)
    found = served.take(served.want(ids, labels))
    expected = oracle(server.model, ids, labels, 8)
    assert found.token_ids.dtype == torch.int32 and found.token_ids.shape == (len(ids) - 5, 8)
    if shape == "vllm":
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
        return
    # Texts that may stand for several tokens are left out, and that is counted.
    places = [labels[1:].ne(-100).nonzero().flatten().tolist(), range(len(found.token_ids))]
    with torch.no_grad():
        known = server.model(ids[None]).logits[0].log_softmax(-1)
    for place, number in zip(*places, strict=True):
        row_ids, values = found.token_ids[number].tolist(), found.log_probs[number].tolist()
        said = {token: value for token, value in zip(row_ids, values, strict=True) if token >= 0}
        for token, value in said.items():
            assert value == pytest.approx(float(known[place, token]), abs=1e-5)
        top = {*expected.token_ids[number].tolist()}
        told = {token for token in top if token in served._texts.ids.values()}
        told -= served._texts.special if shape == "late" else set()
        if said:  # nothing follows BOS where a server leaves it out
            assert told <= said.keys() <= told | {int(ids[place + 1])}
        else:
            assert shape == "late" and served._texts.bos in ids[place : place + 2]
    assert 0 < served.left.share < 1


def test_of_texts_only_those_of_one_token_count(tiny: tuple[Any, Any]) -> None:
    texts = TokenTexts(tiny[1])
    for text, index in texts.ids.items():
        assert tiny[1].decode([index]) == text
    whole = [index for index, text in texts.texts.items() if text]
    lone_bytes = [index for index, text in texts.texts.items() if text is None]
    assert len(lone_bytes) > 100 and not {*lone_bytes} & {*texts.ids.values()}
    assert len(texts.ids) > 0.9 * len(whole)


def test_a_row_of_tokens_that_no_text_is_cut_into_says_nothing(
    server: Behaviour, teacher: Callable[..., ServedTeacher]
) -> None:
    server.shape = "echo"
    served = teacher()
    spelt = torch.tensor(
        [index for each in "the sum" for index in server.tokenizer(each).input_ids]
    )
    assert len(spelt) == 7 > len(server.tokenizer("the sum").input_ids)
    found = served.take(served.want(spelt, spelt))
    assert served.unasked == 1
    assert (found.token_ids == -1).all() and found.log_probs.isneginf().all()


FAILURES: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("wrong model", {}, {"model": "other"}, ["no model `other`", MODEL, "dwakd.teacher.model"]),
    ("a key is wanted", {"key": SECRET}, {}, ["401", KEY, "not set"]),
    (
        "no log-probabilities of the prompt",
        {"shape": "generated only"},
        {},
        ["no log-probabilities of a prompt", "prompt_logprobs", "echo"],
    ),
    ("fewer than asked", {"most_top_k": 5}, {}, ["fewer", "top_k: 8", "--max-logprobs 8"]),
    (
        "fewer than asked, by echo",
        {"most_top_k": 5, "shape": "echo"},
        {},
        ["fewer", "top_k: 8", "max allowed: 5"],
    ),
    ("too short", {"max_model_len": 64}, {}, ["64 tokens", "--max-model-len 65"]),
    ("429", {"always": (429, {"Retry-After": "2"})}, {}, ["429", "server_requests"]),
    ("503", {"always": (503, {})}, {}, ["503", "told to fail"]),
    ("reset", {"always": "reset"}, {}, ["cannot be reached"]),
    ("another base of logarithms", {"scale": 0.3}, {}, ["sum to", "cannot teach"]),
    ("other answers each time", {"drift": 0.5}, {}, ["other probabilities", "prefix caching"]),
]


@pytest.mark.parametrize(
    ("settings", "keys", "words"),
    [failure[1:] for failure in FAILURES],
    ids=[failure[0] for failure in FAILURES],
)
def test_each_failure_at_start_up_has_its_words(
    settings: dict[str, Any],
    keys: dict[str, Any],
    words: list[str],
    server: Behaviour,
    teacher: Callable[..., ServedTeacher],
) -> None:
    for name, value in settings.items():
        setattr(server, name, value)
    with pytest.raises(UserError) as caught:
        teacher(**keys)
    for word in (server.address, *words):
        assert word in str(caught.value)


def test_nobody_listens(teacher: Callable[..., ServedTeacher]) -> None:
    with pytest.raises(ServerGone, match=r"cannot be reached.*Start it, or correct the address"):
        teacher(server="http://127.0.0.1:9/v1")


@pytest.mark.parametrize("shape", ["vllm", "echo"])
def test_another_tokenizer(
    shape: Any, server: Behaviour, lab: Path, teacher: Callable[..., ServedTeacher]
) -> None:
    from dwakd_plugin.tokenizers.training import train_tokenizer

    named, server.shape = server.tokenizer, shape
    server.tokenizer = train_tokenizer(["France is Paris, of one two three four" * 9], 290)
    with pytest.raises(UserError, match=r"another tokenizer than .*Name the tokenizer"):
        ServedTeacher(
            TeacherConfig(
                server=server.address, model=MODEL, tokenizer=str(lab / "teacher"), top_k=8
            ),
            named,
            64,
        )


def test_the_key_is_sent_and_never_said(
    server: Behaviour,
    teacher: Callable[..., ServedTeacher],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY, f"{SECRET}\n")
    server.key = SECRET
    served = teacher()
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in caplog.text + repr(vars(served.way)) + served.server.name
    server.key = "another"
    with pytest.raises(UserError) as caught:  # the server repeats the key in its answer
        teacher()
    assert f"the key in {KEY}" in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text
    monkeypatch.setenv(KEY, "with space")
    with pytest.raises(UserError, match="characters that no key has") as caught:
        teacher()
    assert "with space" not in str(caught.value)


def test_what_fails_in_a_run_is_tried_again(
    server: Behaviour, teacher: Callable[..., ServedTeacher]
) -> None:
    said: list[str] = []
    served = teacher(said=said, server_patience=20)
    ids, labels = row(server.tokenizer, TEXT)
    expected = served.take(served.want(ids, labels))
    server.faults = ["reset", (500, {}), (429, {"Retry-After": "0.6"}), (503, {})]
    begun = time.monotonic()
    found = served.take(served.want(ids, labels))
    assert time.monotonic() - begun > 0.6
    assert not server.faults
    assert torch.equal(found.log_probs, expected.log_probs)
    assert torch.equal(found.token_ids, expected.token_ids)


def test_at_most_so_many_at_once(server: Behaviour, teacher: Callable[..., ServedTeacher]) -> None:
    served = teacher(server_requests=3)
    server.delay, server.most_at_once = 0.02, 0
    ids, labels = row(server.tokenizer, TEXT)
    numbers = [served.want(ids[: 6 + n], labels[: 6 + n]) for n in range(12)]
    sizes = [len(served.take(number).token_ids) for number in numbers]
    assert sizes == [3 + n for n in range(12)]
    assert 1 < server.most_at_once <= 3


def test_one_that_dies_is_waited_for_and_then_said_to_be_gone(
    server: Behaviour, teacher: Callable[..., ServedTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "QUIET", 0.2)
    said: list[str] = []
    served = teacher(said=said)
    ids, labels = row(server.tokenizer, TEXT)
    server.always = (502, {})
    begun = time.monotonic()
    with pytest.raises(ServerGone, match=r"answers 502.*for 1 s"):
        served.take(served.want(ids, labels))
    assert 0.9 < time.monotonic() - begun < 5
    assert len(said) == 1 and "Trying again" in said[0]
    server.always = None
    served.take(served.want(ids, labels))
    assert said[1:] == [f"{served.server.name} answers again."]
    server.always = "hang"
    with pytest.raises(ServerGone, match="no answer in time"):
        served.take(served.want(ids, labels))
    with pytest.raises(Stopped):
        served.take(served.want(ids, labels), stop=lambda: True)


def test_a_row_that_it_refuses_ends_with_its_words(
    server: Behaviour, teacher: Callable[..., ServedTeacher]
) -> None:
    served = teacher()
    server.always = (400, {})
    with pytest.raises(UserError, match=r"answers 400: told to fail\nThe row has 20 tokens"):
        served.take(served.want(torch.arange(20), torch.arange(20)))


def test_a_cache_is_filled_by_it_once_and_then_needs_it_no_more(
    server: Behaviour, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dwakd_plugin.models.teacher.cached import cached_teacher

    monkeypatch.setattr(server_module, "PROMPTLY", 0.3)
    monkeypatch.setenv(KEY, SECRET)
    keys = {"server": server.address, "model": MODEL, "tokenizer": str(lab / "teacher")}
    config = TeacherConfig(**keys, top_k=8, cache=str(tmp_path / "cache"), server_patience=1)
    rows = [row(server.tokenizer, f"The {word} of {n}: {TEXT}") for n, word in enumerate("abcde")]
    steps: list[tuple[int, int]] = []
    heard = lambda done, total: steps.append((done, total))  # noqa: E731
    said: list[str] = []

    # It dies when it has said of some rows; what it said is kept.
    first = cached_teacher(config, "cpu", rows[:2], server.tokenizer, heard, said.append)[1]
    assert len(first) == 2 and steps[-1][0] == steps[-1][1]
    asked = len(server.bodies)
    server.always = (502, {})
    with pytest.raises(ServerGone):
        cached_teacher(config, "cpu", rows, server.tokenizer, heard, said.append)
    server.always = None
    teacher, cache = cached_teacher(config, "cpu", rows, server.tokenizer, heard, said.append)
    prompts = [body["prompt"] for body in server.bodies[asked:] if body["max_tokens"] == 1]
    assert rows[0][0].tolist() not in prompts and rows[4][0].tolist() in prompts
    assert teacher.model is None and teacher.served is None
    for ids, labels in rows:
        top, expected = cache.read(ids, labels), oracle(server.model, ids, labels, 8)
        assert top.token_ids.tolist() == expected.token_ids.tolist()
        torch.testing.assert_close(top.log_probs, expected.log_probs, atol=1e-4, rtol=0)

    # From here on there is no server, at another address.
    moved = TeacherConfig(**(config.model_dump() | {"server": "http://127.0.0.1:9/v1"}))
    cached_teacher(moved, "cpu", rows, server.tokenizer)
    files = b"".join(file.read_bytes() for file in (tmp_path / "cache").iterdir())
    assert SECRET.encode() not in files and MODEL.encode() in files
    other = TeacherConfig(**(config.model_dump() | {"model": "another"}))
    with pytest.raises(UserError, match="another"):
        cached_teacher(other, "cpu", rows, server.tokenizer)


# As https://docs.vllm.ai/en/v0.28.0/serving/online_serving/openai_compatible_server/ and the
# protocol of the completions API there have it: `prompt_logprobs` of a choice, a list with null
# first, then objects by token id with logprob, rank and decoded_token, the prompt's own token among
# them though it is none of the likeliest; what would be -inf is -9999.
VLLM = json.loads(
    """
    {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [{
      "index": 0, "text": " x", "logprobs": null, "finish_reason": "length", "stop_reason": null,
      "prompt_logprobs": [
        null,
        {"7": {"logprob": -0.25, "rank": 1, "decoded_token": " a"},
         "9": {"logprob": -2.0, "rank": 2, "decoded_token": " b"},
         "3": {"logprob": -6.5, "rank": 57, "decoded_token": "\\ufffd"}},
        {"4": {"logprob": -0.0, "rank": 1, "decoded_token": "."},
         "8": {"logprob": -9999.0, "rank": 2, "decoded_token": ""}}]}],
     "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1}}
    """
)


def test_vllms_answer_as_it_documents_it() -> None:
    rows = by_ids(VLLM, [1, 3, 4])
    assert rows == [None, {7: -0.25, 9: -2.0, 3: -6.5}, {4: 0.0, 8: -9999.0}]
    top = top_tokens(rows[1:], 2, 100)
    assert top.token_ids.tolist() == [[7, 9], [4, 8]]
    assert top.log_probs.tolist() == [[-0.25, -2.0], [0.0, -9999.0]]
    padded = top_tokens(rows[1:], 4, 8)  # a head of 8 rows
    assert padded.token_ids.tolist() == [[7, 3, -1, -1], [4, -1, -1, -1]]


def test_an_echo_as_the_completions_api_documents_it(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    texts = TokenTexts(tokenizer)
    ids = tokenizer("the sum", add_special_tokens=False)["input_ids"]
    own = [tokenizer.decode([index]) for index in ids]
    top: list[Any] = [None] + [{text: -0.5, "�": -1.5} for text in own[1:]]
    lists = {
        "tokens": [*own, "x"],
        "token_logprobs": [None, *[-0.5] * (len(own) - 1), -3.0],
        "top_logprobs": [*top, {"x": -3.0}],
        "text_offset": [0] * (len(own) + 1),
    }
    left = Left(2)
    answer = {"choices": [{"text": "the sumx", "logprobs": lists}]}
    rows = Echo.of(answer).by_ids(ids, texts, late=False, left=left)
    assert rows == [None, *[{index: -0.5} for index in ids[1:]]]
    assert left.share == 0.5
