"""Answers by vLLM, where it is installed: one function behind which its whole interface lies.

Written against vLLM's documented interface (`LLM`, `SamplingParams`, `LLM.generate`) and tested
with a stand-in of that shape; it has not run on vLLM itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.sampling import Generator, Sample, Sampling, up_to_stop

AT_ONCE = 256  # answers asked for together, and written down together
_HIGHEST_RANK = 512  # of a LoRA, that vLLM takes


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
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(
            f"--backend vllm needs vLLM, which cannot be imported ({error}). Install it, or leave "
            "the option out."
        ) from error
    lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    if lora is not None:
        settings |= {"enable_lora": True, "max_lora_rank": _HIGHEST_RANK}
    llm = LLM(
        model=model,
        tokenizer=tokenizer,
        quantization="bitsandbytes" if load_in_4bit else None,
        max_model_len=longest,
        **settings,
    )

    def generate(prompts: list[list[int]], keys: list[tuple[int, int]], limit: int) -> list[Sample]:
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=limit,
                seed=zlib.crc32(f"{seed}:{row}".encode()),
                stop_token_ids=list(stop),
                logprobs=1 if scored else None,
            )
            for seed, row in keys
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            parameters,
            lora_request=lora,
            use_tqdm=False,
        )
        return [_sample(each.outputs[0], stop, scored) for each in outputs]

    return generate


def _sample(output: Any, stop: Sequence[int], scored: bool) -> Sample:
    """A `CompletionOutput` as a sample; where it leaves out the token that ended it, with that."""
    tokens = up_to_stop(list(output.token_ids), stop)
    if output.finish_reason == "stop" and (not tokens or tokens[-1] not in stop):
        reason = output.stop_reason
        tokens.append(reason if isinstance(reason, int) else stop[0])
    return Sample(tokens, float(output.cumulative_logprob) if scored else None)
