"""The caption job on Ray Data: read -> decode -> caption -> write, streaming.

    slices -> ReadSlices -> DecodeWorker pool (CPU) -> CaptionWorker pool (GPU) -> WriteParts

One of the modules that import ray. Knows how rows move and what each stage reserves; what is done to them is in
`worker`, what is left to do in `plan`, how it is stored in `tables`.
"""

import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask, WriteResult
from ray.experimental import internal_kv
from ray.util import metrics as ray_metrics
from ray.util.annotations import RayDeprecationWarning

from captioner.config import CaptionJobConfig
from captioner.decode_worker import DecodeWorker
from captioner.errors import ConfigError, JobError
from captioner.machine import num_cpus
from captioner.making_room import Placed, who_yields
from captioner.progress import progress
from captioner.resources import Allocation, Cluster, allocate, missing
from captioner.restarts import Start, next_start
from captioner.slices import BLOCK_ROWS, Slice
from captioner.sources.faults import output_errors
from captioner.stopping import Stop, stopping
from captioner.summary import facts, farewell, planned, predicted, summarize
from captioner.tables import PartSummary, Stamp, mend_late
from captioner.telemetry import METRICS
from captioner.tracebacks import error_in
from captioner.vigil import vigil

if TYPE_CHECKING:
    from captioner.plan import Plan

__all__ = [
    "OFF_MODEL_NODES",
    "RETRIES",
    "ReadSlices",
    "caption_images",
    "check_device",
    "cluster_of",
    "decode_slices",
    "guarded",
    "job_errors",
    "joined_cluster",
    "making_room",
    "one_table",
    "shortage",
    "worker_pool",
    "write_rows",
]

log = logging.getLogger("captioner")

_SMALL_IMAGE_BYTES = 16 << 10  # of a tar that nobody has counted: few images are smaller
_TARGET_BLOCK_BYTES = 32 << 20  # 200 pixel arrays at 224 px: work starts at once, memory stays flat
_DECODE_CALLS = 2  # one fetches while the other decodes
_MAX_INIT_DEATHS = 1  # in a row, of workers that could not load: another one may, on another node
_INIT_RETRIES = 1  # of a load that raised, in its process: Ray would not restart that worker, and its tasks end the job
# A spot node takes its workers with it, as often as it likes; `guarded` ends what dies by itself. Until Ray knows that
# a node is gone, every try of its tasks fails at once: a small number of tries is used up before.
RETRIES: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
_STAGE = re.compile(r"MapWorker\(MapBatches\((\w+)\)\)")  # what Ray calls the workers of one
_ROOM_EVERY_S = 10.0
_VITAL = ("raylet", "gcs_server")
_STAGE_LABEL = "captioner-stage"
# Ray keeps as many processes as there are CPUs: on a small machine each write task would start a Python of its own.
_LOCAL_CONFIG = {"num_workers_soft_limit": num_cpus() + 8}
OFF_MODEL_NODES = {_STAGE_LABEL: "!model"}  # nodes without the label are as good as any


def caption_images(config: CaptionJobConfig) -> Mapping[str, Any]:
    """Run the job, or for a dry run print its plan; return the summary whose fields the README lists.

    Raises UsageError before anything is started for what cannot run, JobError when the job itself fails.
    """
    from captioner.plan import plan_job  # here, not above: read and write tasks import this module, and no torch

    with output_errors(config.output), ExitStack() as held:  # what reads the input has turned its own into errors
        plan = plan_job(config, _report_listing, lambda table: held.enter_context(table.take_lease("caption")))
        for line in plan.lines():
            print(line, file=sys.stderr if not config.dry_run else sys.stdout)
        if config.dry_run:
            return planned(plan)
        with redirect_stdout(sys.stderr):  # Ray prints what happens to workers on stdout
            summary = _run(plan) if plan.slices else summarize(plan, [], 0.0)
        plan.failure_limit.check(summary["failed_by_reason"], summary["read"] + plan.num_skipped)
        for line in farewell(plan, summary):
            print(line, file=sys.stderr)
    return summary


