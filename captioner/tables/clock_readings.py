"""Readings of the clocks of model workers, carried by rows: the share of time in which the models had no image.

Knows the column `model_clock` and no clock.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

__all__ = ["Reading", "first_caption_at", "last_readings", "waited_share"]


@dataclass(frozen=True)
class Reading:
    """One reading of a model worker's clock, in seconds since its model was ready."""

    worker: str
    waited_s: float
    """Time in which no image was with the model."""

    ready_s: float
    first_at: float | None = None
    """Unix time at which its first images were done."""


def last_readings(column: pa.ChunkedArray) -> tuple[Reading, ...]:
    """Return the last reading of each worker, of structs with a Reading's fields, one a row; nulls say nothing."""
    readings = pa.table(column.drop_null().flatten(), ["worker", "waited_s", "ready_s", "first_at"])
    kinds = [("waited_s", "max"), ("ready_s", "max"), ("first_at", "min")]  # the first two only ever grow
    last = readings.group_by("worker").aggregate(kinds)
    return tuple(
        Reading(row["worker"], row["waited_s_max"], row["ready_s_max"], row["first_at_min"]) for row in last.to_pylist()
    )


def first_caption_at(readings: Iterable[Reading]) -> float | None:
    """Return the Unix time at which the first worker of all had its first images done; None if none ever had."""
    return min((reading.first_at for reading in readings if reading.first_at is not None), default=None)


def waited_share(readings: Iterable[Reading]) -> float | None:
    """Return the share of the time of all workers together, from their last readings; None without any."""
    last: dict[str, Reading] = {}
    for reading in readings:
        last[reading.worker] = max(reading, last.get(reading.worker, reading), key=lambda one: one.ready_s)
    ready_s = sum(reading.ready_s for reading in last.values())
    return sum(reading.waited_s for reading in last.values()) / ready_s if ready_s else None
