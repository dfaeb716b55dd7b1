"""Two models of one tokenizer, one of which answers rows that the other judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dwakd_plugin.data.collator import DualCollator, split_batch
from dwakd_plugin.loss import ResponseStates
from dwakd_plugin.models.causal_lm import embedding_table, output_head
from dwakd_plugin.models.student import student_states
from dwakd_plugin.models.teacher.loaded import Teacher
from dwakd_plugin.models.teacher.top_tokens import RowStates
from dwakd_plugin.recipe.schema import parse_recipe
from dwakd_plugin.train.own_answers import OwnAnswers
from tests.conftest import ROWS

OWN = {"share": 0.75, "max_new_tokens": 2, "start_after": 1}  # few bytes that aren't text


class Pair:
    """Student and teacher in float64 with one tokenizer, and a batch of rows for both."""

    def __init__(
        self,
        folder: Path,
        rows: int,
        states: RowStates | None = None,
        packed_len: int | None = None,
        rank: tuple[int, int] = (0, 1),
        **own: Any,
    ) -> None:
        """states: what a cache has of the given rows; the rest as `OwnAnswers` has it."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.student, self.model = (self._model(seed) for seed in (4, 5))
        features = []
        for index, row in enumerate(ROWS[:rows]):
            prompt = self.tokenizer(f"{row['instruction']}\n")["input_ids"]
            answer = [*self.tokenizer(row["output"])["input_ids"], self.tokenizer.eos_token_id]
            ids, labels = [*prompt, *answer], [-100] * len(prompt) + answer
            features.append(
                {
                    "input_ids": ids,
                    "labels": labels,
                    "attention_mask": [1] * len(ids),
                    "teacher_input_ids": ids,
                    "teacher_labels": labels,
                    "source_row": index,
                }
            )
        self.collator = DualCollator(tokenizer=self.tokenizer, teacher_states=states)
        self.batch = dict(self.collator([dict(each) for each in features]))
        self.teacher = Teacher(
            embeddings=embedding_table(self.model),
            head=output_head(self.model),
            model=self.model,
            parameters=1,
            attention="sdpa",
            precision="float64",
            device=torch.device("cpu"),
        )
        config = parse_recipe(
            {
                "distillation": "dwakd",
                "dwakd": {
                    "teacher": "big",
                    "variant": "paper",
                    "own_answers": {"start_after": 0, **own},
                },
            }
        )
        assert config is not None and config.own_answers is not None
        self.own = OwnAnswers(
            config,
            config.own_answers,
            (self.tokenizer, self.tokenizer),
            self.teacher,
            self.collator,
            ends=frozenset({self.tokenizer.eos_token_id}),
            paired={self.tokenizer.eos_token_id: self.tokenizer.eos_token_id},
            lengths=(256, 256),
            seed=3,
            packed_len=packed_len,
            rank=rank,
        )

    def _model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).double().eval()

    def judged(self, batch: dict[str, Tensor], rows: list[int]) -> Tensor:
        return self.sides(batch, rows)[2]

    def sides(
        self, batch: dict[str, Tensor], rows: list[int]
    ) -> tuple[ResponseStates, ResponseStates, Tensor]:
        """What is given, on both sides, and the loss of the student's own rows."""
        added, own = split_batch(batch)
        student = student_states(self.student, added, **own)
        return self.own.set_apart(student, self.teacher.states(added), torch.tensor(rows))
