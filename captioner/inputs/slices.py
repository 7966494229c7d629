"""Slices of units: the rows of one unit that one read task reads, without those that are done.

Torch-free, like everything that a read task imports: with torch its process would start seconds later.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from captioner.config import CaptionJobConfig
from captioner.inputs import Columns, Limits, Unit, read_unit, save_count, save_further
from captioner.schema import ASKED, MAX_UNIT_ROWS
from captioner.storage import Place
from captioner.storage.stop_file import StopFile

__all__ = ["BLOCK_ROWS", "Slice", "SliceReader", "cut", "listing_rows"]

BLOCK_ROWS = 256  # images of one decode call
_LIGHT_BLOCKS = 8  # the most blocks of URIs that one task reads
_LISTING_TASKS = 500  # enough to keep every worker busy; a task costs as much as dozens of small images
_UNIT_TASKS = 500  # each reads the row group up to its own rows
_USUAL_TAR_BYTES, _USUAL_IMAGE_BYTES = 1 << 30, 64 << 10
_LIGHT_ROW_BYTES = 4096  # a Parquet row below this holds a URI, not an image, so that many fit one block


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Positions `start` to `stop` of one unit, without those that are done."""

    unit: Unit
    start: int = 0
    stop: int | None = None
    """First position that is not read; None for the unit's end."""

    done: np.ndarray | None = None
    """bool[N], true where position start + n is done; later positions are not. None: nothing is done."""

    attempts: Mapping[int, int]
    """Position -> number of attempts so far, of rows that failed before."""

    held: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of a table whose rows may lack some columns alone: for each column family bool[N], true where position start + n
    has it; later positions have not."""

    def lacks(self, family: str) -> bool:
        """Return whether some row may lack a column family."""
        return self.stop is None or family not in self.held or not self.held[family].all()

    @property
    def num_left(self) -> int | None:
        """Rows to read; None if the unit was not counted yet."""
        if self.stop is None:
            return None
        return self.stop - self.start - (0 if self.done is None else int(self.done.sum()))

    @property
    def num_expected(self) -> int:
        """Rows to read; estimated from the size of an uncounted tar."""
        if self.num_left is not None:
            return self.num_left
        guess = (self.unit.size_bytes or _USUAL_TAR_BYTES) // _USUAL_IMAGE_BYTES
        return max(0, guess - (0 if self.done is None else int(self.done.sum())))


def listing_rows(num_images: int) -> int:
    """Return how many rows of a listing one task reads in a job over `num_images`: whole blocks."""
    return BLOCK_ROWS * min(_LIGHT_BLOCKS, max(1, num_images // (BLOCK_ROWS * _LISTING_TASKS)))


def cut(
    unit: Unit,
    stop: int | None,
    finished: Callable[[int, int], np.ndarray],
    attempts: Mapping[int, int],
    num_listed: int = BLOCK_ROWS,
    end: int = 0,
    held: Callable[[int, int], Mapping[str, np.ndarray]] = lambda *_: {},
) -> Iterator[Slice]:
    """Yield the slices of one unit that have rows left.

    finished: from a position and the one before which to stop to bool[N]: a file may say that it has billions of rows.
    num_listed: rows of a slice of a listing. end: where `stop` is not known, the position after the last finished one.
    held: as `finished`, to what the slice says of column families.
    """
    if stop is None:
        here = finished(0, end)
        yield Slice(unit=unit, done=here if here.any() else None, attempts=attempts, held=held(0, end))
        return
    step = num_listed if unit.kind == "listing" else _slice_rows(unit) or max(stop, 1)
    tried: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for position, count in attempts.items():
        tried[position // step * step][position] = count
    for start in range(0, stop, step):
        last = min(stop, start + step)
        here = finished(start, last)
        if not here.all():
            done = here if here.any() else None
            of_families = held(start, last)
            yield Slice(unit=unit, start=start, stop=last, done=done, attempts=tried[start], held=of_families)


def _slice_rows(unit: Unit) -> int | None:
    """Return how many rows of a file one task reads; None for all, where skipping rows means reading them."""
    is_light = unit.kind == "parquet" and unit.num_rows and (unit.size_bytes or 0) / unit.num_rows < _LIGHT_ROW_BYTES
    return max(_LIGHT_BLOCKS * BLOCK_ROWS, -(-(unit.num_rows or 0) // _UNIT_TASKS)) if is_light else None


@dataclass(frozen=True, kw_only=True)
class SliceReader:
    """Reads the slices of one job, in any process."""

    config: CaptionJobConfig
    columns: Columns
    run_folder: Place
    stop: StopFile | None = None
    """The file whose existence ends reading."""

    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The prompts of each column family, where rows may lack some families alone."""

    def read(self, piece: Slice) -> Iterator[pa.Table]:
        """Yield the rows of a slice that are left, with the number of this attempt, and what each is asked.

        Records how many rows a tar has once it is known. Ends early where the job is to stop.
        """
        tables = self._tables(piece)
        while not (self.stop and self.stop.exists()) and (table := next(tables, None)) is not None:
            table = _with_attempts(table, piece.attempts)
            yield self._with_asked(table, piece) if self.prompts else table

    def _with_asked(self, table: pa.Table, piece: Slice) -> pa.Table:
        places = (table.column("key").to_numpy() & (MAX_UNIT_ROWS - 1)) - piece.start
        asked: list[list[str]] = [[] for _ in places]
        for family, prompts in self.prompts.items():
            held = piece.held.get(family, np.zeros(0, bool))
            for row in np.flatnonzero([place >= len(held) or not held[place] for place in places]):
                asked[row] += prompts
        return table.append_column(ASKED, pa.array(asked, ASKED.type))

    def _tables(self, piece: Slice) -> Iterator[pa.Table]:
        limits = Limits(
            rows_per_block=BLOCK_ROWS,
            max_image_bytes=self.config.image.max_image_bytes,
            start_at=piece.start,
            stop_at=piece.stop,
        )
        return read_unit(
            piece.unit,
            self.columns,
            self.config.input,
            run_folder=self.run_folder,
            limits=limits,
            done=piece.done,
            on_end=partial(self._note_count, piece.unit),
            on_further=partial(self._note_further, piece.unit),
        )

    def _note_count(self, unit: Unit, num_rows: int) -> None:
        if unit.num_rows is None:
            save_count(unit.ordinal, num_rows, self.run_folder)

    def _note_further(self, unit: Unit, num_images: int) -> None:
        if unit.num_rows is None:
            save_further(unit.ordinal, num_images, self.run_folder)


def _with_attempts(table: pa.Table, attempts: Mapping[int, int]) -> pa.Table:
    if not attempts:
        return table
    positions = table.column("key").to_numpy() & (MAX_UNIT_ROWS - 1)
    numbers = pa.array([attempts.get(int(position), 0) + 1 for position in positions], pa.int32())
    index = table.schema.get_field_index("attempt")
    return table.set_column(index, table.schema.field(index), numbers)
