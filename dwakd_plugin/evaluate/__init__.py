"""What a trained student is worth: answers, bits per byte, distance to a teacher.

Takes any model folder, ours or not; the answers that a teacher gives become rows here too.
"""

OF_TEACHER = ("agreement", "structure")  # these compare with one
METRICS = ("rouge_l", "bits_per_byte", *OF_TEACHER)

__all__ = [
    "METRICS",
    "OF_TEACHER",
    "answer_choice",
    "figures",
    "held_out",
    "model",
    "report",
    "subjects",
    "teacher_answers",
    "work",
]