def _run(plan: "Plan") -> dict[str, Any]:
    """Caption what is left and return the summary, which `_run/runs/` keeps beside the config and the versions."""
    start, started_at = time.monotonic(), time.time()
    assert plan.lease is not None
    run_id = plan.lease.run_id
    with joined_cluster() as cluster:
        allocation = allocate(plan.config.resources, cluster, plan.num_expected(_SMALL_IMAGE_BYTES))
        check_device(plan.config.model.device, allocation)
        known = facts(plan, allocation)
        plan.table.record(run_id, known)
        _announce(allocation, cluster)
        sink = WriteParts(plan, Stamp(run_id, plan.table.digest, is_leased=True))
        count, url = partial(plan.table.num_written, run_id), plan.table.url
        assert plan.stop_file is not None
        with (
            stopping(plan.stop_file, lambda: plan.lease is not None and plan.lease.is_lost) as stop,
            progress(plan.num_left, count, url, partial(shortage, allocation)),
            making_room(allocation, cluster),
            job_errors(),
        ):
            rows = _captioned(plan, allocation)
            rows.context.custom_execution_callback_classes = [_end_of_reading(stop)]
            write_rows(rows, sink, allocation)
        mend_late(plan.table, plan.done.parts.union(*(part.parts for part in sink.parts)), run_id)
        seconds = time.monotonic() - start
        num_read = sum(part.captioned + part.failed for part in sink.parts)
        expected = predicted(plan, allocation, cluster, num_read)
        summary = summarize(plan, sink.parts, seconds, started_at=started_at, predicted=expected)
        plan.table.record(run_id, known | {"summary": summary})
    if stop.is_asked and num_read < (plan.num_left or math.inf):
        raise KeyboardInterrupt
    return summary


def check_device(device: str, allocation: Allocation) -> None:
    """Raise ConfigError when a GPU is asked for and no worker gets one."""
    if device.startswith("cuda") and not allocation.worker_gpus:
        raise ConfigError(
            f"--device is {device}, but the workers get no GPU: there is none in the cluster, or --gpus-per-worker is"
            " 0; expected auto or cpu"
        )


def _captioned(plan: "Plan", allocation: Allocation) -> Dataset:
    """Return the stream of captioned rows, not yet running."""
    from captioner.worker import CaptionWorker  # here, not above: read and write tasks import this module, not torch

    config, kept = plan.config, plan.frozen.columns.kept
    decoded = decode_slices(
        ReadSlices(plan.reader, plan.slices),
        {"config": config, "preprocessing": plan.model.preprocessing, "kept": kept, "stop": plan.stop_file},
        allocation,
    )
    captioned: Dataset = decoded.map_batches(
        guarded(CaptionWorker),
        fn_constructor_kwargs={
            "config": config,
            "kept": kept,
            "num_threads": allocation.torch_threads,
            "recorder": RayRecorder(),
            "stop": plan.stop_file,
        },
        batch_size=BLOCK_ROWS,  # not None: Ray refuses that for GPUs
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=worker_pool(allocation.workers, allocation.caption_calls),
        num_cpus=allocation.worker_cpus,
        num_gpus=allocation.worker_gpus,
        **RETRIES,
    )
    return captioned


