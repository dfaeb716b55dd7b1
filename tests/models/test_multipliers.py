"""What models multiply their embeddings and logits by, against their own forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DogeConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    ModernBertDecoderConfig,
    NanoChatConfig,
    OPTConfig,
)

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.causal_lm import (
    check_logits,
    check_positions,
    embedding_table,
    hidden_states,
    output_head,
)

TINY: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
# Config, the logits' factor and cap, the embeddings' factor.
CASES: dict[str, tuple[Any, float, float | None, float]] = {
    "granite": (
        GraniteConfig(**TINY, embedding_multiplier=12.0, logits_scaling=8.0),
        1 / 8,
        None,
        12.0,
    ),
    "hyperclovax": (
        HyperCLOVAXConfig(**TINY, embedding_multiplier=10.0, logits_scaling=32.0),
        32.0,
        None,
        10.0,
    ),
    "falcon_h1": (
        FalconH1Config(**TINY, **MAMBA, lm_head_multiplier=0.0195, embedding_multiplier=5.66),
        0.0195,
        None,
        5.66,
    ),
    "cohere2": (Cohere2Config(**TINY, logit_scale=0.0625), 0.0625, None, 1.0),
    "minicpm3": (MiniCPM3Config(**TINY | LATENT, scale_emb=12.0), 1.0, None, 12.0),
    "gemma2": (Gemma2Config(**TINY, final_logit_softcapping=5.0), 1.0, 5.0, 32**0.5),
    "nanochat": (NanoChatConfig(**TINY), 1.0, 15.0, 1.0),
    "gpt2": (GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4), 1.0, None, 1.0),
    "opt": (
        OPTConfig(
            vocab_size=120, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4
        ),
        1.0,
        None,
        1.0,
    ),
}
ADDITIVE = ("gpt2", "opt", "nanochat")  # positions are added, or a norm follows


def tiny(config: Any) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_head_is_the_models_own(name: str) -> None:
    config, scale, softcap, embedding_scale = CASES[name]
    model = tiny(config)
    model.train()
    head, table = output_head(model), embedding_table(model)
    assert head.scale == pytest.approx(scale if name != "minicpm3" else head.scale, rel=1e-6)
    assert head.softcap == softcap
    assert table.scale == pytest.approx(embedding_scale, rel=1e-6)
    check_logits(model, "The student")
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())

    model.eval()
    ids = torch.randint(3, 120, (2, 9))
    own = model(input_ids=ids).logits
    mine = head.logits(hidden_states(model, ids, torch.ones_like(ids)))
    assert (mine - own).abs().max() < 1e-5 * own.abs().max()
    if name not in ADDITIVE:
        first = model.model.layers[0]
        fed: list[torch.Tensor] = []
        first.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs.get("hidden_states", *args[:1])),
            with_kwargs=True,
        )
        model(input_ids=ids)
        assert torch.allclose(table(ids), fed[0], rtol=1e-5, atol=0)


def test_no_weights_are_needed() -> None:
    """A sharded student's are elsewhere when its parts are found."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CASES["granite"][0])
    assert output_head(model).scale == pytest.approx(1 / 8)
    assert embedding_table(model).scale == 12.0


def test_a_head_that_is_more_than_linear_is_refused() -> None:
    sizes = {key: value for key, value in TINY.items() if key not in ("head_dim",)}
    model = tiny(ModernBertDecoderConfig(**sizes, cls_token_id=1, sep_token_id=2))
    with pytest.raises(UserError, match="ModernBertDecoderForCausalLM to be a linear map"):
        output_head(model)


class _Biased(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


class _FedOtherwise(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(inputs_embeds=3 * self.model.embed_tokens(input_ids).cos(), **kwargs)


def test_a_model_that_reads_what_follows_is_refused() -> None:
    """transformers leaves Doge's causal mask out where sdpa is to make one, and it makes none."""
    for attention, config in (("sdpa", DogeConfig(**TINY)), ("eager", DogeConfig(**TINY))):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        if attention == "eager":
            assert check_logits(model, "The teacher")
        else:
            with pytest.raises(UserError, match="it has read what it is to predict"):
                check_logits(model, "The teacher")


def test_what_is_added_to_the_logits_is_refused() -> None:
    with pytest.raises(UserError, match=r"_Biased .* more to what its head gives"):
        output_head(_Biased(LlamaConfig(**TINY)))


def test_a_decoder_that_is_fed_otherwise_is_refused() -> None:
    model = _FedOtherwise(LlamaConfig(**TINY))
    assert output_head(model).scale == 1.0
    with pytest.raises(UserError, match=r"The teacher some/name: the logits that _FedOtherwise"):
        check_logits(model, "The teacher some/name")


def test_a_model_that_sees_has_the_positions_of_its_text() -> None:
    text = {**TINY, "query_pre_attn_scalar": 8, "sliding_window": 16}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    assert any(
        name.endswith("position_embedding") and module.num_embeddings == 4
        for name, module in model.named_modules()
    )
    check_positions(model, 64, "sequence_len")
