"""Modules of the shape that vLLM 0.32 has, as far as dwakd asks: what it takes, and what it gives.

A held model is one of transformers, of the config that vLLM would read.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dwakd_plugin.models import vllm
from dwakd_plugin.models.sampling import Sampling, with_transformers
from dwakd_plugin.train import own_sampling


class SamplingParams:
    def __init__(
        self,
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int,
        stop_token_ids: list[int],
        ignore_eos: bool,
        logprobs: int | None,
        detokenize: bool,
    ) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.max_tokens, self.seed = max_tokens, seed
        self.stop_token_ids, self.logprobs = stop_token_ids, logprobs
        assert ignore_eos and not detokenize


class LLM:
    """Keeps what it was asked, in `seen`; sets the process's random numbers as vLLM does."""

    seen: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: str, **settings: Any) -> None:
        LLM.seen = {"llm": {"model": model, **settings}, "handed": []}
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        if settings.get("load_format") == "dummy":
            assert not settings["enable_prefix_caching"], "what it knows of prompts would be old"
            config = AutoConfig.from_pretrained(Path(model))
            LLM.seen["config"] = config
            self.model = AutoModelForCausalLM.from_config(config).eval()
            if settings["max_model_len"] > config.max_position_embeddings:
                raise ValueError("max_model_len is larger than the model's")

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> list[Any]:
        assert method == "reload_weights"
        given = dict(kwargs["weights_iterator"])
        LLM.seen["handed"].append(sorted(given))
        # A tied head is none of the checkpoint's, and one that isn't must not be left out.
        missing, unknown = self.model.load_state_dict(given, strict=False)
        left_out = ["lm_head.weight"] if self.model.config.tie_word_embeddings else []
        assert (missing, unknown) == (left_out, [])
        return [None]

    def generate(
        self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: Any
    ) -> list[Any]:
        LLM.seen |= {"prompts": prompts, "parameters": sampling_params, "lora": lora_request}
        return [self._answer(*each) for each in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt: dict[str, list[int]], asked: SamplingParams) -> Any:
        sampling = Sampling(asked.temperature, asked.top_p, asked.max_tokens)
        nothing_stops = [-1]
        stop = asked.stop_token_ids or nothing_stops
        generate = with_transformers(self.model, sampling, stop, scored=True)
        (sample,) = generate([prompt["prompt_token_ids"]], [(asked.seed, 0)], asked.max_tokens)
        ended = sample.tokens[-1] in asked.stop_token_ids
        completion = SimpleNamespace(
            token_ids=sample.tokens,
            finish_reason="stop" if ended else "length",
            stop_reason=sample.tokens[-1] if ended else None,
            cumulative_logprob=sample.log_probability if asked.logprobs else None,
        )
        return SimpleNamespace(outputs=[completion])


def install(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Makes the stand-in what is imported as vLLM."""
    modules: dict[str, Any] = {
        name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")
    }
    modules["vllm"].LLM, modules["vllm"].SamplingParams = LLM, SamplingParams
    modules["vllm.lora.request"].LoRARequest = lambda *given: given
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for user in (vllm, own_sampling):
        monkeypatch.setattr(user, "is_installed", lambda: True)
    return LLM
