"""The caption job on Ray Data: read -> decode -> caption -> write, streaming.

    slices -> ReadSlices -> DecodeWorker pool (CPU) -> CaptionWorker pool (GPU) -> WriteParts

One of the two modules that import ray. Knows how rows move and what each stage reserves; what is done to them is in
`worker`, what is left to do in `plan`, how it is stored in `tables`.
"""

import logging
import os
import platform
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask, WriteResult
from tqdm import tqdm

from captioner.config import CaptionJobConfig
from captioner.errors import CaptionerError, JobError
from captioner.plan import Plan, Slice, output_options, plan_job
from captioner.resources import Allocation, Cluster, allocate
from captioner.rows import MAX_UNIT_ROWS
from captioner.sources import Limits, read_unit
from captioner.sources.urls import redact, scheme
from captioner.tables import CaptionTable, PartSummary, Stamp
from captioner.worker import CaptionWorker, DecodeWorker

__all__ = ["caption_images"]

log = logging.getLogger("captioner")

_TARGET_BLOCK_BYTES = 32 << 20  # 200 pixel arrays at 224 px: work starts at once, memory stays flat
_DECODE_ROWS = 256
_CAPTION_CALLS = 4  # calls an actor serves at once: they share one engine, so that its slots stay full
_DECODE_CALLS = 2  # one fetches while the other decodes
_ATTEMPTS = 3  # of a worker's task; Ray's default is to try for ever what kills its worker
_ACTOR_INIT_ATTEMPTS = 3


def caption_images(config: CaptionJobConfig) -> Mapping[str, Any]:
    """Run the job, or for a dry run print its plan; return the summary whose fields the README lists.

    Raises UsageError before anything is started for what cannot run, JobError when the job itself fails.
    """
    plan = plan_job(config, _report_listing)
    for line in plan.lines():
        print(line, file=sys.stderr if not config.dry_run else sys.stdout)  # noqa: T201
    if config.dry_run:
        return _planned(plan)
    start = time.monotonic()
    parts = _run(plan) if plan.slices else []
    return _summary(plan, parts, time.monotonic() - start)


def _run(plan: Plan) -> list[PartSummary]:
    """Caption what is left and return what was written, part by part."""
    run_id = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + secrets.token_hex(2)
    stamp = Stamp(run_id, plan.table.digest)
    with _cluster() as cluster:
        allocation = allocate(plan.config.resources, cluster)
        plan.table.record(run_id, _facts(plan, allocation))
        _announce(allocation, cluster)
        sink = WriteParts(plan, stamp)
        with _progress(plan, run_id), _job_errors():
            captioned = _captioned(plan, allocation)
            captioned.write_datasink(
                sink, ray_remote_args={"num_cpus": allocation.task_cpus}, concurrency=allocation.num_writers
            )
    return sink.parts


def _captioned(plan: Plan, allocation: Allocation) -> Dataset:
    """Return the stream of captioned rows, not yet running."""
    config, kept = plan.config, plan.frozen.columns.kept
    rows = ray.data.read_datasource(ReadSlices(plan), num_cpus=allocation.task_cpus, concurrency=allocation.num_readers)
    decoded = rows.map_batches(
        DecodeWorker,
        fn_constructor_kwargs={"config": config, "preprocessing": plan.model.preprocessing, "kept": kept},
        batch_size=_DECODE_ROWS,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=_pool(allocation.decoders, _DECODE_CALLS),
        num_cpus=allocation.decoder_cpus,
        max_restarts=_ATTEMPTS,
        max_task_retries=_ATTEMPTS,
    )
    return decoded.map_batches(
        CaptionWorker,
        fn_constructor_kwargs={"config": config, "kept": kept, "num_threads": allocation.torch_threads},
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=_pool(allocation.workers, _CAPTION_CALLS),
        num_cpus=allocation.worker_cpus,
        num_gpus=allocation.worker_gpus,
        max_restarts=_ATTEMPTS,
        max_task_retries=_ATTEMPTS,
    )


