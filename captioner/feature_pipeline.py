"""Feature extraction on Ray Data: read -> decode -> CLIP -> write, streaming.

    slices -> ReadSlices -> DecodeWorker pool (CPU) -> FeatureWorker pool (GPU) -> WriteFeatures

One of the modules that import ray. The first half is the caption job's own, so that a feature is that of the same
pixels. What is left to compute is in `feature_plan`, how it is kept in `features`.
"""

import logging
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ray.data import Dataset
from ray.data.datasource import Datasink

from captioner.caption_pipeline import (
    RETRIES,
    ReadSlices,
    check_device,
    decode_slices,
    guarded,
    job_errors,
    making_room,
    one_table,
    shortage,
    worker_pool,
    write_rows,
)
from captioner.config import ResourceConfig
from captioner.examples import FeatureSet, gather
from captioner.feature_plan import STAMPED, FeaturePlan
from captioner.features import FeatureCache
from captioner.progress import progress
from captioner.resources import Allocation, Cluster, allocate
from captioner.sources.faults import output_errors

if TYPE_CHECKING:
    from captioner.model.bundle import BundleDescription  # not at run time: write tasks import this module, not torch

__all__ = ["compute_features"]

log = logging.getLogger("captioner")

_CALLS = 2  # one call's rows are copied to the device while another's are computed
_PARTS = 64  # parts of a job whose size lies between the next two: a crash costs at most this share of the work
_PART_ROWS = (256, 16_384)


def compute_features(
    plan: FeaturePlan, model: "BundleDescription", resources: ResourceConfig, cluster: Cluster
) -> FeatureSet:
    """Return the features of all images of the labels, having computed those that were missing.

    Runs inside `joined_cluster`. A run that was cut goes on from the parts that it left. Raises InputError when more
    images failed than `--max-failed-share` allows, ResourceError when the cluster is too small, JobError.
    """
    log.info("features cache=%s missing=%d", plan.cache.url, len(plan.missing))
    with output_errors(plan.cache.url):
        if len(plan.missing):
            plan.cache.claim()
            try:
                _compute(plan, model, resources, cluster)
            finally:
                plan.clear()  # whatever came of it: a URI may hold a signature
        return gather(plan, model.projector.num_features)


def _compute(plan: FeaturePlan, model: "BundleDescription", resources: ResourceConfig, cluster: Cluster) -> None:
    """Compute what is missing and put it into the cache."""
    allocation = allocate(resources, cluster, len(plan.missing))
    check_device(plan.model.device, allocation)
    sink = WriteFeatures(plan.cache, _rows_per_part(len(plan.missing)))
    source = ReadSlices(plan.reader, plan.slices())
    before = plan.cache.num_written()

    def num_written() -> int:
        return plan.cache.num_written() - before

    with (
        progress(len(plan.missing), num_written, plan.cache.url, partial(shortage, allocation)),
        making_room(allocation, cluster),
        job_errors(),
        redirect_stdout(sys.stderr),
    ):
        write_rows(_featured(source, plan, model, allocation), sink, allocation)


def _rows_per_part(num_rows: int) -> int:
    fewest, most = _PART_ROWS
    return min(most, max(fewest, -(-num_rows // _PARTS)))


def _featured(source: ReadSlices, plan: FeaturePlan, model: "BundleDescription", allocation: Allocation) -> Dataset:
    """Return the stream of features, not yet running."""
    from captioner.feature_worker import FeatureWorker  # here, not above: write tasks import this module, not torch

    decoder = {"config": plan.job, "preprocessing": model.preprocessing, "kept": STAMPED}
    featured: Dataset = decode_slices(source, decoder, allocation).map_batches(
        guarded(FeatureWorker),
        fn_constructor_kwargs={
            "clip": model.clip,
            "model": plan.model,
            "storage_options": dict(plan.clip_options) or None,
            "num_threads": allocation.torch_threads,
        },
        batch_size=256,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=worker_pool(allocation.workers, _CALLS),
        num_cpus=allocation.worker_cpus,
        num_gpus=allocation.worker_gpus,
        **RETRIES,
    )
    return featured


class WriteFeatures(Datasink[None]):
    """Writes parts of a feature cache."""

    def __init__(self, cache: FeatureCache, rows_per_part: int) -> None:
        self._cache = cache
        self._rows_per_part = rows_per_part

    @property
    def min_rows_per_write(self) -> int:
        """Rows of a part; Ray gives at least as many, and fewer only at the end."""
        return self._rows_per_part

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        """Write the rows of one task; the name comes from the rows, so that twice is once."""
        del ctx
        rows = one_table(blocks)
        if rows is not None:
            self._cache.write(rows)