def _end_of_reading(stop: Stop) -> type[ExecutionCallback]:
    """Return what takes back, once the job is to stop, the read tasks that Ray has not begun: to begin each only for it
    to see that there is nothing to do takes longer than all the rest."""

    class EndOfReading(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            if stop.is_asked:
                for operator, state in executor._topology.items():
                    if isinstance(operator, InputDataBuffer):
                        state.output_queue.clear()

    return EndOfReading


def decode_slices(source: "ReadSlices", decoder: Mapping[str, Any], allocation: Allocation) -> Dataset:
    """Return the stream of decoded rows, not yet running; `decoder` is what a DecodeWorker is made with."""
    # Ray 2.60 deprecates passing options by the name that only remote functions know, and has no other way for these.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
    rows = ray.data.read_datasource(
        source,
        num_cpus=allocation.read_cpus,
        label_selector=OFF_MODEL_NODES,
        concurrency=min(allocation.num_readers, source.num_slices),
        override_num_blocks=source.num_slices,  # fewer than Ray would like are split into crumbs
    )
    decoded: Dataset = rows.map_batches(
        guarded(DecodeWorker),
        fn_constructor_kwargs=dict(decoder),
        batch_size=BLOCK_ROWS,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=worker_pool(allocation.decoders, _DECODE_CALLS),
        num_cpus=allocation.decoder_cpus,
        label_selector=OFF_MODEL_NODES,
        **RETRIES,
    )
    return decoded


def write_rows(rows: Dataset, sink: Datasink[Any], allocation: Allocation) -> None:
    """Run the stream into the sink."""
    # A limit is no wish: that a small job does not reach it is nothing to warn of.
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks for 'Write'", UserWarning)
    task = {"num_cpus": allocation.write_cpus, "label_selector": OFF_MODEL_NODES}
    rows.write_datasink(sink, ray_remote_args=task, concurrency=allocation.num_writers)


def one_table(blocks: Iterable[pa.Table]) -> pa.Table | None:
    """Return the rows of a write task, None without any: a slice of no rows arrives as a block of no columns."""
    filled = [block for block in blocks if block.num_rows]
    return pa.concat_tables(filled) if filled else None


def worker_pool(size: tuple[int, int], calls: int) -> ActorPoolStrategy:
    """Return a pool of (min, max) actors, each of which serves so many calls at once."""
    return ActorPoolStrategy(
        min_size=size[0],
        max_size=size[1],
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=2 * calls,  # a pool grows only when twice as many wait as run
        enable_true_multi_threading=True,
    )


def guarded(worker: type) -> type:
    """Return a class of the same name whose loading is given up where its processes die each time.

    What a worker's next process must know is kept in Ray's own store: it outlives processes and nodes.
    """

    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        context = ray.get_runtime_context()
        key = f"{_start_key(worker.__name__)} {context.get_actor_id()}"
        process = f"{os.getpid()} {context.get_node_id()}"
        last = Start.parse(internal_kv._internal_kv_get(key))
        start = next_start(last, process, context.get_node_id(), alive=_nodes_alive(), now=time.time())
        internal_kv._internal_kv_put(key, start.dump(), overwrite=True)
        worker.__init__(self, *args, **kwargs)  # type: ignore[misc]
        internal_kv._internal_kv_put(key, replace(start, loaded_at=time.time()).dump(), overwrite=True)

    return type(worker.__name__, (worker,), {"__init__": load})


class Reader(Protocol):
    """What reads a slice, in any process: a `SliceReader`, or what wraps one."""

    def read(self, piece: Any) -> Iterator[pa.Table]:
        """Yield the rows of a slice."""


class RayRecorder:
    """Records into Ray's metrics, in whichever process it has arrived."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def count(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter."""
        self._metric(name).inc(amount, labels)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metric(name).set(value)

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            kind = ray_metrics.Counter if METRICS[name].kind == "counter" else ray_metrics.Gauge
            self._made[name] = kind(name, METRICS[name].description, tag_keys=METRICS[name].labels)
        return self._made[name]


class ReadSlices(Datasource):
    """The planned slices as Ray read tasks, one each."""

    def __init__(self, reader: Reader, slices: Sequence[Slice]) -> None:
        self._reader = reader
        self._slices = slices

    @property
    def num_slices(self) -> int:
        """Read tasks there will be."""
        return len(self._slices)

    def get_name(self) -> str:
        """What the dashboard calls this stage."""
        return "Images"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: a URI weighs nothing beside its image."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return a task for each slice, whatever parallelism Ray asks for: they are cut to run at the same time."""
        del parallelism, data_context
        return [
            ReadTask(
                _Read(self._reader, piece),
                BlockMetadata(num_rows=piece.num_left, size_bytes=None, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for piece in self._slices
        ]


@dataclass(frozen=True)
class _Read:
    """Reads one slice, in a Ray task."""

    reader: Reader
    piece: Slice

    def __call__(self) -> Iterator[pa.Table]:
        return self.reader.read(self.piece)


class WriteParts(Datasink[PartSummary]):
    """Writes parts of the caption table; one file each for the captions and the failures of a task's rows."""

    def __init__(self, plan: "Plan", stamp: Stamp) -> None:
        self._table = plan.table
        self._stamp = stamp
        self._kept = plan.frozen.columns.kept
        self._rows_per_part = plan.rows_per_part
        self._limit = plan.failure_limit
        self.parts: list[PartSummary] = []

    @property
    def min_rows_per_write(self) -> int:
        """Rows of a part; Ray gives at least as many, and fewer only at the end."""
        return self._rows_per_part

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> PartSummary:
        """Write the rows of one task. Done twice for the same rows, it is done once: the name comes from the rows.

        Raises JobError when more images of the run have failed than may.
        """
        del ctx
        rows = one_table(blocks)
        if rows is None:
            return PartSummary(0, {}, 0)
        part = self._table.write(rows, self._stamp, self._kept)
        if part.failed and self._limit.is_set:
            self._limit.check(self._table.failed_by_reason(self._stamp.run_id))
        return part

    def on_write_complete(self, write_result: WriteResult[PartSummary]) -> None:
        """Keep the summaries for the driver."""
        self.parts = list(write_result.write_returns)


@contextmanager
def joined_cluster() -> Iterator[Cluster]:
    """Join the cluster of RAY_ADDRESS, or start a local one for the time of the job."""
    address = os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it says of an error, `job_errors` says in a line
    on_terminate = signal.getsignal(signal.SIGTERM)
    _begin_ray(address)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own exits at once, and says nothing
    context = DataContext.get_current()
    context.target_max_block_size = _TARGET_BLOCK_BYTES
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.max_consecutive_actor_init_deaths = _MAX_INIT_DEATHS
    context.actor_init_retry_on_errors, context.actor_init_max_retries = True, _INIT_RETRIES
    context.execution_no_progress_timeout_s = -1  # a job may wait for a GPU as long as it takes
    try:
        with vigil(_lost_process):
            yield cluster_of(ray.nodes(), _has_autoscaler())  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


def _begin_ray(address: str | None) -> None:
    """Join a cluster, or start a Ray of our own. Raises JobError where that fails."""
    own: dict[str, Any] = {} if address else {"include_dashboard": False, "_system_config": _LOCAL_CONFIG}
    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, **own)
    except Exception as error:  # of a timeout Ray makes just that
        where = f"the cluster of RAY_ADDRESS, {address}, was not joined" if address else "no local Ray could be started"
        wanted = "a head that runs there" if address else "a machine with CPU and memory to spare"
        raise JobError(f"{where}: {' '.join(str(error).split())[:300]}; expected {wanted}") from error


def _lost_process() -> str | None:
    """Name a process of our own local Ray that is gone, and that Ray itself would end this one for, a minute later."""
    node = ray._private.worker._global_node
    dead: list[str] = [] if node is None else [kind for kind, _ in node.dead_processes()]
    return next((f"the {kind} of the local Ray" for kind in dead if kind in _VITAL), None)


def cluster_of(nodes: Iterable[Mapping[str, Any]], can_grow: bool) -> Cluster:
    """Return what nodes as `ray.nodes()` tells them have together; the CPUs only of those that may decode."""
    alive = [node for node in nodes if node["Alive"]]
    cpus = _each([node for node in alive if node["Labels"].get(_STAGE_LABEL) != "model"], "CPU")
    gpus = _each(alive, "GPU")
    return Cluster(cpus=sum(cpus), gpus=sum(gpus), can_grow=can_grow, node_cpus=cpus, node_gpus=gpus)


def _each(nodes: Sequence[Mapping[str, Any]], resource: str) -> tuple[float, ...]:
    """Return how much each node has that has some."""
    return tuple(node["Resources"][resource] for node in nodes if resource in node["Resources"])


def _has_autoscaler() -> bool:
    """Say whether an autoscaler has taken part in this cluster's state: only then does it have a version."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return int(status.stats.autoscaler_version or 0) > 0


def shortage(allocation: Allocation) -> str:
    """Return what the job waits for, while not even one model worker can run."""
    total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    return missing(allocation, total, free, has_begun=_has_begun())


def _start_key(worker: str) -> str:
    return f"captioner-start {ray.get_runtime_context().get_job_id()} {worker}"


def _has_begun() -> bool:
    """Say whether a model worker of this job has ever had a place to load in."""
    starts: list[bytes] = internal_kv._internal_kv_list(_start_key(""))
    return any(DecodeWorker.__name__ not in key.decode() for key in starts)


@contextmanager
def making_room(allocation: Allocation, cluster: Cluster) -> Iterator[None]:
    """End a worker whose place a stage without any needs, where stages share CPUs and a lost node is not replaced."""
    if not allocation.worker_cpus or cluster.can_grow or len(cluster.node_cpus) < 2:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        before: Placed | None = None
        while not ended.wait(_ROOM_EVERY_S):
            now = who_yields(_workers(), _nodes_alive())
            if now and now == before:  # Ray has had its time to find a place
                log.info("a node is gone: one %s gives its place to a stage that has none", now.stage)
                core: Any = ray._private.worker.global_worker.core_worker  # type: ignore[attr-defined]
                core.kill_actor(ray.ActorID.from_hex(now.actor), False)  # it starts again once there is room
            before = now

    watcher = threading.Thread(target=watch, name="making room", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _workers() -> list[Placed]:
    """Return the workers of this job's stages that live or are to."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    table: Mapping[str, Mapping[str, Any]] = ray._private.state.actors(job_id=job)
    kinds = {actor: _STAGE.fullmatch(entry["ActorClassName"]) for actor, entry in table.items()}
    return [
        Placed(
            actor=actor,
            stage=kind[1],
            is_alive=table[actor]["State"] == "ALIVE",
            start=Start.parse(internal_kv._internal_kv_get(f"{_start_key(kind[1])} {actor}")),
        )
        for actor, kind in kinds.items()
        if kind and table[actor]["State"] != "DEAD"
    ]


def _nodes_alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


@contextmanager
def job_errors() -> Iterator[None]:
    """Turn what a worker raised into the error of ours that caused it, or into one that names the cause."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise error_in(str(error)) from error


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


def _report_listing(num_images: int) -> None:
    log.info("listed=%d", num_images)
