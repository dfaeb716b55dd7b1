"""The student's hidden states drawn to the teacher's, where both have read the same bytes.

    hidden_cosine = Σ 1 − cos(h_i, t2s(g_j))        over pairs (i, j) that have read the same bytes

The cosine of hidden states is DistilBERT's (arXiv 1910.01108), whose teacher has the student's
width; the linear map between widths is FitNets' (arXiv 1412.6550), from the teacher to the student
here, as everywhere in this loss. `t2s` is applied to the raw g, as in soft-DTW (D7), and trains by
this term. A pair inside a token of the teacher's is left out: there the student has read more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwakd_plugin.loss.matches.partners import SamePrefix
from dwakd_plugin.loss.record import HeadPasses, Term, no_column
from dwakd_plugin.loss.states import gathered
from dwakd_plugin.loss.terms.warp import unit_vectors


def cosine_distances(x: Tensor, y: Tensor) -> Tensor:
    """1 − cos(x_i, y_i), 1 where a vector is zero, which takes no gradient: (P, d) twice → (P,)."""
    cosines: Tensor = torch.linalg.vecdot(unit_vectors(x)[0], unit_vectors(y)[0])
    return 1 - cosines


def _hidden_cosine(passes: HeadPasses[SamePrefix]) -> dict[str, Tensor]:
    batch, (ours, theirs) = passes.batch, passes.match.pairs
    kept = gathered(passes.match.same_prefix, ours)
    distances = cosine_distances(
        gathered(batch.student_side.hidden, ours),
        batch.project("t2s", gathered(batch.teacher_side.hidden, theirs)),
    )
    return {"hidden_cosine": distances.where(kept, 0.0).sum(), "hidden_pairs": kept.sum()}


HIDDEN_COSINE = Term(
    "hidden_cosine",
    "hidden",
    _hidden_cosine,
    per="hidden_pairs",
    weights=no_column,
    beside="hidden_cosine",
    trains=frozenset({"t2s"}),
)
