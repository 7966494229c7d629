"""Ask a table again when its parts were moved while they were read: a repair or a compaction takes them away.

Knows that parts come and go, and not how they are read.
"""

from collections.abc import Callable, Collection
from typing import TypeVar

__all__ = ["NUM_ATTEMPTS", "ask_again"]

T = TypeVar("T")
Parts = TypeVar("Parts", bound=Collection[str])

NUM_ATTEMPTS = 5
"""A compaction takes parts away once; a table that loses some all the time is not merely being written."""


def ask_again(list_parts: Callable[[], Parts], question: Callable[[Parts], T], error: type[Exception]) -> T:
    """Return the answer of `question` for the parts that are there.

    Where it raises `error` and some of its parts are gone, it is asked again of those that are there then. Raises the
    error where none is gone, or at the last attempt."""
    for _ in range(NUM_ATTEMPTS - 1):
        parts = list_parts()
        try:
            return question(parts)
        except error:
            if set(parts) <= set(list_parts()):
                raise
    return question(list_parts())
