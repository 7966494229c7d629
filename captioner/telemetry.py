"""What a running job tells of itself, by name: the metrics, and the seam through which a worker records them.

Knows names and nothing that collects them; `caption_pipeline` hands in a recorder that writes to Ray's metrics, which
serves them to Prometheus as `ray_<name>`. The panels in `captioner/dashboard/grafana.json` show them.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["METRICS", "Metric", "Pulse", "Recorder", "Silent"]

_PULSE_S = 1.0


@dataclass(frozen=True)
class Metric:
    """One time series a worker, or several where it has labels."""

    kind: Literal["counter", "gauge"]
    description: str
    labels: tuple[str, ...] = ()


METRICS = {
    "captioner_images": Metric("counter", "Images that have a caption"),
    "captioner_failures": Metric("counter", "Images that have none, by reason", ("reason",)),
    "captioner_tokens": Metric("counter", "Tokens of all captions"),
    "captioner_slots": Metric("gauge", "Captions that a model worker can write at the same time"),
    "captioner_slots_busy": Metric("gauge", "Slots of a model worker in which a caption is being written"),
    "captioner_waited_seconds": Metric(
        "counter",
        "Time in which a model worker wrote nothing: it had no images, or they were still being encoded",
        ("cause",),
    ),
}
"""Every metric by its name."""


class Recorder(Protocol):
    """Takes what workers record. Called from many threads; amounts are above 0."""

    def count(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter."""

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""


class Silent:
    """A recorder that keeps nothing: of tests, notebooks and rehearsals."""

    def count(self, name: str, amount: float, **labels: str) -> None:
        """Keep nothing."""

    def gauge(self, name: str, value: float) -> None:
        """Keep nothing."""


class Pulse:
    """A thread that says once a second how busy an engine is, and what it waited for."""

    def __init__(self, recorder: Recorder, *, num_busy: Callable[[], int], idle_s: Callable[[], float]) -> None:
        """Start. num_busy: captions being written now; idle_s: time so far in which none was."""
        self._recorder = recorder
        self._num_busy = num_busy
        self._idle_s = idle_s
        self._told_s = 0.0
        self._num_calls = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="captioner-pulse", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        """Begin a call: from now on the engine waits for its images to be encoded, not for images."""
        with self._lock:
            if not self._num_calls:
                self._tell("images")
            self._num_calls += 1
            self._recorder.gauge("captioner_slots_busy", self._num_busy())  # a job of a second is seen, too

    def __exit__(self, *_: object) -> None:
        """End a call."""
        with self._lock:
            self._tell("encoding")
            self._num_calls -= 1

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_PULSE_S):
            with self._lock:
                self._tell("encoding" if self._num_calls else "images")
            self._recorder.gauge("captioner_slots_busy", self._num_busy())

    def _tell(self, cause: str) -> None:
        idle_s = self._idle_s()
        if idle_s > self._told_s:
            self._recorder.count("captioner_waited_seconds", idle_s - self._told_s, cause=cause)
            self._told_s = idle_s
