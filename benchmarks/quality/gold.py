"""TRL's GOLD in a training of the benchmark: its own `ULDLoss`, on the batches that ours gets.

What is not taken over from `GOLDTrainer` is its sampling: all answers are the rows'.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from tempfile import gettempdir
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwakd_plugin.loss import ResponseStates
from dwakd_plugin.loss.objective import LossTerms
from dwakd_plugin.train import trainer


def use_gold(settings: Mapping[str, Any], student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """From here on this process trains with GOLD's loss. For recipes of `GOLD` in `methods`.

    `settings`: keys of GOLDConfig. Both tokenizers have to be byte-level.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # its warning that interfaces may change
    from trl.experimental.gold.gold_config import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = GOLDConfig(
        output_dir=gettempdir(),  # nothing is written there
        use_uld_loss=True,
        bf16=False,
        report_to="none",
        **settings,
    )
    loss = ULDLoss(config, student_tokenizer, teacher_tokenizer, device=torch.device("cpu"))
    ours = trainer.dwakd_loss

    def terms(
        student: ResponseStates, teacher: ResponseStates | None, *further: Any, **settings: Any
    ) -> LossTerms:
        assert teacher is not None
        logged = vars(ours(student, teacher, *further, **settings))
        found = gold_loss(loss, student, teacher)
        # The trainer divides by the batch's labels; GOLD's is a mean already.
        return LossTerms(None, **(logged | {"uld": found * logged["student_tokens"]}))

    trainer.dwakd_loss = terms


def gold_loss(loss: Any, student: ResponseStates, teacher: ResponseStates) -> Tensor:
    """GOLD's loss of a batch, from `loss`, a ULDLoss."""
    sides = [
        _as_gold_reads(*side)
        for side in ((student, loss.student_tokenizer), (teacher, loss.teacher_tokenizer))
    ]
    (logits, labels, ids, offsets), (their_logits, their_labels, their_ids, their_offsets) = sides
    return loss(
        logits,
        their_logits,
        student_labels=labels,
        teacher_labels=their_labels,
        student_input_ids=ids,
        teacher_input_ids=their_ids,
        student_byte_offsets=offsets,
        teacher_byte_offsets=their_offsets,
    )


def _as_gold_reads(states: ResponseStates, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (B, L+1, V), labels and ids (B, L+1), each token's first and last byte (B, L+1, 2).

    Of whole sequences, whose logits at a position predict the next one's label: of the prompt its
    last token is enough, of which nothing but the logits is read.
    """
    assert states.labels is not None
    hidden, labels = F.pad(states.hidden, (0, 0, 0, 1)), F.pad(states.labels, (1, 0), value=-100)
    # Padding may hold anything, and a gradient of nothing would still be NaN.
    read = torch.arange(hidden.shape[1]) < states.lengths[:, None]
    logits = states.head.logits(torch.where(read[..., None], hidden, 0.0))
    ids = labels.clamp_min(0)
    counts = [[_byte_count(tokenizer, label) for label in row] for row in labels.tolist()]
    ends = torch.tensor(counts).cumsum(1)
    return logits, labels, ids, torch.stack([F.pad(ends, (1, 0))[:, :-1], ends], -1)


def _byte_count(tokenizer: Any, label: int) -> int:
    """How many bytes of text a label stands for: in a byte-level token each is a character."""
    if label < 0 or label in tokenizer.all_special_ids:
        return 0
    return len(tokenizer.convert_ids_to_tokens(label))
