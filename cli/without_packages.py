"""Packages that a command does without, though they are installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator


@contextlib.contextmanager
def without_packages(names: Iterable[str]) -> Iterator[None]:
    """While open, the packages are taken for not installed; those that are imported stay.

    transformers imports what it finds, whether it is called for or not, and that takes seconds.
    """
    missing = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)
