"""What a LoRA that learnt on a quantised base loses where it is merged into the unquantised one.

    python -m benchmarks.merged_lora

SmolLM2-135M-Instruct in bitsandbytes' 4 bit (nf4, double quantisation) and 8 bit, as `adapter:
qlora` and `load_in_8bit` hold a student, learns questions about the standard library. Bits per byte
of held-out answers: before, as trained, and merged. On one CPU core ten minutes for each.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from dwakd_plugin.data.library_docs import documentation_rows
from dwakd_plugin.models.smollm2 import prepare_teacher

STEPS, ROWS, HELD_OUT, TOKENS, RATE = 60, 4, 40, 192, 2e-4
BASES = {
    "4 bit": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
}


def load(folder: Path, base: BitsAndBytesConfig | None) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=base
    )


def example(tokenizer: Any, row: Any) -> tuple[Tensor, int, int]:
    """Ids, how many of them are the question, and the bytes of the answer with its end left out."""
    question = [{"role": "user", "content": row["instruction"]}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, row["output"])
    ]
    return torch.tensor(ids[0] + ids[1]), len(ids[0]), len(row["output"].encode())


def nats(model: Any, ids: Tensor, begin: int) -> Tensor:
    """Cross-entropy of what follows the question, as a sum."""
    logits = model(input_ids=ids[None]).logits[0, begin - 1 : -1]
    return F.cross_entropy(logits.float(), ids[begin:], reduction="sum")


def learn(model: Any, rows: list[tuple[Tensor, int, int]]) -> Any:
    torch.manual_seed(0)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    for step in range(STEPS):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        tokens = sum(len(ids) - begin for ids, begin, _ in batch)
        for ids, begin, _ in batch:
            (nats(model, ids, begin) / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def measured(model: Any, rows: list[tuple[Tensor, int, int]]) -> tuple[float, Tensor]:
    """Bits per byte of the answers, and the first row's logits."""
    model.eval()
    total = sum(float(nats(model, ids, begin)) for ids, begin, _ in rows)
    logits = model(input_ids=rows[0][0][None]).logits[0].float()
    return total / math.log(2) / sum(size for *_, size in rows), logits


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare_teacher(Path(scratch) / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        documentation = documentation_rows(120)
        train, held_out = (
            [each for each in (example(tokenizer, row) for row in rows) if len(each[0]) <= TOKENS]
            for rows in (documentation.train, documentation.held_out)
        )
        train, held_out = train[: STEPS * ROWS], held_out[:HELD_OUT]
        for name, base in BASES.items():
            model = learn(load(folder, base), train)
            model.save_pretrained(Path(scratch) / name)
            trained, logits = measured(model, held_out)
            with model.disable_adapter():
                before, _ = measured(model, held_out)
            del model
            merged = PeftModel.from_pretrained(load(folder, None), Path(scratch) / name)
            after, found = measured(merged.merge_and_unload(), held_out)
            scale = (logits - logits.mean(-1, keepdim=True)).norm()
            typer.echo(
                f"{name}: {before:.4f} bits per byte before, {trained:.4f} as trained, "
                f"{after:.4f} merged; logits off by {float((found - logits).norm() / scale):.1%}"
            )


if __name__ == "__main__":
    typer.run(main)
