#!/usr/bin/env bash
# axolotl 0.19.0 (torch 2.13.0, CPU): what a chat template gets to see of a message hangs on the name of
# its loop variable. Beside role and content, axolotl hands on the fields that its own reading of the
# template finds, and it looks for those of a variable called `message` only. A template that says
# `for msg in messages` and writes `msg.tool_calls` renders an assistant's call of a tool as an empty
# answer, without a word in the log. GLM-4.5's template is of that kind (`for m in messages`, with
# `m.tool_calls` and `m.reasoning_content`).
#
# Output seen:
#   for message in messages: axolotl trains on '<|assistant|>forecast(Oslo)<|end|>'
#   for msg in messages: axolotl trains on '<|assistant|><|end|>'
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 axolotl==0.19.0
export AXOLOTL_DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
env/bin/python -W ignore - <<'PYTHON' 2> errors || { cat errors; exit 1; }
import copy

from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
markup = ["<|user|>", "<|assistant|>", "<|end|>"]
vocabulary = {token: place for place, token in enumerate(["<s>", *markup, *letters])}
backend = Tokenizer(models.BPE(vocabulary, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", additional_special_tokens=markup
)
call = {"name": "forecast", "arguments": {"city": "Oslo"}}
row = {
    "messages": [
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
    ]
}


def trained_on(template: str) -> str:
    """The tokens of the row's last turn as axolotl makes them from this template."""
    prompter = ChatTemplatePrompter(tokenizer, chat_template=template)
    strategy = ChatTemplateStrategy(prompter, tokenizer, False, 1 << 20, roles_to_train=["assistant"])
    return tokenizer.decode(strategy.tokenize_prompt(copy.deepcopy(row))["input_ids"])


turn = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments.city }}){% endfor %}<|end|>{% endfor %}"
)
last = {}
for name in ("message", "msg"):
    template = turn.replace("message.", f"{name}.").replace("for message ", f"for {name} ")
    whole = tokenizer.apply_chat_template(row["messages"], chat_template=template, tokenize=False)
    assert whole.endswith("<|assistant|>forecast(Oslo)<|end|>")
    last[name] = "<|assistant|>" + trained_on(template).split("<|assistant|>")[-1]
    print(f"for {name} in messages: axolotl trains on {last[name]!r}")
assert list(last.values()) == ["<|assistant|>forecast(Oslo)<|end|>", "<|assistant|><|end|>"], (
    "this has changed"
)
PYTHON
