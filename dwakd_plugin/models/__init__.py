"""Student, teacher and projectors as the loss sees them: hidden states, head, embeddings.

A teacher is a loaded model or a cache of its states; what uses it cannot tell which.
"""

__all__ = [
    "batches",
    "causal_lm",
    "cutting",
    "folder",
    "new_vocabulary",
    "out_of_memory",
    "projectors",
    "quantised_layers",
    "sampling",
    "smollm2",
    "student",
    "teacher",
    "vllm",
    "whole_weights",
]