def _pool(size: tuple[int, int], calls: int) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        min_size=size[0],
        max_size=size[1],
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=2 * calls,  # a pool grows only when twice as many wait as run
        enable_true_multi_threading=True,
    )


class ReadSlices(Datasource):
    """The planned slices as Ray read tasks, one each."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def get_name(self) -> str:
        """What the dashboard calls this stage."""
        return "Images"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: a URI weighs nothing beside its image."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return a task for each slice, whatever parallelism Ray asks for: slices are cut to be run at the same time."""
        del parallelism, data_context
        plan = ray.put(_ReadPlan.of(self._plan))
        return [
            ReadTask(
                _Read(piece, plan),
                BlockMetadata(num_rows=piece.num_left, size_bytes=None, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for piece in self._plan.slices
        ]


@dataclass(frozen=True)
class _ReadPlan:
    """What every read task needs, sent to each node once."""

    config: CaptionJobConfig
    columns: Any
    run_folder: str
    options: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Plan) -> "_ReadPlan":
        return cls(plan.config, plan.frozen.columns, plan.table.run_folder, output_options(plan.config))


@dataclass(frozen=True)
class _Read:
    """Reads one slice; runs in a Ray task."""

    piece: Slice
    plan: Any

    def __call__(self) -> Iterator[pa.Table]:
        plan: _ReadPlan = ray.get(self.plan)
        yield from read_slice(self.piece, plan)


class WriteParts(Datasink[PartSummary]):
    """Writes parts of the caption table; one file each for the captions and the failures of a task's rows."""

    def __init__(self, plan: Plan, stamp: Stamp) -> None:
        self._url = plan.table.url
        self._options = dict(output_options(plan.config))
        self._kept = plan.frozen.columns.kept
        self._rows_per_part = plan.rows_per_part
        self._stamp = stamp
        self.parts: list[PartSummary] = []

    @property
    def min_rows_per_write(self) -> int:
        """Rows of a part; Ray gives at least as many, and fewer only at the end."""
        return self._rows_per_part

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> PartSummary:
        """Write the rows of one task. Done twice for the same rows, it is done once: the name comes from the rows."""
        del ctx
        return CaptionTable(self._url, self._options).write(pa.concat_tables(blocks), self._stamp, self._kept)

    def on_write_complete(self, write_result: WriteResult[PartSummary]) -> None:
        """Keep the summaries for the driver."""
        self.parts = list(write_result.write_returns)


def read_slice(piece: Slice, plan: "_ReadPlan") -> Iterator[pa.Table]:
    """Yield the rows of a slice that are left, with the number of the attempt that this run makes."""
    finished = np.zeros(piece.start + (0 if piece.done is None else len(piece.done)), bool)
    finished[: piece.start] = True
    if piece.done is not None:
        finished[piece.start :] = piece.done
    limits = Limits(stop_at=piece.stop, rows_per_block=_DECODE_ROWS)
    tables = read_unit(
        piece.unit,
        plan.columns,
        plan.config.input,
        run_folder=plan.run_folder,
        output_options=plan.options,
        limits=limits,
        done=finished,
    )
    for table in tables:
        yield _with_attempts(table, piece.attempts)


def _with_attempts(table: pa.Table, attempts: Mapping[int, int]) -> pa.Table:
    if not attempts:
        return table
    positions = table.column("key").to_numpy() & (MAX_UNIT_ROWS - 1)
    numbers = pa.array([attempts.get(int(position), 0) + 1 for position in positions], pa.int32())
    index = table.schema.get_field_index("attempt")
    return table.set_column(index, table.schema.field(index), numbers)


@contextmanager
def _cluster() -> Iterator[Cluster]:
    """Join the cluster of RAY_ADDRESS, or start a local one for the time of the job."""
    address = os.environ.get("RAY_ADDRESS")
    ray.init(
        address=address or "local",
        include_dashboard=False if not address else None,
        logging_level=logging.WARNING,
        log_to_driver=True,
    )
    context = DataContext.get_current()
    context.target_max_block_size = _TARGET_BLOCK_BYTES
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        total = ray.cluster_resources()
        yield Cluster(cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0), can_grow=bool(address))
    finally:
        ray.shutdown()


