"""vLLM, where it is installed: the file behind which its whole interface lies.

It loads a model from a folder, to answer; or holds a model that trains in the same process, and is
handed its weights. Tested on vLLM 0.32 on a CPU (`make test-vllm`); on a GPU, and with 4 bits, it
has not run.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftType
from torch import Tensor
from transformers import PreTrainedModel

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.causal_lm import short_dtype
from dwakd_plugin.models.sampling import Generator, Sample, Sampling
from dwakd_plugin.models.whole_weights import has_tied_head

AT_ONCE = 256  # answers asked for together, and written down together
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of a LoRA, that it makes room for


def is_installed() -> bool:
    return find_spec("vllm") is not None


def with_vllm(
    model: str,
    tokenizer: str,
    adapter: Path | None,
    sampling: Sampling,
    stop: Sequence[int],
    longest: int,
    *,
    load_in_8bit: bool,
    load_in_4bit: bool = False,
    scored: bool = False,
    **settings: Any,
) -> Generator:
    """Generates with vLLM, which draws its own numbers: other samples, as likely.

    model, tokenizer: folders or hub ids. longest: the largest number of tokens of a prompt with its
    answer. scored: asks for log-probabilities. settings: as `LLM` takes them, such as dtype.
    Raises UserError where vLLM isn't installed, or cannot hold the model so.
    """
    if load_in_8bit:
        raise UserError(
            "--backend vllm cannot hold a model in 8 bit: what bitsandbytes quantises there as it "
            "loads has 4 bits. Leave --backend out, or use a checkpoint that is in 8 bit already."
        )
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(
            f"--backend vllm needs vLLM, which cannot be imported ({error}). Install it, or leave "
            "the option out."
        ) from error
    lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    if adapter is not None:
        settings |= {"enable_lora": True, "max_lora_rank": _room(adapter)}
    llm = LLM(
        model=model,
        tokenizer=tokenizer,
        quantization="bitsandbytes" if load_in_4bit else None,
        max_model_len=longest,
        **settings,
    )
    return _generator(llm, sampling, stop, lora=lora, scored=scored)


class HeldByVLLM:
    """A model in this process as vLLM holds it, beside itself, with the weights of a hand-over.

    It has a copy of the weights, and keys and values, for as long as it lives.
    """

    def __init__(
        self, lm: PreTrainedModel, dtype: torch.dtype, longest: int, memory: float, processes: int
    ) -> None:
        """dtype: of weights and states. longest: tokens of a prompt with its answer. memory: the
        share of the device's that it takes. processes: of a group (DDP), each of which has its own.

        Starts with weights of no meaning. Random numbers that others draw stay what they would have
        been. Raises UserError where vLLM cannot be imported, or cannot hold the model.
        """
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"vLLM is installed, and cannot be imported ({error}). Mend that, or set "
                "dwakd.own_answers.backend: transformers."
            ) from error
        cpu = lm.device.type == "cpu"
        tied = has_tied_head(lm)
        # On a CPU a tied head stays what it was (findings/vllm-keeps-a-tied-head-on-a-cpu.sh).
        self.unties = tied and cpu
        with (
            tempfile.TemporaryDirectory() as folder,
            _leaving_no_trace(lm.device),
            _without_llvmlite(),
        ):
            _write_config(lm, folder, tied=tied and not cpu)
            try:
                self._llm = LLM(
                    model=folder,
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    dtype=short_dtype(dtype),
                    max_model_len=longest,
                    gpu_memory_utilization=memory,
                    # What it knows of a prompt is of the weights that it had then.
                    enable_prefix_caching=False,
                    enforce_eager=cpu,  # graphs and compilation are for GPUs
                    distributed_executor_backend="external_launcher" if processes > 1 else None,
                )
            except Exception as error:  # of many classes, its own among them
                raise UserError(
                    f"vLLM cannot hold {type(lm).__name__}: {error}. Where it is short of memory, "
                    "give it another share of the device's (dwakd.own_answers.vllm_memory); else "
                    "set dwakd.own_answers.backend: transformers."
                ) from error

    def hand_over(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Gives it the weights to answer with: names as in a checkpoint, of any float dtype."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def generator(
        self, sampling: Sampling, stop: Sequence[int], *, scored: bool = False
    ) -> Generator:
        """Generates with the weights handed over last; what is drawn is as in `with_vllm`."""
        return _generator(self._llm, sampling, stop, scored=scored)


def _generator(
    llm: Any, sampling: Sampling, stop: Sequence[int], *, lora: Any = None, scored: bool = False
) -> Generator:
    from vllm import SamplingParams

    def generate(prompts: list[list[int]], keys: list[tuple[int, int]], limit: int) -> list[Sample]:
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=limit,
                seed=zlib.crc32(f"{seed}:{row}".encode()),
                stop_token_ids=list(stop),
                ignore_eos=True,  # what the model's own settings call an end, and `stop` doesn't
                logprobs=1 if scored else None,
                detokenize=False,
            )
            for seed, row in keys
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            parameters,
            lora_request=lora,
            use_tqdm=False,
        )
        return [_sample(each.outputs[0], scored) for each in outputs]

    return generate


def _sample(output: Any, scored: bool) -> Sample:
    """A `CompletionOutput`, whose tokens end with the one that stopped it, as a sample."""
    return Sample(list(output.token_ids), float(output.cumulative_logprob) if scored else None)


def _room(adapter: Path) -> int:
    """The least rank to make room for that a LoRA fits in. Raises UserError."""
    config: Any = PeftConfig.from_pretrained(str(adapter))
    if config.peft_type != PeftType.LORA:
        raise UserError(
            f"--backend vllm takes a LoRA, and {adapter} is {config.peft_type.value}. Leave "
            "the option out, or merge the adapter into its base model."
        )
    rank = max(config.r, *config.rank_pattern.values(), 0)
    for room in _RANKS:
        if rank <= room:
            return room
    raise UserError(
        f"--backend vllm takes a LoRA of rank {_RANKS[-1]} at most, and {adapter} has {rank}. "
        "Leave the option out, or merge the adapter into its base model."
    )


def _write_config(lm: PreTrainedModel, folder: str, *, tied: bool) -> None:
    """The model's config as it is now, with a vocabulary that has grown: what vLLM reads of it."""
    config = type(lm.config).from_dict(lm.config.to_dict())
    config.architectures = [type(lm).__name__]
    for each in (config, config.get_text_config()):
        each.tie_word_embeddings = tied
    config.save_pretrained(folder)


@contextmanager
def _leaving_no_trace(device: torch.device) -> Iterator[None]:
    """Within it, vLLM starts in this process. Behind it, what it sets for the whole process is as
    before: the states of random numbers, threads, the precision of float32 products."""
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    variable = os.environ.get(name)
    numbers, legacy = random.getstate(), np.random.get_state()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    os.environ[name] = "0"
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(legacy)
        torch.set_float32_matmul_precision(precision)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        os.environ.pop(name)
        if variable is not None:
            os.environ[name] = variable


@contextmanager
def _without_llvmlite() -> Iterator[None]:
    """Within it, what vLLM 0.32 falls over as it starts on a CPU isn't among the modules: it looks
    for kernels in all of them, and one of llvmlite's has any attribute that it is asked for."""
    name = "llvmlite.binding.ffi"
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module
