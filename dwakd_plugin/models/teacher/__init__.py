"""The frozen teacher: how it is loaded, quantised and attends, and the cache of its states.

`loaded.Teacher` is what the others see.
"""

__all__ = [
    "attention",
    "cache",
    "cached",
    "loaded",
    "quantisation",
    "served",
    "server",
    "top_tokens",
]
