"""Two tokenizers: their pieces as bytes, figures of a pair, which tokens are the same text.

Token ids and strings only; nothing of models.
"""

__all__ = [
    "alignment",
    "continuations",
    "ends",
    "findings",
    "loading",
    "pair",
    "respelling",
    "same_text",
    "sampled",
    "side",
    "spellings",
    "template_date",
    "texts",
    "training",
    "verdict",
]
