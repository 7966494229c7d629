"""For what part of its time a model had nothing to do. Knows clocks and no model."""

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

__all__ = ["ModelClock", "Reading", "last_readings", "waited_share"]


@dataclass(frozen=True)
class Reading:
    """What the clock of one model worker said: since its model was ready, in seconds."""

    worker: str
    waited_s: float
    """Time in which no image was with the model."""

    ready_s: float


@dataclass
class ModelClock:
    """Runs from its making on; may be asked and held busy from several threads at once."""

    now: Callable[[], float] = time.monotonic
    worker: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _num_busy: int = 0
    _waited_s: float = 0.0

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
                if not self._num_busy:
                    self._idle_since = self.now()

    def read(self) -> Reading:
        """Return what it says now."""
        with self._lock:
            now = self.now()
            waiting_s = 0.0 if self._num_busy else now - self._idle_since
            return Reading(self.worker, self._waited_s + waiting_s, now - self._start)


def last_readings(column: pa.ChunkedArray) -> tuple[Reading, ...]:
    """Return the last reading of each worker, of structs {worker, waited_s, ready_s}, one a row; nulls say nothing."""
    readings = pa.table(column.drop_null().flatten(), ["worker", "waited_s", "ready_s"])
    last = readings.group_by("worker").aggregate([("waited_s", "max"), ("ready_s", "max")])  # both only ever grow
    return tuple(Reading(row["worker"], row["waited_s_max"], row["ready_s_max"]) for row in last.to_pylist())


def waited_share(readings: Iterable[Reading]) -> float | None:
    """Return the share of the time of all workers together, from their last readings; None without any."""
    last: dict[str, Reading] = {}
    for reading in readings:
        last[reading.worker] = max(reading, last.get(reading.worker, reading), key=lambda one: one.ready_s)
    ready_s = sum(reading.ready_s for reading in last.values())
    return sum(reading.waited_s for reading in last.values()) / ready_s if ready_s else None
