"""llama-cpp-python's server on loopback, with the embedded SmolLM2: `make test-server`."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from dwakd_plugin.loss import TopTokens
from dwakd_plugin.loss.terms.mapped_top import top_statistics
from dwakd_plugin.models import smollm2
from dwakd_plugin.models.causal_lm import hidden_states, output_head
from dwakd_plugin.models.teacher.served import ServedTeacher
from dwakd_plugin.recipe.schema import TeacherConfig

PYTHON = os.environ.get("DWAKD_TEST_SERVER")  # one that has llama-cpp-python[server]
TEXTS = ["Function one returns the sum of its three arguments.", "Water boils at 100 degrees."]
TOP_K = 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="`make test-server` sets DWAKD_TEST_SERVER"),
]


def dequantised_copy(source: Path, dest: Path) -> Path:
    """A GGUF's weights as the float32 numbers that they stand for, and all that is said of them.

    So llama.cpp multiplies in float32: beside quantised weights it rounds activations to 8 bit.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(dest, "llama")
    of_its_own = ("GGUF.", "general.architecture", "general.file_type", "general.quantization")
    for name, field in reader.fields.items():
        if not name.startswith(of_its_own):
            sub_type = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dest


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    gguf = dequantised_copy(
        smollm2._teacher_gguf(), tmp_path_factory.mktemp("gguf") / "float32.gguf"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "llama_cpp.server", "--model", str(gguf)]
    command += ["--model_alias", "smollm2", "--logits_all", "true", "--n_ctx", "512"]
    command += ["--type_k", "0", "--type_v", "0"]  # the keys and values in float32 too
    command += ["--host", "127.0.0.1", "--port", str(port), "--verbose", "false"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/models").raise_for_status()
                break
            except httpx.HTTPError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def packed(top: Any) -> torch.Tensor:
    """(T, 2k), as the loss takes it."""
    return torch.cat([top.token_ids.double(), top.log_probs.double()], -1)


def test_its_loss_is_that_of_the_same_gguf_dequantised_here(address: str, tmp_path: Path) -> None:
    """Of the tokens that the server tells; those it can't tell by their text are in the rest."""
    gguf = smollm2._teacher_gguf()
    tokenizer = smollm2._teacher_tokenizer(gguf)
    tokenizer.save_pretrained(tmp_path)
    model = smollm2.dequantised(gguf).eval()
    served = ServedTeacher(
        TeacherConfig(
            server=address, model="smollm2", tokenizer=str(tmp_path), top_k=TOP_K, server_requests=1
        ),
        tokenizer,
        longest=64,
    )
    # It takes BOS off the front of a prompt, and then its log-probabilities come right.
    assert not served.way.by_ids and served.way.late == (True, False)
    losses: dict[str, list[torch.Tensor]] = {"here": [], "there": []}
    off = []
    for text in (*TEXTS, tokenizer.bos_token + TEXTS[0]):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        labels = ids.clone()
        labels[:2] = -100
        there = served.take(served.want(ids, labels))
        with torch.no_grad():
            states = hidden_states(model, ids[None], None)[0][:-1][labels[1:] != -100]
            own = output_head(model).logits(states).log_softmax(-1)
        told = there.token_ids.long()
        kept = own.gather(-1, told.clamp_min(0)).masked_fill(told < 0, -torch.inf)
        off.append((kept - there.log_probs)[told >= 0].abs())
        generator = torch.Generator().manual_seed(len(ids))
        size = (len(states), served.vocabulary)
        student = torch.randn(size, generator=generator, dtype=torch.float64)
        rest = ids[2:], torch.zeros(len(states), dtype=torch.long), torch.arange(served.vocabulary)
        for name, top in (("here", TopTokens(told, kept)), ("there", there)):
            found = top_statistics(student, packed(top), *rest, None, "forward_kl")
            losses[name].append(found.divergence)
    here_loss, there_loss = (torch.cat(found).mean().item() for found in losses.values())
    print(f"loss: {there_loss:.6f} by the server, {here_loss:.6f} here; {served.lost()}")
    print(f"log-probabilities: {torch.cat(off).max():.6f} nats off at most")
    assert there_loss == pytest.approx(here_loss, abs=1e-3)
