#!/usr/bin/env bash
# TRL 1.9.0 (torch 2.13.0, transformers 5.16.1), GOLD's loss with its defaults: where one side cuts in
# two what is one token of the other, `uld_token_merge_strategy: observed` multiplies by what the
# model says at the later token's own position of that same token. A causal model speaks of the next
# one there, so that the factor is the probability of a repetition. Two models that are both certain
# of the same text are then as far apart as can be, and the more so the surer they are. With
# `bayesian` their distance is 0.
#
# Output seen (0 where both agree, 1 where one token of the other has no match):
#   observed, cut alike: 0.000
#   observed, one token cut in two: 1.000
#   bayesian, cut alike: 0.000
#   bayesian, one token cut in two: 0.000
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 trl==1.9.0 transformers==5.16.1 requests==2.34.2 numpy
TRL_EXPERIMENTAL_SILENCE=1 env/bin/python -W ignore - <<'PYTHON'
import torch
from trl.experimental.gold.gold_config import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

# A prompt of one token, then "ab". Each token's logits are certain of the next one.
PROMPT, A, B, AB, END = range(5)


def side(*answer: int) -> tuple[torch.Tensor, ...]:
    ids = torch.tensor([[PROMPT, *answer]])
    following = torch.tensor([[*answer, END]])
    logits = 40.0 * torch.nn.functional.one_hot(following, 5).float()
    labels = ids.clone()
    labels[:, 0] = -100
    ends = torch.tensor([0] + [2 if token == AB else {A: 1, B: 2}[token] for token in answer])
    offsets = torch.stack([ends.roll(1).index_fill(0, torch.tensor([0]), 0), ends], -1)
    return logits, labels, ids, offsets[None]


found = {}
for strategy in ("observed", "bayesian"):
    config = GOLDConfig(
        output_dir="out", bf16=False, report_to="none", use_uld_loss=True,
        uld_token_merge_strategy=strategy, uld_crossentropy_weight=0.0,
        uld_skip_student_eos=False, uld_skip_teacher_eos=False,
    )
    loss = ULDLoss(config, device=torch.device("cpu"))
    for name, student in (("cut alike", side(AB)), ("one token cut in two", side(A, B))):
        sides = zip(student, side(AB), strict=True)
        (logits, labels, ids, offsets) = ([*each] for each in sides)
        distance = loss(*logits, *labels, *ids, *offsets)
        found[strategy, name] = float(distance)
        print(f"{strategy}, {name}: {float(distance):.3f}")
assert found["observed", "one token cut in two"] > 0.99, "this has changed"
assert max(value for (strategy, name), value in found.items()
           if (strategy, name) != ("observed", "one token cut in two")) < 1e-6, "this has changed"
PYTHON
