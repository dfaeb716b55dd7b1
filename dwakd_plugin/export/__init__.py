"""The student and nothing else: merged, verified in a new process, described by a card."""

__all__ = ["export", "hub", "new_process"]
