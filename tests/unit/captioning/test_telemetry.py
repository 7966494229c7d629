"""The metrics of a job: their names, the waiting, and the dashboard that shows them."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import captioner
from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.telemetry import METRICS, EngineMonitor, decode_label
from captioner.config import CaptionJobConfig, DecodingConfig, ModelConfig
from captioner.model.bundle import describe
from captioner.schema import source_schema
from tests.bundles import save_tiny_bundle
from tests.sample_images import encoded

DASHBOARD = json.loads((Path(captioner.__file__).parent / "cluster" / "dashboard" / "grafana.json").read_text())


class Notebook:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.gauges: dict[str, float] = {}
        self.told = threading.Event()

    def count(self, name: str, amount: float, **labels: str) -> None:
        assert METRICS[name].kind == "counter"
        assert tuple(labels) == METRICS[name].labels
        assert amount > 0
        self.counts[(name, *labels.values())] += amount  # type: ignore[assignment]

    def gauge(self, name: str, value: float) -> None:
        assert METRICS[name].kind == "gauge"
        self.gauges[name] = value
        self.told.set()

    def finished(self, num_images: int) -> None:
        self.num_finished = num_images


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def test_every_name_in_the_dashboard_is_a_metric_as_ray_exports_it_and_every_metric_is_shown() -> None:
    exported = {f"ray_{name}" + ("_total" if metric.kind == "counter" else "") for name, metric in METRICS.items()}
    shown = set(re.findall(r"ray_\w+", " ".join(expressions())))
    assert shown == exported


def test_every_label_in_the_dashboard_is_one_that_a_metric_has() -> None:
    labels = {label for metric in METRICS.values() for label in metric.labels}
    assert set(re.findall(r"(?:by |ignoring)\((\w+)\)|by \((\w+)\)", " ".join(expressions()))) <= {
        (label, "") for label in labels
    } | {("", label) for label in labels}


def test_a_worker_counts_captions_tokens_and_failures_by_reason(tmp_path: Path, notebook: Notebook) -> None:
    import pyarrow as pa

    bundle = save_tiny_bundle(tmp_path / "bundle")
    config = CaptionJobConfig(
        input_path=str(tmp_path),
        output=str(tmp_path / "out"),
        model=ModelConfig(model=bundle),
        decoding=DecodingConfig(max_new_tokens=4),
    )
    data = [encoded(seed=1), b"", b"<html>", encoded(seed=2)]
    rows = pa.Table.from_pylist(
        [{"key": key, "image_id": str(key), "attempt": 1, "data": image} for key, image in enumerate(data)],
        source_schema(),
    )
    worker = CaptionWorker(config, recorder=notebook)
    captioned = worker(DecodeWorker(config, describe(bundle).preprocessing)(rows))
    assert notebook.counts[("captioner_images",)] == 2
    assert notebook.counts[("captioner_tokens",)] == sum(filter(None, captioned["num_tokens"].to_pylist()))
    assert sum(count for name, count in notebook.counts.items() if name[0] == "captioner_decoded") == 2
    assert notebook.counts[("captioner_failures", "empty")] == 1
    assert notebook.counts[("captioner_failures", "not_an_image")] == 1
    assert notebook.gauges["captioner_slots"] == worker.captioner.num_slots


def test_a_time_of_decoding_counts_below_the_least_limit_that_it_kept() -> None:
    assert [decode_label(ms) for ms in (0.5, 10, 10.5, 999, 3000, 19_000)] == ["10", "10", "30", "1000", "3000", "more"]


def test_waiting_is_recorded_by_its_cause_and_never_twice(notebook: Notebook) -> None:
    idle_s = [0.0]
    monitor = EngineMonitor(notebook, num_busy=lambda: 7, idle_s=lambda: idle_s[0])
    idle_s[0] = 3.0
    with monitor:
        assert notebook.gauges["captioner_slots_busy"] == 7  # a job of less than a second is seen, too
        idle_s[0] = 5.0
    notebook.told.clear()
    idle_s[0] = 6.0
    notebook.told.wait(10)
    monitor.close()
    assert notebook.counts[("captioner_waited_seconds", "images")] == 4.0
    assert notebook.counts[("captioner_waited_seconds", "encoding")] == 2.0
    assert notebook.gauges["captioner_slots_busy"] == 7
