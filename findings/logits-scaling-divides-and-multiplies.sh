#!/usr/bin/env bash
# transformers 5.16.1: `logits_scaling` divides the logits of Granite and multiplies those of
# HyperCLOVAX, which is built on it. Falcon-H1 calls its factor `lm_head_multiplier`, Cohere
# `logit_scale`, MiniCPM3 divides the hidden states before the head by `logits_scaling`. Whoever
# computes logits from hidden states by a config's names trains on another distribution, silently.
#
# Output seen (logits over head(hidden), with the factor set to 4):
#   granite: 0.25
#   hyperclovax: 4.0
#   falcon_h1: 4.0
#   cohere: 4.0
#   minicpm3: 0.25
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet torch==2.13.0 transformers==5.16.1
HF_HUB_OFFLINE=1 env/bin/python - <<'PYTHON' 2> /dev/null
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sizes = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}
own = {
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 4.0, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "cohere": {"logit_scale": 4.0},
    "minicpm3": {"dim_model_base": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                 "qk_rope_head_dim": 8, "v_head_dim": 8},
}
found = {}
for name, settings in own.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **settings)).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        ratio = model(input_ids=ids).logits / model.get_output_embeddings()(hidden)
    found[name] = round(ratio.nanmedian().item(), 4)
    print(f"{name}: {found[name]}")
expected = {"granite": 0.25, "hyperclovax": 4.0, "falcon_h1": 4.0, "cohere": 4.0, "minicpm3": 0.25}
assert found == expected, "this has changed"
PYTHON
