#!/usr/bin/env bash
# transformers 5.16.1 (CPU, torch 2.13.0): Doge, a causal language model, reads the tokens to come.
# With its default attention (sdpa) and no padding, transformers leaves the causal mask out, as torch's
# kernel can make one itself; Doge adds a mask of its own, so that the kernel is given that one alone,
# and nothing hides what follows. The first tokens' logits change with the last ones. In training
# that is a model that has seen the answer. With attn_implementation="eager" they don't change, and
# neither do Llama's.
#
# Output seen:
#   Llama, sdpa: the first four tokens' logits move by 0.00 of their size with the text that follows
#   Doge, eager: the first four tokens' logits move by 0.00 of their size with the text that follows
#   Doge, sdpa: the first four tokens' logits move by 0.64 of their size with the text that follows
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet torch==2.13.0 transformers==5.16.1 numpy
env/bin/python -W ignore - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, DogeConfig, LlamaConfig

size = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


@torch.no_grad()
def moved(config: object, attention: str) -> float:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    text = torch.arange(10, 22)[None]
    long, short = model(input_ids=text).logits[:, :4], model(input_ids=text[:, :4]).logits
    return ((long - short).norm() / short.norm()).item()


found = {}
for name, config, attention in (
    ("Llama", LlamaConfig(**size), "sdpa"),
    ("Doge", DogeConfig(**size), "eager"),
    ("Doge", DogeConfig(**size), "sdpa"),
):
    found[name, attention] = moved(config, attention)
    print(
        f"{name}, {attention}: the first four tokens' logits move by {found[name, attention]:.2f} of their "
        "size with the text that follows"
    )
assert found["Doge", "sdpa"] > 0.05, "this has changed"
assert max(found["Llama", "sdpa"], found["Doge", "eager"]) < 1e-4, "this has changed"
PYTHON
