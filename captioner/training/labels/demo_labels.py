"""The labels of the demo: embedded scenes, rendered into a Parquet file."""

import io
from collections.abc import Mapping
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.config import LabelsConfig
from captioner.demo import scenes
from captioner.storage import open_store, urls
from captioner.storage.faults import output_errors
from captioner.training.labels.splits import SPLITS, Split

__all__ = ["write_demo_labels"]

_DEMO_IMAGES: dict[Split, int] = {"train": 8000, "validation": 400, "test": 1000}
_DEMO_GROUP_ROWS = 512


def write_demo_labels(config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None) -> str:
    """Return the URL of a Parquet file of the demo's scenes below `run_folder`, written unless an earlier run did."""
    sizes = {split: min(size, config.limit or size) for split, size in _DEMO_IMAGES.items()}
    name = "demo-{train}-{validation}-{test}.parquet".format(**sizes)
    url = urls.join(urls.absolute(run_folder), "labels", name)
    store = open_store(url, output_options)
    with output_errors(run_folder):
        if store.info(url) is None:
            store.write_atomic(url, _render(sizes))
    return url


def _render(sizes: Mapping[Split, int]) -> bytes:
    examples = chain.from_iterable(scenes.examples(split, sizes[split]) for split in SPLITS)
    columns: dict[str, list[Any]] = {"image_id": [], "image": [], "captions": [], "split": []}
    for example in examples:
        row = {"image_id": example.image_id, "image": example.image, "captions": example.captions}
        for field, value in (row | {"split": example.split}).items():
            columns[field].append(value)
    buffer = io.BytesIO()
    # images are compressed already; row groups are small, as readers read whole ones
    pq.write_table(pa.table(columns), buffer, compression="none", row_group_size=_DEMO_GROUP_ROWS)
    return buffer.getvalue()
