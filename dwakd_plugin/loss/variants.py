"""The variants of the loss, by the recipe's `loss.matching`: a new one is a file and a line here.

What `dwakd.variant` names beside them are settings of these (`recipe.schema.VARIANTS`).
"""

from __future__ import annotations

from collections.abc import Iterator

from dwakd_plugin.loss.matches import Figure
from dwakd_plugin.loss.matches.attention import Attention
from dwakd_plugin.loss.matches.pairs import SameToken
from dwakd_plugin.loss.matches.partners import InOrder, SamePrefix
from dwakd_plugin.loss.record import Role, Term, Variant
from dwakd_plugin.loss.terms.cosine import HIDDEN_COSINE
from dwakd_plugin.loss.terms.labels import LABELS
from dwakd_plugin.loss.terms.mapped import MAPPED
from dwakd_plugin.loss.terms.sorted import SORTED
from dwakd_plugin.loss.terms.student_space import STUDENT_SPACE, T2S_LABELS
from dwakd_plugin.loss.terms.teacher_space import TEACHER_SPACE
from dwakd_plugin.loss.terms.warp import WARP_EMBEDS, WARP_HIDDEN
from dwakd_plugin.recipe.schema import LossConfig

# Soft-DTW comes after the heads, and so before them in backward: what it keeps is not there while
# they work.
DUAL_SPACE = (LABELS, T2S_LABELS, STUDENT_SPACE, TEACHER_SPACE, WARP_HIDDEN, WARP_EMBEDS)

VARIANTS: dict[str, Variant] = {
    "attention": Variant(
        Attention,
        DUAL_SPACE,
        "KD ({divergence}",
        # An ablation's projectors have the form of all others, and its checkpoints too.
        always_trains=frozenset({"query", "t2s", "s2t", "embed_t2s"}),
        unlogged=frozenset({"paired_share", "paired_ce"}),  # 1 and `ce`: every token is paired
    ),
    # The map s2t isn't a parameter here: it follows the heads.
    "exact": Variant(
        SameToken,
        DUAL_SPACE,
        "KD (tokens of the same bytes, {divergence}",
        follows_head=frozenset({"s2t"}),
    ),
    "mapped": Variant(
        SamePrefix,
        (LABELS, MAPPED, HIDDEN_COSINE, WARP_HIDDEN, WARP_EMBEDS),
        "KD (the teacher's probabilities by the student's tokens, {divergence}",
    ),
    "order": Variant(InOrder, (LABELS, SORTED), "ULD (sorted probabilities"),
}


def variant_of(loss: LossConfig) -> Variant:
    """The record that these settings belong to."""
    return VARIANTS[loss.matching]


def trained_projectors(loss: LossConfig) -> frozenset[str]:
    """The projectors that these settings train; where there are none, none are made."""
    return variant_of(loss).trained_projectors(loss)


def projects_labels(loss: LossConfig) -> bool:
    """Whether a projector learns what the projected teacher should predict (`t2s_ce`)."""
    return any(term.role == "projector" for term in variant_of(loss).active(loss))


def every_term() -> Iterator[Term]:
    """The terms of all variants."""
    return (term for variant in VARIANTS.values() for term in variant.terms)


def names_of(*roles: Role) -> tuple[str, ...]:
    """The names of all terms, or of those with these roles."""
    terms = every_term()
    return tuple(dict.fromkeys(term.name for term in terms if not roles or term.role in roles))


def every_figure() -> Iterator[Figure]:
    """What the variants may log or watch, a term being a figure too."""
    for term in every_term():
        yield from (Figure(term.name, term.name, term.per), *term.figures)
    for variant in VARIANTS.values():
        yield from variant.match.figures


def every_sum() -> tuple[str, ...]:
    """The names of all that `dwakd_loss` returns: terms, and the sums and counts of figures."""
    sums = (name for figure in every_figure() for name in (figure.sums, figure.per))
    return tuple(dict.fromkeys(sums))
