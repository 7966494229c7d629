"""How a benchmark measures and how it ends: ways that take turns, and one JSON line with a `targets` object.

Each target reads `{"value": x, "target": y, "met": true or false}`. A benchmark reports; it never fails on a figure.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    has_warm_up: bool = True,
) -> dict[str, list[float]]:
    """Return the seconds that each way took in each round; every other round goes in reversed order."""
    if has_warm_up:
        for way in ways.values():
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            start = clock()
            ways[name]()
            seconds[name].append(clock() - start)
    return seconds


def at_least(value: float, target: float) -> dict[str, Any]:
    """Return the target of a figure that should be as large as this."""
    return {"value": value, "target": target, "met": value >= target}


def at_most(value: float, target: float) -> dict[str, Any]:
    """Return the target of a figure that should be as small as this."""
    return {"value": value, "target": target, "met": value <= target}


def last_line(benchmark: str, targets: Mapping[str, Mapping[str, Any]], **figures: Any) -> str:
    """Return the line of JSON that a benchmark prints last."""
    return json.dumps({"benchmark": benchmark, **figures, "targets": targets})
