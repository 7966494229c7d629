"""The clock of a model worker: how long it had no image to work on. Knows no model."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from captioner.tables.clock_readings import Reading

__all__ = ["ModelClock"]


@dataclass
class ModelClock:
    """Starts when it is made. Several threads may read it and hold it busy at the same time."""

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
        """Return its reading now."""
        with self._lock:
            now = self.now()
            waiting_s = 0.0 if self._num_busy else now - self._idle_since
            return Reading(self.worker, self._waited_s + waiting_s, now - self._start, self._first_at)
