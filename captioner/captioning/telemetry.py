"""The metrics of a running job, and the recorder through which its workers report them.

Knows no collector: the cluster room passes in a recorder that writes to Ray's metrics, which Prometheus reads as
`ray_<name>`. The panels in `captioner/cluster/dashboard/grafana.json` show them.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["METRICS", "EngineMonitor", "Metric", "NullRecorder", "Recorder", "decode_label"]

_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Metric:
    """One time series of each worker, or several where it has labels."""

    kind: Literal["counter", "gauge"]
    description: str
    labels: tuple[str, ...] = ()


METRICS = {
    "captioner_images": Metric("counter", "Images that have a caption"),
    "captioner_failures": Metric("counter", "Images that have none, by reason", ("reason",)),
    "captioner_decoded": Metric("counter", "Images by the milliseconds that decoding took, at most", ("up_to_ms",)),
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


_DECODE_LIMITS_MS = (10, 30, 100, 300, 1_000, 3_000)


def decode_label(decode_ms: float) -> str:
    """Return the label of an image's decoding: the least of some limits that it kept, or `more`."""
    return next((str(limit) for limit in _DECODE_LIMITS_MS if decode_ms <= limit), "more")


class Recorder(Protocol):
    """Takes what workers record. Called from many threads; amounts are above 0."""

    def count(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter."""

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""

    def finished(self, num_images: int) -> None:
        """Say how many images the worker has finished so far, failures among them. Called about once a second."""


class NullRecorder:
    """A recorder that keeps nothing: for tests, notebooks and estimates."""

    def count(self, name: str, amount: float, **labels: str) -> None:
        """Keep nothing."""

    def gauge(self, name: str, value: float) -> None:
        """Keep nothing."""

    def finished(self, num_images: int) -> None:
        """Keep nothing."""


class EngineMonitor:
    """A thread that records once a second how busy an engine is, what it waited for and how far it is."""

    def __init__(
        self,
        recorder: Recorder,
        *,
        num_busy: Callable[[], int],
        idle_s: Callable[[], float],
        num_finished: Callable[[], int] = int,
    ) -> None:
        """Start. num_busy: captions being written now; idle_s: time so far in which none was; num_finished: images."""
        self._recorder = recorder
        self._num_finished = num_finished
        self._num_busy = num_busy
        self._idle_s = idle_s
        self._recorded_s = 0.0
        self._num_calls = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="captioner-monitor", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        """Begin a call: from now on the engine waits for its images to be encoded, not for images."""
        with self._lock:
            if not self._num_calls:
                self._record_waiting("images")
            self._num_calls += 1
            self._recorder.gauge("captioner_slots_busy", self._num_busy())  # so that a job of a second is seen, too

    def __exit__(self, *_: object) -> None:
        """End a call."""
        with self._lock:
            self._record_waiting("encoding")
            self._num_calls -= 1

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            with self._lock:
                self._record_waiting("encoding" if self._num_calls else "images")
            self._recorder.gauge("captioner_slots_busy", self._num_busy())
            self._recorder.finished(self._num_finished())

    def _record_waiting(self, cause: str) -> None:
        idle_s = self._idle_s()
        if idle_s > self._recorded_s:
            self._recorder.count("captioner_waited_seconds", idle_s - self._recorded_s, cause=cause)
            self._recorded_s = idle_s
