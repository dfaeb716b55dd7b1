"""A server of completions on loopback, with a model's own log-probabilities, that fails as told.

It answers as vLLM does, or as servers with `echo`. `late` is as llama-cpp-python 0.3: it takes BOS
off the front and leaves it out further on, writes special tokens as nothing, and says of a token
what it should say of the next one where the prompt did not begin with BOS.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch

MODEL = "tiny-teacher"
# What becomes of the next requests, one each: an HTTP status with headers, or what a network does.
Fault = tuple[int, dict[str, str]] | Literal["reset", "hang"]


@dataclass
class Behaviour:
    """What the server is, and does next. Tests change it while it runs."""

    model: Any
    tokenizer: Any
    shape: Literal["vllm", "echo", "late", "generated only"] = "vllm"
    key: str | None = None
    most_top_k: int = 10**6
    temperature: float = 1.0  # what it divides logits by, unasked
    scale: float = 1.0  # what it multiplies log-probabilities by: 1/ln 2 is base 2
    drift: float = 0.0  # what each answer adds to a logit, more and more
    max_model_len: int = 4096
    delay: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None  # after the faults
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    address: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def log_probabilities(behaviour: Behaviour, ids: list[int]) -> torch.Tensor:
    """(L, V): what follows each token."""
    with torch.no_grad():
        logits = behaviour.model(torch.tensor([ids])).logits[0].double()
    logits[:, 5] += behaviour.drift * len(behaviour.bodies)
    return (logits / behaviour.temperature).log_softmax(-1) * behaviour.scale


def answer(behaviour: Behaviour, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and JSON for a request."""
    if body.get("model") != MODEL:
        return 404, error(f"The model `{body.get('model')}` does not exist.")
    prompt, tokenizer = body["prompt"], behaviour.tokenizer
    ids = prompt
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    elif behaviour.shape != "vllm":
        status = 500 if behaviour.shape == "late" else 422
        return status, {"detail": [{"loc": ["body", "prompt"], "msg": "Input should be a string"}]}
    asked = body.get("prompt_logprobs") or body.get("logprobs") or 0
    if asked > behaviour.most_top_k:
        return 400, error(
            f"Requested prompt logprobs of {asked}, which is greater than max allowed: "
            f"{behaviour.most_top_k}"
        )
    known = log_probabilities(behaviour, ids)
    if behaviour.shape == "vllm":
        choice: dict[str, Any] = {"text": "x", "logprobs": None, "prompt_logprobs": None}
        if asked:
            choice["prompt_logprobs"] = by_ids(known, ids, asked, tokenizer)
    else:
        choice = {"text": "x", "logprobs": echo(behaviour, known, ids, asked)}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}


def error(words: str) -> dict[str, Any]:
    return {"error": {"message": words, "type": "BadRequestError", "code": 400}}


def by_ids(known: torch.Tensor, ids: list[int], k: int, tokenizer: Any) -> list[Any]:
    """vLLM's `prompt_logprobs`: the k likeliest, and the token itself."""
    entries: list[Any] = [None]
    for row, own in zip(known[:-1], ids[1:], strict=True):
        tokens = [*row.topk(min(k, len(row))).indices.tolist(), own]
        ranks = {token: int((row > row[token]).sum()) + 1 for token in tokens}
        entries.append(
            {
                str(token): {
                    "logprob": float(row[token]),
                    "rank": ranks[token],
                    "decoded_token": tokenizer.decode([token]),
                }
                for token in dict.fromkeys(tokens)
            }
        )
    return entries


def echo(behaviour: Behaviour, known: torch.Tensor, ids: list[int], k: int) -> dict[str, Any]:
    """The completions API's `logprobs`, of the prompt and of one generated token."""
    tokenizer, as_llama_cpp = behaviour.tokenizer, behaviour.shape == "late"

    def text(token: int) -> str:
        return str(tokenizer.decode([token], skip_special_tokens=as_llama_cpp))

    tokens = [*ids, int(known[-1].argmax())]
    said = [None, *known]
    if as_llama_cpp:
        begins = ids[0] == tokenizer.bos_token_id
        tokens, said = tokens[1:] if begins else tokens, [*known, known[-1]]
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    for token, row in zip(tokens, said, strict=False):
        if as_llama_cpp and token == tokenizer.bos_token_id:
            continue
        lists["tokens"].append(text(token))
        lists["token_logprobs"].append(None if row is None else float(row[token]))
        top = {} if row is None else {text(each): float(row[each]) for each in row.topk(k).indices}
        lists["top_logprobs"].append(None if row is None else top)
    lists["token_logprobs"][0] = lists["top_logprobs"][0] = None
    begin = len(ids) if behaviour.shape == "generated only" else 0
    return {name: values[begin:] for name, values in lists.items()}


@contextmanager
def serving(model: Any, tokenizer: Any, **settings: Any) -> Iterator[Behaviour]:
    """The server, at `address`, until the block is left."""
    behaviour = Behaviour(model, tokenizer, **settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._reply(
                200, {"data": [{"id": MODEL, "max_model_len": behaviour.max_model_len}]}
            ) if self._may() else None

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with behaviour.lock:
                behaviour.at_once += 1
                behaviour.most_at_once = max(behaviour.most_at_once, behaviour.at_once)
                behaviour.headers.append(dict(self.headers))
                behaviour.bodies.append(body)
                fault = behaviour.faults.pop(0) if behaviour.faults else behaviour.always
            try:
                if self._may():
                    self._serve(body, fault)
            finally:
                behaviour.at_once -= 1

        def _serve(self, body: dict[str, Any], fault: Fault | None) -> None:
            time.sleep(behaviour.delay)
            if fault == "reset":  # an RST, and no answer
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RD)
                self.connection.close()
            elif fault == "hang":
                time.sleep(3)
                self.close_connection = True
            elif fault is not None:
                self._reply(fault[0], error("told to fail"), fault[1])
            else:
                with behaviour.lock:
                    status, found = answer(behaviour, body)
                self._reply(status, found)

        def _may(self) -> bool:
            if behaviour.key in (None, self.headers.get("Authorization", "")[len("Bearer ") :]):
                return True
            self._reply(401, error(f"Incorrect key: {self.headers.get('Authorization')}"))
            return False

        def _reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # what is cut off here is cut off on purpose

    server = Quiet(("127.0.0.1", 0), Handler)
    behaviour.address = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
