#!/usr/bin/env bash
# bitsandbytes 0.50.2 (torch 2.13.0) on a CPU with AVX512-BF16: the first forward of a Linear4bit in
# evaluation packs its weight anew, for good. From then on the layer passes no gradient to its input
# in training either, and computes in bfloat16 whatever bnb_4bit_compute_dtype says. So a QLoRA that
# is evaluated before or while it trains goes on without its lower layers' gradients, and nothing
# says so. A layer that was never evaluated, and any layer on a CPU without AVX512-BF16, trains as it
# should: there the script says that it cannot tell, and ends with 0.
#
# Output seen:
#   gradient of the input before an evaluation: True
#   gradient of the input after it: False
#   largest difference of the output, of 3.7: above 1e-3
set -euo pipefail
if ! grep -q -m1 avx512_bf16 /proc/cpuinfo; then echo 'no AVX512-BF16 here: not told'; exit 0; fi
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy
env/bin/python -W ignore - <<'PYTHON'
import torch
from bitsandbytes.nn import Linear4bit

torch.manual_seed(0)
layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
layer.load_state_dict({"weight": torch.randn(64, 64) / 10})
layer = layer.to("cpu")
states = torch.randn(5, 64)


def trained() -> tuple[torch.Tensor, bool]:
    read = states.clone().requires_grad_()
    output = layer.train()(read)
    # Beside a loss of the input's own, as an adapter's path around the layer is.
    (output.sum() + (0 * read).sum()).backward()
    return output.detach(), bool(read.grad.abs().max() > 0)


before, learns = trained()
with torch.no_grad():
    layer.eval()(states)
after, still = trained()
apart = (after - before).abs().max().item()
print(f"gradient of the input before an evaluation: {learns}")
print(f"gradient of the input after it: {still}")
print(f"largest difference of the output, of {before.abs().max():.1f}: "
      f"{'above' if apart > 1e-3 else 'below'} 1e-3")
assert learns and not still and apart > 1e-3, "this has changed"
PYTHON
