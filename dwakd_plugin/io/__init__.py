"""What is written so that nothing is lost: whole files, rows of JSON, locks.

Knows nothing of models or recipes; torch only where tensors are saved.
"""

__all__ = ["files", "folders", "json_rows", "locks", "run_lock"]
