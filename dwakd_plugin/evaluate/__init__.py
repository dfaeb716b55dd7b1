"""What a trained student is worth: answers, bits per byte, distance to a teacher.

Takes any model folder, ours or not.
"""

__all__ = ["figures", "generation", "held_out", "model", "responses", "rows"]
