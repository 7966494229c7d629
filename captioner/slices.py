"""What one read task reads: some rows of one unit, less those that are done.

Torch-free, like everything that a read task imports: its process would otherwise start seconds later.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.config import CaptionJobConfig
from captioner.rows import MAX_UNIT_ROWS
from captioner.sources import Columns, Limits, Unit, read_unit, save_count
from captioner.stopping import StopFile

__all__ = ["BLOCK_ROWS", "Slice", "SliceReader", "cut", "listing_rows"]

BLOCK_ROWS = 256  # images of one decode call
_LIGHT_BLOCKS = 8  # most blocks of URIs that one task reads
_LISTING_TASKS = 500  # keep every worker busy; more only cost: a task takes as long as dozens of small images
_USUAL_TAR_BYTES, _USUAL_IMAGE_BYTES = 1 << 30, 64 << 10
_LIGHT_ROW_BYTES = 4096  # a Parquet row below this holds a URI, not an image, so that many fit one block


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows of one unit that one read task reads: positions `start` to `stop`, less those that are done."""

    unit: Unit
    start: int = 0
    stop: int | None = None
    """First position that is not to be read; None for the unit's end."""

    done: np.ndarray | None = None
    """bool[N], true where position start + n is not to be read; further ones are. None: nothing is done."""

    attempts: Mapping[int, int]
    """Position -> attempts so far, of rows that failed before."""

    @property
    def num_left(self) -> int | None:
        """Rows to read; None when nobody has counted the unit."""
        if self.stop is None:
            return None
        return self.stop - self.start - (0 if self.done is None else int(self.done.sum()))

    @property
    def num_expected(self) -> int:
        """Rows to read; guessed from the size of a tar that nobody has counted."""
        if self.num_left is not None:
            return self.num_left
        guess = (self.unit.size_bytes or _USUAL_TAR_BYTES) // _USUAL_IMAGE_BYTES
        return max(0, guess - (0 if self.done is None else int(self.done.sum())))


def listing_rows(num_images: int) -> int:
    """Return how many rows of its listing one task of a job over so many images reads: whole blocks."""
    return BLOCK_ROWS * min(_LIGHT_BLOCKS, max(1, num_images // (BLOCK_ROWS * _LISTING_TASKS)))


def cut(
    unit: Unit, stop: int | None, finished: np.ndarray, attempts: Mapping[int, int], num_listed: int = BLOCK_ROWS
) -> Iterator[Slice]:
    """Yield the slices of one unit that have rows left; of a listing of `num_listed` rows each."""
    if stop is None:
        yield Slice(unit=unit, done=finished if finished.any() else None, attempts=attempts)
        return
    step = num_listed if unit.kind == "listing" else _slice_rows(unit) or max(stop, 1)
    tried: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for position, count in attempts.items():
        tried[position // step * step][position] = count
    for start in range(0, stop, step):
        end = min(stop, start + step)
        here = finished[start:end]
        if not here.all():
            yield Slice(unit=unit, start=start, stop=end, done=here if here.any() else None, attempts=tried[start])


def _slice_rows(unit: Unit) -> int | None:
    """Return how many rows of a file one task reads; None for all, where to skip rows would mean to read them."""
    is_light = unit.kind == "parquet" and unit.num_rows and (unit.size_bytes or 0) / unit.num_rows < _LIGHT_ROW_BYTES
    return _LIGHT_BLOCKS * BLOCK_ROWS if is_light else None


@dataclass(frozen=True, kw_only=True)
class SliceReader:
    """Reads the slices of one job, in any process."""

    config: CaptionJobConfig
    columns: Columns
    run_folder: str
    output_options: Mapping[str, Any]
    stop: StopFile | None = None
    """What says that nothing more is to be read."""

    def read(self, piece: Slice) -> Iterator[pa.Table]:
        """Yield the rows of a slice that are left, with the number of the attempt that this run makes.

        Notes how many rows a tar has once it is known. Ends where the job is to stop.
        """
        tables = self._tables(piece)
        while not (self.stop and self.stop.is_there()) and (table := next(tables, None)) is not None:
            yield _with_attempts(table, piece.attempts)

    def _tables(self, piece: Slice) -> Iterator[pa.Table]:
        limits = Limits(
            rows_per_block=BLOCK_ROWS, max_image_bytes=self.config.image.max_image_bytes, stop_at=piece.stop
        )
        return read_unit(
            piece.unit,
            self.columns,
            self.config.input,
            run_folder=self.run_folder,
            output_options=self.output_options,
            limits=limits,
            done=_finished(piece),
            on_end=partial(self._note_count, piece.unit),
        )

    def _note_count(self, unit: Unit, num_rows: int) -> None:
        if unit.num_rows is None:
            save_count(unit.ordinal, num_rows, self.run_folder, self.output_options)


def _finished(piece: Slice) -> np.ndarray:
    """Return bool[N], true where a position of the unit is not to be read."""
    here = np.empty(0, bool) if piece.done is None else piece.done
    return np.concatenate([np.ones(piece.start, bool), here])


def _with_attempts(table: pa.Table, attempts: Mapping[int, int]) -> pa.Table:
    if not attempts:
        return table
    positions = table.column("key").to_numpy() & (MAX_UNIT_ROWS - 1)
    numbers = pa.array([attempts.get(int(position), 0) + 1 for position in positions], pa.int32())
    index = table.schema.get_field_index("attempt")
    return table.set_column(index, table.schema.field(index), numbers)
