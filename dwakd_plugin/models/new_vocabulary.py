"""Another vocabulary under a model: rows of embeddings and head made from those it has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rows_from(weight: Tensor, spellings: Sequence[Sequence[int]], known: int) -> Tensor:
    """Rows (V', …) for new tokens from old ones (V, …): row i = mean of `weight[spellings[i]]`.

    One id gives the very row. No id gives the mean of the first `known` rows: those after are the
    padding of a vocabulary, which nothing has trained. Means are taken in float32, the result has
    the weight's dtype. What scales embeddings (Gemma) scales their means alike.
    """
    table = weight.detach().reshape(len(weight), -1).float()
    flat = torch.tensor(list(chain.from_iterable(spellings)), device=weight.device)
    counts = torch.tensor([0, *map(len, spellings)], device=weight.device)
    rows = F.embedding_bag(flat.long(), table, counts.cumsum(0)[:-1], mode="mean")
    rows[counts[1:] == 0] = table[:known].mean(0)
    return rows.reshape(-1, *weight.shape[1:]).to(weight.dtype)


def replace_vocabulary(model: Any, spellings: Sequence[Sequence[int]], known: int) -> None:
    """Gives a causal LM rows of embeddings and head (its bias too) for other tokens, in place.

    spellings: for each new token the old ones that spell it; known: how many tokens the old
    tokenizer has. A head tied to the embeddings stays so.
    """
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    wanted = {"embeddings": rows_from(model.get_input_embeddings().weight, spellings, known)}
    if not tied:
        wanted["head"] = rows_from(head.weight, spellings, known)
    if head.bias is not None:
        wanted["bias"] = rows_from(head.bias, spellings, known)
    model.resize_token_embeddings(len(spellings), mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(wanted["embeddings"])
        if not tied:
            head.weight.copy_(wanted["head"])
        if head.bias is not None:
            head.bias.copy_(wanted["bias"])
