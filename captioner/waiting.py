"""For what part of its time a model had nothing to do, and when it began. Knows clocks and no model."""

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

__all__ = ["ModelClock", "Reading", "first_caption_at", "last_readings", "waited_share"]


@dataclass(frozen=True)
class Reading:
    """What the clock of one model worker said: since its model was ready, in seconds."""

    worker: str
    waited_s: float
    """Time in which no image was with the model."""

    ready_s: float
    first_at: float | None = None
    """Unix time at which its first images were done."""


@dataclass
class ModelClock:
    """Runs from its making on; may be asked and held busy from several threads at once."""

    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    worker: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _num_busy: int = 0
    _waited_s: float = 0.0
    _first_at: float | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._start = self._idle_since = self.now()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the time inside as not waited, once for all threads together."""
        with self._lock:
            if not self._num_busy:
                self._waited_s += self.now() - self._idle_since
            self._num_busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_busy -= 1
                self._first_at = self._first_at or self.wall()
                if not self._num_busy:
                    self._idle_since = self.now()

    @property
    def is_busy(self) -> bool:
        """True while an image is with the model."""
        return self._num_busy > 0

    def read(self) -> Reading:
        """Return what it says now."""
        with self._lock:
            now = self.now()
            waiting_s = 0.0 if self._num_busy else now - self._idle_since
            return Reading(self.worker, self._waited_s + waiting_s, now - self._start, self._first_at)


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
