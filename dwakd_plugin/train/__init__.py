"""A run: checks before it, its parts put together, the step, what it logs, warns of and writes.

`assembly` makes a `Distillation`, and `trainer` trains with it.
"""

__all__ = [
    "adaptation",
    "assembly",
    "child_process",
    "health",
    "kept_logits",
    "launch",
    "open_run",
    "own_sampling",
    "preflight",
    "progress",
    "progress_callback",
    "report",
    "run_folder",
    "served_rows",
    "signals",
    "trainer",
    "warmup",
    "warmup_file",
]
