"""How long a call takes. Knows a clock and nothing else."""

import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Timed", "timed"]

Result = TypeVar("Result")


class Timed(NamedTuple, Generic[Result]):
    """What a call returned, and what it took."""

    result: Result
    seconds: float
    cpu_s: float
    """CPU seconds of this process meanwhile, those of other threads among them."""


def timed(call: Callable[[], Result]) -> Timed[Result]:
    """Return the result of a call with its time."""
    start, cpu = time.perf_counter(), time.process_time()
    result = call()
    return Timed(result, time.perf_counter() - start, time.process_time() - cpu)
