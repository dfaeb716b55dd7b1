"""What a trained student is worth: answers, bits per byte, distance to a teacher.

Takes any model folder, ours or not.
"""

OF_TEACHER = ("agreement", "structure")  # these compare with one
METRICS = ("rouge_l", "bits_per_byte", *OF_TEACHER)

__all__ = [
    "METRICS",
    "OF_TEACHER",
    "figures",
    "held_out",
    "model",
    "report",
    "subjects",
    "work",
]
