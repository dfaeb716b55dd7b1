"""The DWA-KD loss: pure functions of tensors and of the recipe's loss settings.

A variant is who learns from whom (`matches`) and sums of the objective (`terms`). Its record in
`variants` is what logs, health and projectors follow.
"""

from dwakd_plugin.loss.alignment import attention_entropy, valid_positions
from dwakd_plugin.loss.head_pass import tokens_per_chunk, tokens_per_chunk_of
from dwakd_plugin.loss.matches import Figure
from dwakd_plugin.loss.objective import Alignment, LossTerms, alignment_of, dwakd_loss
from dwakd_plugin.loss.own_answers import own_answer_terms, own_loss_config
from dwakd_plugin.loss.states import (
    ContinuationTable,
    Head,
    ResponseStates,
    SpellingTable,
    TopTokens,
)
from dwakd_plugin.loss.variants import (
    every_sum,
    names_of,
    projects_labels,
    trained_projectors,
    variant_of,
)

__all__ = [
    "Alignment",
    "ContinuationTable",
    "Figure",
    "Head",
    "LossTerms",
    "ResponseStates",
    "SpellingTable",
    "TopTokens",
    "alignment_of",
    "attention_entropy",
    "dwakd_loss",
    "every_sum",
    "linear",
    "names_of",
    "own_answer_terms",
    "own_loss_config",
    "projects_labels",
    "soft_dtw",
    "token_order",
    "tokens_per_chunk",
    "tokens_per_chunk_of",
    "trained_projectors",
    "valid_positions",
    "variant_of",
]
