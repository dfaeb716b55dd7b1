#!/usr/bin/env bash
# axolotl 0.19.0 (peft 0.20.0, torch 2.13.0, CPU): `seed` doesn't reach a new LoRA's weights.
# A recipe with `seed: 7` is run twice, in a process each, at a learning rate of 0, so that what is saved
# is what the adapter started from. The recipe's seed is set with the trainer, after the model has got
# its adapter; before that, each process draws from wherever torch's generator happens to stand. So the
# A matrices of two runs have nothing in common. (B is zero, and the order of the rows is the same.)
# Two runs that are to be compared, one with a change and one without, differ by that as well.
#
# Output seen (the figure is another each time, about 0):
#   14 A matrices of two runs with one seed: cosine -0.020; one run with itself: 1.000
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 axolotl==0.19.0 peft==0.20.0 sentencepiece==0.2.1
export AXOLOTL_DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
env/bin/python -W ignore - <<'PYTHON'
import json

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {token: place for place, token in enumerate(["<s>", "</s>", "<pad>", *letters])}
tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
).save_pretrained("model")
torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
).save_pretrained("model")
rows = [{"instruction": f"Add one to {n}.", "input": "", "output": str(n + 1)} for n in range(8)]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
for run in ("first", "second"):
    recipe = {
        "base_model": "model",
        "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
        "dataset_prepared_path": f"prepared-{run}",
        "output_dir": run,
        "sequence_len": 256,
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 0.0,
        "val_set_size": 0,
        "bf16": False,
        "fp16": False,
        "seed": 7,
    }
    with open(f"{run}.yml", "w") as file:
        yaml.safe_dump(recipe, file)
PYTHON
for run in first second; do
  env/bin/python -W ignore -m axolotl.cli.train $run.yml > $run.log 2>&1 || { tail -20 $run.log; exit 1; }
done
env/bin/python - <<'PYTHON'
import torch
from safetensors.torch import load_file

first, second = (load_file(f"{run}/adapter_model.safetensors") for run in ("first", "second"))
names = [name for name in first if "lora_A" in name]
assert all(not first[name].any() for name in first if "lora_B" in name)
a, b = (torch.cat([adapter[name].flatten() for name in names]) for adapter in (first, second))
between, itself = (torch.cosine_similarity(a, other, 0).item() for other in (b, a))
print(
    f"{len(names)} A matrices of two runs with one seed: cosine {between:.3f}; one run with itself: "
    f"{itself:.3f}"
)
assert abs(between) < 0.1, "this has changed"
PYTHON
