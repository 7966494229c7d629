"""Where rows enter Ray Data and leave it: slices of the input as read tasks, parts of a table as write tasks.

Both tasks import this module, so that it brings no torch. Knows no pool; how rows are read is in `inputs`, how they are
stored in `tables` and `training.features`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import ray
from ray.data import Dataset
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask, WriteResult

from captioner.captioning.resources import Allocation
from captioner.cluster.session import OFF_MODEL_SELECTOR
from captioner.cluster.supervision import reporting_task_errors
from captioner.inputs.slices import Slice
from captioner.tables import PartSummary, Stamp

if TYPE_CHECKING:
    from captioner.captioning.plan import Plan
    from captioner.training.features.features import FeatureCache

__all__ = ["ReadSlices", "WriteFeatures", "WriteParts", "concat_rows", "source_rows", "write_rows"]


class Reader(Protocol):
    """What reads a slice, in any process: a `SliceReader`, or what wraps one."""

    def read(self, piece: Any) -> Iterator[pa.Table]:
        """Yield the rows of a slice."""


class ReadSlices(Datasource):
    """The planned slices as Ray read tasks, one each. registry: learns what they raise."""

    def __init__(self, reader: Reader, slices: Sequence[Slice], registry: Any = None) -> None:
        self._reader = reader
        self._slices = slices
        self._registry = registry

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
        """Return a task for each slice, whatever parallelism Ray asks for: slices are cut to be read in parallel."""
        del parallelism, data_context
        return [
            ReadTask(
                _ReadSlice(self._reader, piece, self._registry),
                BlockMetadata(num_rows=piece.num_left, size_bytes=None, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for piece in self._slices
        ]


@dataclass(frozen=True)
class _ReadSlice:
    """Reads one slice, in a Ray task."""

    reader: Reader
    piece: Slice
    registry: Any

    def __call__(self) -> Iterator[pa.Table]:
        with reporting_task_errors(self.registry):
            yield from self.reader.read(self.piece)


def source_rows(source: ReadSlices, allocation: Allocation) -> Dataset:
    """Return the stream of rows that a source reads, not yet running."""
    rows: Dataset = ray.data.read_datasource(
        source,
        num_cpus=allocation.read_cpus,
        label_selector=OFF_MODEL_SELECTOR,
        concurrency=min(allocation.num_readers, source.num_slices),
        override_num_blocks=source.num_slices,  # Ray splits blocks that are fewer than it would like
    )
    return rows


def write_rows(rows: Dataset, sink: Datasink[Any], allocation: Allocation) -> None:
    """Run the stream into the sink."""
    task = {"num_cpus": allocation.write_cpus, "label_selector": OFF_MODEL_SELECTOR}
    rows.write_datasink(sink, ray_remote_args=task, concurrency=allocation.num_writers)


def concat_rows(blocks: Iterable[pa.Table]) -> pa.Table | None:
    """Return the rows of a write task, None if it has none. A slice without rows is a block without columns."""
    filled = [block for block in blocks if block.num_rows]
    return pa.concat_tables(filled) if filled else None


class WriteParts(Datasink[PartSummary]):
    """Writes parts of the caption table: a file for the captions of a task's rows and one for the failures, and so for
    each prompt that was added."""

    def __init__(self, plan: "Plan", stamp: Stamp, registry: Any) -> None:
        self._table = plan.table
        self._stamp = stamp
        self._kept, self._families = plan.frozen.columns.kept, plan.families
        self._rows_per_part = plan.rows_per_part
        self._limit = plan.failure_limit
        self._registry = registry
        self.parts: list[PartSummary] = []

    @property
    def min_rows_per_write(self) -> int:
        """Rows of a part; Ray gives at least as many, and fewer only at the end."""
        return self._rows_per_part

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> PartSummary:
        """Write the rows of one task. The names of the files come from the rows, so a retry overwrites its own.

        Raises JobError when more images of the run have failed than `--max-failed-share` allows.
        """
        del ctx
        with reporting_task_errors(self._registry):
            return self._write(concat_rows(blocks))

    def _write(self, rows: pa.Table | None) -> PartSummary:
        if rows is None:
            return PartSummary(0, {}, 0)
        part = self._table.write(rows, self._stamp, self._kept, self._families)
        if part.failed and self._limit.is_set:
            run_id, folders = self._stamp.run_id, [family.failures for family in self._families]
            if self._limit.is_exceeded(self._table.num_written(run_id, folders)):  # by names: each task asks
                self._limit.check(self._table.failed_by_reason(run_id, folders))
        return part

    def on_write_complete(self, write_result: WriteResult[PartSummary]) -> None:
        """Keep the summaries for the driver."""
        self.parts = list(write_result.write_returns)


class WriteFeatures(Datasink[None]):
    """Writes parts of a feature cache."""

    def __init__(self, cache: "FeatureCache", rows_per_part: int, registry: Any) -> None:
        self._cache = cache
        self._rows_per_part = rows_per_part
        self._registry = registry

    @property
    def min_rows_per_write(self) -> int:
        """Rows of a part; Ray gives at least as many, and fewer only at the end."""
        return self._rows_per_part

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        """Write the rows of one task. The name of the file comes from the rows, so a retry overwrites its own."""
        del ctx
        with reporting_task_errors(self._registry):
            rows = concat_rows(blocks)
            if rows is not None:
                self._cache.write(rows)
