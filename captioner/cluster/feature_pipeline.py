"""Feature extraction on Ray Data: read -> decode -> CLIP -> write, streaming.

    slices -> ReadSlices -> DecodeWorker pool (CPU) -> FeatureWorker pool (GPU) -> WriteFeatures

A fit that computes features in its steps has its images decoded once all the same, without a FeatureWorker, so that
those that cannot be are counted and left out before the first step. The bytes of images inside files are then kept: a
step reads any of them.

The first half is that of the caption job, so that features come from the same pixels as captions. Which features are
missing and how they are kept is in `training.features`.
"""

import logging
import sys
from contextlib import redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.data import Dataset

from captioner.captioning.resources import Allocation, Cluster, allocate
from captioner.cluster.pools import check_device, decoded, worker_pool
from captioner.cluster.progress import progress
from captioner.cluster.sources_and_sinks import ReadSlices, WriteFeatures, source_rows, write_rows
from captioner.cluster.supervision import RETRIES, supervised, supervision, wait_reason
from captioner.config import ResourceConfig
from captioner.storage.faults import output_errors
from captioner.training.features.examples import FeatureSet, gather
from captioner.training.features.feature_plan import FeaturePlan

if TYPE_CHECKING:
    from captioner.model.bundle import BundleDescription

__all__ = ["compute_features"]

log = logging.getLogger("captioner")

_CALLS = 2  # rows of one are copied to the device while those of the other are computed
_PARTS = 64  # of a job, within the limits below: a crash costs at most one part of each writer
_PART_ROWS = (256, 16_384)  # fewest and most
_MOST_KEPT = 1024  # images of a part whose bytes are kept


def compute_features(
    plan: FeaturePlan, model: "BundleDescription", resources: ResourceConfig, cluster: Cluster
) -> FeatureSet:
    """Return the features of all images of the labels, having computed those that were missing.

    Runs inside `joined_cluster`. After an interrupted run it computes only the rest. Raises InputError when
    more images failed than `--max-failed-share` allows, ResourceError when the cluster is too small, JobError.
    """
    log.info("features cache=%s missing=%d", plan.cache.url, len(plan.missing))
    with output_errors(plan.cache.url):
        with plan.computing():
            if len(plan.missing):
                _compute(plan, model, resources, cluster)
        return gather(plan, model.projector.num_features if plan.keeps_features else 0)


def _compute(plan: FeaturePlan, model: "BundleDescription", resources: ResourceConfig, cluster: Cluster) -> None:
    """Compute the missing features and put them into the cache."""
    allocation = allocate(resources, cluster, len(plan.missing))
    check_device(plan.model.device, allocation)
    before = plan.cache.num_written()

    def num_written() -> int:
        return plan.cache.num_written() - before

    with (
        supervision(allocation, cluster) as registry,
        progress(len(plan.missing)) as shown,
        shown.counting(num_written, partial(wait_reason, allocation, registry)),
        redirect_stdout(sys.stderr),
    ):
        sink = WriteFeatures(plan.cache, _rows_per_part(plan), registry)
        write_rows(_featured(plan, model, allocation, registry), sink, allocation)


def _rows_per_part(plan: FeaturePlan) -> int:
    fewest, most = _PART_ROWS
    return min(_MOST_KEPT if plan.cache.kept_images else most, max(fewest, -(-len(plan.missing) // _PARTS)))


def _featured(plan: FeaturePlan, model: "BundleDescription", allocation: Allocation, registry: Any) -> Dataset:
    """Return the stream of features, or of images that are only checked, not yet running."""
    rows = source_rows(ReadSlices(plan.reader, plan.slices(), registry), allocation)
    kept = {"kept": plan.kept_columns, "keeps_pixels": plan.keeps_features}
    decoder = {"config": plan.job, "preprocessing": model.preprocessing, **kept}
    images = decoded(rows, decoder, allocation, registry)
    if not plan.keeps_features:
        return images
    featured: Dataset = images.map_batches(
        supervised("captioner.training.features.feature_worker:FeatureWorker"),
        fn_constructor_kwargs={
            "registry": registry,
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
