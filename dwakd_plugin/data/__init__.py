"""Rows for both sides: each tokenised twice, packed in pairs, laid out as batches.

Everything here happens before the first forward pass.
"""

__all__ = [
    "answers",
    "collator",
    "dual_tokenization",
    "fingerprint",
    "first_rows",
    "library_docs",
    "packing",
    "passages",
    "raw_rows",
    "row_report",
    "sampled_rows",
    "teacher_side",
]
