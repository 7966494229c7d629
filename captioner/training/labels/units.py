"""Labels in files that hold their images: rows of the units of a frozen input."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from captioner.inputs import Frozen, Unit
from captioner.training.labels.rows import LabelRow, splits_of_files

__all__ = ["rows_of_units"]

_THREADS = 8


def rows_of_units(frozen: Frozen, read: Callable[[Unit], Iterator[LabelRow]]) -> Iterator[LabelRow]:
    """Yield the rows of every unit in order; several units are read at the same time."""
    splits = splits_of_files([unit.path for unit in frozen.units])
    with ThreadPoolExecutor(_THREADS) as threads:
        pieces = threads.map(lambda unit: list(read(unit)), frozen.units)
        for unit, rows in zip(frozen.units, pieces, strict=True):
            for row in rows:
                yield row if row.split else row._replace(split=splits.get(unit.path, ""))
