"""TRL's own GOLDTrainer on the benchmark's rows: with the answers that its student samples.

Of the recipe it keeps student, teacher, rows, rate, schedule, batch, steps and seed. What it draws
for is a whole batch at a time, with the probability `lmbda`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Both sides' prompt is the text that the recipes write; the answer's end is the tokenizer's own.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def train_with_gold(
    recipe: Mapping[str, Any], settings: Mapping[str, Any], rows: list[tuple[str, str]]
) -> dict[str, float]:
    """Trains recipe's student on `rows` (prompt, answer) and saves it to its output folder.

    `settings`: keys of GOLDConfig. Returns the seconds of sampling, as `sampling_seconds`.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # its warning that interfaces may change
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gold.gold_config import GOLDConfig
    from trl.experimental.gold.gold_trainer import GOLDTrainer

    class Timed(GOLDTrainer):  # type: ignore[misc]
        sampling = 0.0

        def _generate_on_policy_for_slices(self, *args: Any) -> None:
            begun = time.perf_counter()
            super()._generate_on_policy_for_slices(*args)
            self.sampling += time.perf_counter() - begun

    student, teacher = recipe["base_model"], recipe["dwakd"]["teacher"]["base_model"]
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or recipe["special_tokens"]["pad_token"]
    turns = ("user", "assistant")
    messages = [
        [{"role": role, "content": text} for role, text in zip(turns, row, strict=True)]
        for row in rows
    ]
    config = GOLDConfig(
        output_dir=recipe["output_dir"],
        use_uld_loss=True,
        teacher_tokenizer_name_or_path=teacher,
        max_length=recipe["sequence_len"],
        per_device_train_batch_size=recipe["micro_batch_size"],
        gradient_accumulation_steps=recipe["gradient_accumulation_steps"],
        max_steps=recipe["max_steps"],
        learning_rate=recipe["learning_rate"],
        lr_scheduler_type=recipe["lr_scheduler"],
        warmup_steps=recipe["warmup_ratio"],  # below 1 it is a share
        weight_decay=recipe["weight_decay"],
        max_grad_norm=recipe["max_grad_norm"],
        optim=recipe["optimizer"],
        seed=recipe["seed"],
        logging_steps=recipe["logging_steps"],
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        **settings,
    )
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{"messages": row} for row in messages]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(recipe["output_dir"])
    history = json.dumps(trainer.state.log_history, indent=1)
    Path(recipe["output_dir"], "log.json").write_text(history, encoding="utf-8")
    return {"sampling_seconds": trainer.sampling}
