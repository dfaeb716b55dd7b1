"""Bits per byte and answers of a model folder that was made here, on rows as axolotl reads them.

torch, transformers and axolotl are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dwakd_plugin.data.library_docs import Row
from dwakd_plugin.tokenizers.loading import load_tokenizer

Prompt = Callable[[Row], str]


def alpaca_prompt(row: Row) -> str:
    """The text before the response in axolotl's `type: alpaca`."""
    from axolotl.prompters import AlpacaPrompter

    return next(AlpacaPrompter().build_prompt(row["instruction"], row["input"]))


def encode_row(tokenizer: Any, row: Row, prompt: Prompt = alpaca_prompt) -> tuple[list[int], int]:
    """Token ids of prompt, response and end, and how many belong to the prompt.

    Prompt and response are tokenised apart, as axolotl does it for training.
    """
    prompt_ids = tokenizer(prompt(row))["input_ids"]
    response_ids = tokenizer(row["output"])["input_ids"]
    if response_ids[-1] != tokenizer.eos_token_id:
        response_ids = [*response_ids, tokenizer.eos_token_id]
    if response_ids[0] == tokenizer.bos_token_id:
        response_ids = response_ids[1:]
    return prompt_ids + response_ids, len(prompt_ids)


def held_out_bits_per_byte(
    model_dir: Path, rows: Sequence[Row], prompt: Prompt = alpaca_prompt, batch_size: int = 8
) -> float:
    """Bits that the model needs for a byte of response: comparable between tokenizers.

        Σ −log₂ p(token | all before it) / Σ UTF-8 bytes of the responses

    over the tokens of the responses and the end of each; the prompt costs nothing. In float32, at
    most `batch_size` rows at a time.
    """
    import torch

    model, tokenizer, device = _load(model_dir)
    encoded = sorted((encode_row(tokenizer, row, prompt) for row in rows), key=lambda x: len(x[0]))
    nats = 0.0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        labels = torch.full((len(batch), width), -100)
        attention_mask = torch.zeros((len(batch), width), dtype=torch.long)
        for i, (ids, n_prompt) in enumerate(batch):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, n_prompt : len(ids)] = torch.tensor(ids[n_prompt:])
            attention_mask[i, : len(ids)] = 1
        with torch.no_grad():
            logits = model(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)
            ).logits
        targets = labels[:, 1:].to(device)
        keep = targets != -100
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1][keep].float(), targets[keep], reduction="sum"
        )
        nats += loss.item()
    n_bytes = sum(len(row["output"].encode()) for row in rows)
    return nats / torch.log(torch.tensor(2.0)).item() / n_bytes


def sample_answers(
    model_dir: Path,
    rows: Sequence[Row],
    max_new_tokens: int,
    seed: int | None,
    prompt: Prompt = alpaca_prompt,
    batch_size: int = 8,
) -> list[str]:
    """The model's answer to each row: sampled at temperature 1, greedy if `seed` is None."""
    import torch

    model, tokenizer, device = _load(model_dir)
    answers: list[str] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed or 0)
        for start in range(0, len(rows), batch_size):
            prompts = [prompt(row) for row in rows[start : start + batch_size]]
            inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(
                device
            )
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=seed is not None,
                top_k=0 if seed is not None else None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            new = output[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def _load(model_dir: Path) -> tuple[Any, Any, str]:
    from dwakd_plugin.evaluate import model as models

    held = models.Held(dtype="float32")
    source = models.find_model(str(model_dir))
    model = models.load_model(source, models.load_config(source, trust_remote_code=False), held)
    tokenizer = load_tokenizer(source.tokenizer, f"The tokenizer of `{model_dir}`")
    return model, tokenizer, models.choose_device(held.device)
