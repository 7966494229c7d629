"""What a running job tells of itself, by name: the metrics, and the seam through which a worker records them.

Knows names and nothing that collects them; `caption_pipeline` hands in a recorder that writes to Ray's metrics, which
serves them to Prometheus as `ray_<name>`. The panels in `captioner/dashboard/grafana.json` show them.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["METRICS", "Metric", "Recorder", "Silent"]


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
    "captioner_slots_busy": Metric("gauge", "Captions that a model worker is writing"),
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
