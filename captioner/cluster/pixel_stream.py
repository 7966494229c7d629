"""Pixels for the steps of a fit: each worker runs a stream of Ray Data over its own images, in its own order.

    images of each batch to come -> DecodeWorker pool (CPU) -> uint8[B, 3, S, S], batch by batch

The second stage is that of the caption job, so that a fit learns from the pixels that captioning shows it. It reads an
image at its URI, or, of one inside a tar or Parquet file, the bytes that were kept when it was checked. Ray Train's
`get_dataset_shard` would deal the blocks of one stream to whichever worker asks first, from the beginning of a dataset:
what a step sees would depend on timing, and no fit could go on in the middle of an epoch. Which images a step shows
follows from seed, step, rank and size, so a worker asks for exactly these, from the step at which it starts. Knows no
model; what an order is, is in `training.fit.fit_loop`.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data import Dataset

from captioner.captioning.resources import Allocation
from captioner.cluster.pools import decoded
from captioner.cluster.session import data_settings, start_beside_driver
from captioner.cluster.supervision import raising_worker_errors
from captioner.cluster.training_group import TRAIN, TrainingGroup
from captioner.cluster.worker_registry import WorkerRegistry
from captioner.errors import JobError
from captioner.inputs.slices import BLOCK_ROWS
from captioner.model.image_encoder import pixel_tensor
from captioner.schema import source_schema
from captioner.training.features.examples import FeatureSet, sampled_rows
from captioner.training.fit.batches import IntArray, PixelStream
from captioner.training.fit.fit_plan import FitPlan

__all__ = ["DecodedImages", "pixel_streams"]

_SEGMENT_ROWS = 1 << 18  # images of one run of Ray Data: their URIs, some 30 MB, wait in the object store
_STORE_SHARE = 0.5  # of the object store, for the pixels of all workers that wait to be read


@contextmanager
def pixel_streams(plan: FitPlan, features: FeatureSet, group: TrainingGroup) -> Iterator[Mapping[str, PixelStream]]:
    """Yield what gives the workers of a fit the pixels of `train` and of the validation sample; empty where features
    are kept."""
    if not plan.start.projector.reads_patches:
        yield {}
        return
    registry = start_beside_driver(WorkerRegistry, False)
    allocation = Allocation(
        workers=(0, 0),
        worker_gpus=0.0,
        worker_cpus=0.0,
        decoders=(group.decoders, group.decoders),
        decoder_cpus=group.decoder_cpus if group.gpus else 0.0,  # else the worker has reserved them
        num_readers=0,
    )
    decoder = {
        "config": plan.features.job,
        "preprocessing": plan.start.preprocessing,
        "source": features.cache.kept_images,
    }
    shown = {split: features.images_of(split, plan.labels) for split in ("train", "validation")}
    sample = sampled_rows(shown["validation"].num_rows, plan.config.training.num_measured_images)
    shown["validation"] = shown["validation"].take(pa.array(sample))
    yield {
        split: DecodedImages(ray.put(images), decoder, allocation, registry, plan.start.image_size)
        for split, images in shown.items()
    }
    ray.kill(registry)


@dataclass(frozen=True)
class DecodedImages:
    """Gives the pixels of images of one split, decoded in the order in which they are asked for; can be pickled."""

    images: Any
    """Reference to the table of the split: `image_id` and the `uri` that the decoder reads, one row an image."""

    decoder: Mapping[str, Any]
    """Arguments of each DecodeWorker."""

    allocation: Allocation
    registry: Any
    side: int
    """Side S of the square that the tower reads."""

    def __call__(self, batches: Iterator[IntArray]) -> Generator[npt.NDArray[np.uint8]]:
        """Yield uint8[B, 3, S, S] for each int64[B] of the split's images.

        Raises JobError for an image that cannot be read now, though it could be when the fit began."""
        images = ray.get(self.images)
        with data_settings(), raising_worker_errors(self.registry):
            for segment in _segments(batches):
                yield from self._pixels(images, segment)

    def _pixels(self, images: pa.Table, batches: list[IntArray]) -> Iterator[npt.NDArray[np.uint8]]:
        rows = np.concatenate(batches)
        stream = self._stream([_source_rows(images, rows, start) for start in range(0, len(rows), BLOCK_ROWS)])
        tables = iter(stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        first = 0
        for table in _cut(tables, map(len, batches)):
            keys = table["key"].to_numpy()
            assert (keys == np.arange(first, first + len(keys))).all(), "Ray Data has changed the order of the rows"
            first += len(keys)
            _check_read(table)
            yield pixel_tensor(table["pixels"], self.side).numpy()

    def _stream(self, blocks: list[pa.Table]) -> Dataset:
        """Return the stream of decoded rows, in the order of the blocks, not yet running."""
        # Not from_arrow: it counts rows in a task of a whole CPU, and the workers may leave none.
        here = None if self.allocation.decoder_cpus else ray.get_runtime_context().get_node_id()
        rows = decoded(ray.data.from_blocks(blocks), self.decoder, self.allocation, self.registry, here)
        options = rows.context.execution_options
        options.preserve_order = True
        total = ray.cluster_resources().get("object_store_memory", 0)  # type: ignore[no-untyped-call]
        room = _STORE_SHARE * total / TRAIN.get_context().get_world_size()
        options.resource_limits = options.resource_limits.copy(object_store_memory=room)
        return rows


def _segments(batches: Iterable[IntArray]) -> Iterator[list[IntArray]]:
    """Yield lists of batches, some `_SEGMENT_ROWS` images each."""
    segment, num_rows = list[IntArray](), 0
    for batch in batches:
        segment.append(batch)
        num_rows += len(batch)
        if num_rows >= _SEGMENT_ROWS:
            yield segment
            segment, num_rows = [], 0
    if segment:
        yield segment


def _source_rows(images: pa.Table, rows: IntArray, start: int) -> pa.Table:
    """Return a block of `schema.source_schema` whose keys are places in `rows`."""
    here = rows[start : start + BLOCK_ROWS]
    schema, num_rows = source_schema(), len(here)
    named = images.take(pa.array(here))
    known = {
        "key": pa.array(np.arange(start, start + num_rows)),
        "attempt": pa.array(np.ones(num_rows, np.int32)),
        "image_id": named["image_id"],
        "uri": named["uri"],
    }
    columns = [known.get(kind.name, pa.nulls(num_rows)) for kind in schema]
    return pa.table([column.cast(kind.type) for column, kind in zip(columns, schema, strict=True)], schema=schema)


def _cut(tables: Iterator[pa.Table], sizes: Iterable[int]) -> Iterator[pa.Table]:
    """Yield the rows of the tables, one after another, in tables of these sizes."""
    left = next(tables)
    for size in sizes:
        while left.num_rows < size:
            left = pa.concat_tables([left, next(tables)])
        yield left.slice(0, size)
        left = left.slice(size)


def _check_read(rows: pa.Table) -> None:
    if rows["reason"].null_count != rows.num_rows:
        bad = next(row for row in rows.select(["image_id", "reason", "detail"]).to_pylist() if row["reason"])
        raise JobError(
            f"{bad['image_id']} could be decoded before the fit and cannot be read now ({bad['reason']}:"
            f" {bad['detail']}); restore it, and run the same command again: the fit goes on from its checkpoint"
        )