@contextmanager
def _job_errors() -> Iterator[None]:
    """Turn what a worker raised into one error of ours that names its cause."""
    try:
        yield
    except CaptionerError:
        raise
    except (ray.exceptions.RayError, ray.data.exceptions.SystemException) as error:
        cause = _cause(error)
        if isinstance(cause, CaptionerError):
            raise cause from error
        raise JobError(f"the job stopped: {type(cause).__name__}: {cause}") from error


def _cause(error: BaseException) -> BaseException:
    """Return the innermost exception that Ray wrapped."""
    inner = getattr(error, "cause", None) or error.__cause__
    return _cause(inner) if isinstance(inner, BaseException) else error


@contextmanager
def _progress(plan: Plan, run_id: str) -> Iterator[None]:
    """Show on stderr how many rows are on disk: a bar on a terminal, a line a minute elsewhere."""
    finished = threading.Event()
    show = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=show, args=(plan, run_id, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _bar(plan: Plan, run_id: str, finished: threading.Event) -> None:
    is_local = scheme(plan.table.url) == "file"
    with tqdm(total=plan.num_left, unit="image", smoothing=0.1, file=sys.stderr) as bar:
        while not finished.wait(1 if is_local else 10):
            bar.update(plan.table.num_written(run_id) - bar.n)
        bar.update(plan.table.num_written(run_id) - bar.n)


def _lines(plan: Plan, run_id: str, finished: threading.Event) -> None:
    start = time.monotonic()
    while not finished.wait(60):
        written, seconds = plan.table.num_written(run_id), time.monotonic() - start
        log.info("written=%d left=%s images_per_s=%.1f", written, _left(plan, written), written / seconds)


def _left(plan: Plan, written: int) -> str:
    return "unknown" if plan.num_left is None else str(plan.num_left - written)


def _report_listing(num_images: int) -> None:
    log.info("listed=%d", num_images)


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


def _facts(plan: Plan, allocation: Allocation) -> dict[str, Any]:
    """Return what `_run/runs/` keeps of this invocation; options of stores may hold secrets and are left out."""
    config = asdict(plan.config)
    for name in ("storage_options", "output_storage_options"):
        config["input"][name] = sorted(config["input"][name] or {})
    config["input_path"], config["output"] = redact(plan.config.input_path), redact(plan.config.output)
    packages = ("captioner", "ray", "torch", "transformers", "pyarrow", "pillow")
    return {
        "config": config,
        "model": {"name": plan.model.name, "fingerprint": plan.model.fingerprint},
        "allocation": asdict(allocation),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _planned(plan: Plan) -> dict[str, Any]:
    """Return the summary of a dry run."""
    return {
        "dry_run": True,
        "images": plan.frozen.num_images,
        "units": len(plan.frozen.units),
        "left": plan.num_left,
        "skipped_done": plan.num_skipped,
        "model": plan.model.name,
        "output": redact(plan.table.url),
    }


def _summary(plan: Plan, parts: list[PartSummary], seconds: float) -> dict[str, Any]:
    captioned = sum(part.captioned for part in parts)
    failed = sum((Counter(part.failed_by_reason) for part in parts), Counter[str]())
    num_tokens = sum(part.num_tokens for part in parts)
    read = captioned + failed.total()
    return {
        "read": read,
        "captioned": captioned,
        "failed": failed.total(),
        "failed_by_reason": dict(failed),
        "skipped_done": plan.num_skipped,
        "seconds": round(seconds, 2),
        "images_per_s": round(read / seconds, 2) if seconds else 0.0,
        "tokens_per_s": round(num_tokens / seconds, 2) if seconds else 0.0,
        "output": redact(plan.table.url),
    }
