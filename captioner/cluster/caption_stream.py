"""The stream of the caption job on Ray Data: read -> decode -> caption -> write.

    slices -> ReadSlices -> DecodeWorker pool (CPU) -> CaptionWorker pool (GPU) -> WriteParts

Knows in which order a job takes its steps. What a worker does to rows is in `captioning`, how they are read and written
in `sources_and_sinks`, how workers are restarted in `supervision`. Brings no torch: a model worker imports it itself.
"""

import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.data import Dataset

from captioner.captioning.closing import interrupted_text
from captioner.captioning.number_format import check_dtype, resolved_dtype
from captioner.captioning.resources import Allocation, Cluster, allocate
from captioner.captioning.summary import prediction_for, run_record, summarize
from captioner.cluster.interrupts import StopRequest, stopping
from captioner.cluster.pools import check_device, decoded, rows_per_block, worker_pool
from captioner.cluster.progress import Progress
from captioner.cluster.ray_private import drop_unread_tasks
from captioner.cluster.recorder import RayRecorder
from captioner.cluster.session import joined_cluster
from captioner.cluster.sources_and_sinks import ReadSlices, WriteParts, source_rows, write_rows
from captioner.cluster.supervision import RETRIES, num_finished, supervised, supervision, wait_reason
from captioner.tables import PartSummary, Stamp, deduplicate_late_parts

if TYPE_CHECKING:
    from captioner.captioning.plan import Plan

__all__ = ["run"]

log = logging.getLogger("captioner")

MODEL_WORKER = "captioner.captioning.caption_worker:CaptionWorker"
"""The worker that captions, imported where it runs; benchmarks put another in its place."""

_SMALL_IMAGE_BYTES = 16 << 10  # of a tar that has not been counted: few images are smaller


def run(plan: "Plan", shown: Progress) -> dict[str, Any]:
    """Caption the images that are left and return the summary, which is also kept in `_run/runs/`."""
    start, started_at = time.monotonic(), time.time()
    assert plan.lease is not None
    assert plan.stop_file is not None
    run_id, table = plan.lease.run_id, plan.table
    with joined_cluster() as cluster:
        allocation = allocate(plan.config.resources, cluster, plan.num_expected(_SMALL_IMAGE_BYTES))
        check_device(plan.config.model.device, allocation)
        check_dtype(table, resolved_dtype(plan.config.model, allocation.worker_gpus))
        known = run_record(plan, allocation)
        table.record(run_id, known)
        _announce(allocation, cluster)
        is_lost = partial(getattr, plan.lease, "is_lost")
        drain_s = plan.config.resources.drain_s
        with stopping(plan.stop_file, is_lost, drain_s, num_finished=lambda: shown.last_seen) as stop:
            parts = _stream(plan, allocation, cluster, stop, shown)
        shown.phase = "ending Ray"
        deduplicate_late_parts(table, plan.done.parts.union(*(part.parts for part in parts)), run_id)
        num_read = sum(part.captioned + part.failed for part in parts)
        shown.finish(num_read)
        expected = prediction_for(plan, allocation, cluster, num_read)
        seconds = time.monotonic() - start
        summary = summarize(plan, parts, seconds, started_at=started_at, predicted=expected)
        is_cut = stop.is_made and num_read < (plan.num_left or math.inf)
        table.record(run_id, known | {"summary": summary, "interrupted": is_cut})
    if is_cut:
        raise KeyboardInterrupt(interrupted_text(plan, summary))
    return summary


def _stream(
    plan: "Plan", allocation: Allocation, cluster: Cluster, stop: StopRequest, shown: Progress
) -> list[PartSummary]:
    """Read, decode, caption and write the images that are left; return the parts that were written."""
    assert plan.lease is not None
    run_id = plan.lease.run_id
    with (
        supervision(allocation, cluster) as registry,
        shown.counting(partial(num_finished, registry), partial(wait_reason, allocation, registry)),
    ):
        shown.phase = "loading the model"
        sink = WriteParts(plan, Stamp(run_id, plan.table.digest, is_leased=True), registry)
        rows = _captioned(plan, allocation, registry)
        drop_unread_tasks(rows, stop)
        write_rows(rows, sink, allocation)
    return sink.parts


def _captioned(plan: "Plan", allocation: Allocation, registry: Any) -> Dataset:
    """Return the stream of captioned rows, not yet running."""
    config, kept = plan.config, plan.row_columns
    rows = source_rows(ReadSlices(plan.reader, plan.slices, registry), allocation)
    decoder = {"config": config, "preprocessing": plan.model.preprocessing, "kept": kept, "stop": plan.stop_file}
    captioned: Dataset = decoded(rows, decoder, allocation, registry).map_batches(
        supervised(MODEL_WORKER),
        fn_constructor_kwargs={
            "registry": registry,
            "config": config,
            "kept": kept,
            "prompts": plan.prompts,
            "num_threads": allocation.torch_threads,
            "recorder": RayRecorder(registry),
            "stop": plan.stop_file,
        },
        batch_size=rows_per_block(plan.model.preprocessing),  # not None: Ray refuses that for GPUs
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=worker_pool(allocation.workers, allocation.caption_calls),
        num_cpus=allocation.worker_cpus,
        num_gpus=allocation.worker_gpus,
        **RETRIES,
    )
    return captioned


def _announce(allocation: Allocation, cluster: Cluster) -> None:
    if not allocation.worker_gpus:
        log.info("device=cpu reason=%s", "no GPU in the cluster" if not cluster.gpus else "--gpus-per-worker 0")
    log.info(
        "workers=%s worker_gpus=%g worker_cpus=%g decoders=%s decoder_cpus=%g",
        "{}:{}".format(*allocation.workers),
        allocation.worker_gpus,
        allocation.worker_cpus,
        "{}:{}".format(*allocation.decoders),
        allocation.decoder_cpus,
    )
