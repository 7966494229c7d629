"""A small random sample of the images that are left, and how fast their input can be read.

The sample is the same each time. Reads as the read tasks of a job do, and leaves nothing behind. Knows no model.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.captioning.timing import timed
from captioner.inputs.slices import Slice, SliceReader
from captioner.schema import MAX_UNIT_ROWS

__all__ = ["ReadRate", "measure_reading", "sample_rows", "sample_slices"]

_NUM_SLICES = 32  # places in the input that the sample comes from
_READ_S = 2.0  # of reading show how fast it goes
_TAR_BLOCK = 512  # bytes; a tar member has a header of one block and fills up its last


@dataclass(frozen=True)
class ReadRate:
    """How fast rows of the input come, in seconds a row."""

    read_s: float
    read_cpu_s: float
    image_bytes: float
    """Bytes of a tar for each of its images."""


def sample_slices(slices: list[Slice]) -> list[Slice]:
    """Return a few random slices."""
    return random.Random(0).sample(slices, min(_NUM_SLICES, len(slices)))


def measure_reading(reader: SliceReader, slices: list[Slice]) -> ReadRate:
    """Read some of the slices from their beginning, for two seconds."""
    until = time.perf_counter() + _READ_S
    read, seconds, cpu_s = timed(
        lambda: [_read_slice(reader, piece, until) for piece in slices if time.perf_counter() < until]
    )
    num_rows = max(1, sum(rows for rows, _, _ in read))
    whole = [found for found in read if found[2]] or read
    image_bytes = sum(size for _, size, _ in whole) / max(1, sum(rows for rows, _, _ in whole))
    return ReadRate(seconds / num_rows, cpu_s / num_rows, max(1.0, image_bytes))


def _read_slice(reader: SliceReader, piece: Slice, until: float) -> tuple[int, int, bool]:
    """Return the rows that were read, the bytes that they take in a tar, and whether these were all of its unit."""
    num_rows, num_bytes = 0, 0
    for table in reader.read(_without_count(piece)):
        num_rows += table.num_rows
        num_bytes += _bytes_in_tar(table)
        if time.perf_counter() > until:
            return num_rows, num_bytes, False
    return num_rows, piece.unit.size_bytes or num_bytes, piece.done is None


def _without_count(piece: Slice) -> Slice:
    """Return a slice whose reader saves no count of its tar at the end."""
    return replace(piece, stop=MAX_UNIT_ROWS) if piece.stop is None else piece


def _bytes_in_tar(table: pa.Table) -> int:
    lengths = pc.fill_null(pc.binary_length(table.column("data")), 0).to_numpy()
    return int(((lengths + 2 * _TAR_BLOCK - 1) // _TAR_BLOCK * _TAR_BLOCK).sum())


def sample_rows(reader: SliceReader, slices: list[Slice], num_rows: int) -> pa.Table:
    """Return random rows of the slices, as many of each; of a tar that is not counted yet, the first ones."""
    chance = random.Random(0)
    each = -(-num_rows // len(slices))
    return pa.concat_tables(table for piece in slices for table in _some_rows(reader, piece, each, chance))


def _some_rows(reader: SliceReader, piece: Slice, num_rows: int, chance: random.Random) -> Iterator[pa.Table]:
    if piece.stop is not None:
        done = np.zeros(piece.stop - piece.start, bool) if piece.done is None else piece.done
        left = np.flatnonzero(~done).tolist()
        done = np.ones(len(done), bool)
        done[chance.sample(left, min(num_rows, len(left)))] = False
        piece = replace(piece, done=done)
    for table in islice(reader.read(_without_count(piece)), 1):
        yield table.slice(0, num_rows)
