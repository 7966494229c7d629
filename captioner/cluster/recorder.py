"""What a running job tells Prometheus, through Ray's metrics. What is recorded is in `captioning.telemetry`."""

from typing import Any

import ray
from ray.util import metrics

from captioner.captioning.telemetry import METRICS

__all__ = ["RayRecorder"]


class RayRecorder:
    """Records into Ray's metrics in whichever process it is unpickled."""

    def __init__(self, registry: Any = None) -> None:
        """registry: learns how many images are finished; see `WorkerRegistry.note_finished`."""
        self._registry = registry
        self._made: dict[str, Any] = {}
        self._num_told = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._registry,)

    def count(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter."""
        self._metric(name).inc(amount, labels)

    def finished(self, num_images: int) -> None:
        """Tell the registry, unless it knows. Waits for no answer."""
        if self._registry is not None and num_images != self._num_told:
            self._num_told = num_images
            self._registry.note_finished.remote(str(ray.get_runtime_context().get_actor_id()), num_images)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metric(name).set(value)

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            kind = metrics.Counter if METRICS[name].kind == "counter" else metrics.Gauge
            self._made[name] = kind(name, METRICS[name].description, tag_keys=METRICS[name].labels)
        return self._made[name]
