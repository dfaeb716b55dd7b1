#!/usr/bin/env bash
# bitsandbytes 0.50.2 (CPU, torch 2.13.0): Linear8bitLt computes in float16 whatever the dtype of its
# input, and gives the input's dtype back. A bfloat16 or float32 input beyond 65,504, which either
# dtype holds, comes out as not a number; bnb_4bit_compute_dtype is for 4 bit alone, and 8 bit has no
# such setting. Linear4bit with a compute dtype of bfloat16 computes the same input.
#
# Output seen:
#   8 bit, input torch.bfloat16: finite at 60000.0: True; at 70000.0: False
#   8 bit, input torch.float32: finite at 60000.0: True; at 70000.0: False
#   4 bit, input torch.bfloat16: finite at 60000.0: True; at 70000.0: True
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy
env/bin/python -W ignore - <<'PYTHON'
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

torch.manual_seed(0)
weight = torch.randn(64, 64) / 1000


def layer_of(bits: int) -> torch.nn.Module:
    if bits == 8:
        layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=0.0)
    else:
        layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu").eval()


found = []
for bits, dtype in ((8, torch.bfloat16), (8, torch.float32), (4, torch.bfloat16)):
    layer, finite = layer_of(bits), []
    for size in (60000.0, 70000.0):
        values = torch.ones(2, 64, dtype=dtype)
        values[0, 3] = size
        with torch.no_grad():
            finite.append(bool(layer(values).isfinite().all()))
    print(f"{bits} bit, input {dtype}: finite at 60000.0: {finite[0]}; at 70000.0: {finite[1]}")
    found.append(finite)
assert found == [[True, False], [True, False], [True, True]], "this has changed"
PYTHON
