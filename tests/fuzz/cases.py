"""How many cases a target makes, what is counted, and what every message must be.

Few cases a target in a usual run, the same ones each time; `make fuzz` makes many, from a seed, and
writes down how many (`benchmarks/fuzz.py`). What was found once stays as an example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

from hypothesis import HealthCheck, settings

# Cases that ran to their end, by target.
CASES: Counter[str] = Counter()
LONGEST_MESSAGE = 10_000  # characters


def cases(few: int, many: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many cases of a target: few, always the same, or many with the profile `fuzz`."""
    fuzzing = settings.get_current_profile_name() == "fuzz"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            test(*args, **kwargs)
            CASES[test.__name__.removeprefix("test_")] += 1

        return settings(
            max_examples=many if fuzzing else few,
            derandomize=not fuzzing,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(counted)

    return decorate


def located(message: str, *places: str) -> None:
    """A message for a person: not empty, not endless, printable, and it names the place."""
    assert message.strip()
    assert len(message) <= LONGEST_MESSAGE
    message.encode()
    for place in places:
        assert place in message
