#!/usr/bin/env bash
# bitsandbytes 0.50.2 (CPU, torch 2.13.0): at its default threshold of 6.0 the output of
# Linear8bitLt for one token depends on the tokens beside it. A column in which any token of the batch
# is beyond the threshold is taken out and computed in 16 bits for all of them, so that a later token,
# another row or padding changes an earlier token's states: a causal model in 8 bit is not causal.
# With threshold=0.0 no column is taken out, and the same token has the same output.
#
# Output seen (the last digits hang on the processor):
#   threshold 6.0: the first token moves by 0.000977 of its size when the second is an outlier
#   threshold 0.0: by 0.000000
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy
env/bin/python -W ignore - <<'PYTHON'
import torch
from bitsandbytes.nn import Linear8bitLt

moved = {}
for threshold in (6.0, 0.0):
    torch.manual_seed(0)
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer = layer.to("cpu").eval()
    tokens = torch.randn(2, 64, dtype=torch.float16).clamp(-3, 3)
    outlier = tokens.clone()
    outlier[1, 7] = 20.0
    with torch.no_grad():
        quiet, beside = layer(tokens)[0].float(), layer(outlier)[0].float()
    moved[threshold] = ((quiet - beside).norm() / quiet.norm()).item()
print(f"threshold 6.0: the first token moves by {moved[6.0]:.6f} of its size when the second is an outlier")
print(f"threshold 0.0: by {moved[0.0]:.6f}")
assert moved[6.0] > 1e-4 and moved[0.0] == 0.0, "this has changed"
PYTHON
