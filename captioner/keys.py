"""Sets of row keys, a bit for each row: what a table holds, what is left to do.

Knows the layout of a key (`unit << 32 | position`) and nothing else. A set of ten million rows is ten megabytes.
"""

from collections.abc import Iterator

import numpy as np

from captioner.rows import MAX_UNIT_ROWS

__all__ = ["KeySet"]


class KeySet:
    """A set of row keys: a bitmap for each unit, grown as needed."""

    def __init__(self) -> None:
        self._units: dict[int, np.ndarray] = {}

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Add int64[N] keys; return those that were in the set already, or stand twice in `keys`."""
        again = []
        for unit, places in _by_unit(keys):
            positions = keys[places] & (MAX_UNIT_ROWS - 1)
            bitmap = self._grown(unit, int(positions.max()) + 1)
            distinct, counts = np.unique(positions, return_counts=True)
            again.append((unit << 32) + distinct[(counts > 1) | bitmap[distinct]])
            bitmap[distinct] = True
        return np.concatenate(again) if again else np.empty(0, np.int64)

    def _grown(self, unit: int, size: int) -> np.ndarray:
        bitmap = self._units.get(unit)
        if bitmap is None or len(bitmap) < size:
            grown = np.zeros(max(size, 2 * (0 if bitmap is None else len(bitmap))), bool)
            if bitmap is not None:
                grown[: len(bitmap)] = bitmap
            self._units[unit] = bitmap = grown
        return bitmap

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Return bool[N], true where a key is in the set."""
        found = np.zeros(len(keys), bool)
        for unit, places in _by_unit(keys):
            positions = keys[places] & (MAX_UNIT_ROWS - 1)
            found[places] = self.positions(unit, int(positions.max()) + 1)[positions]
        return found

    def positions(self, unit: int, num_rows: int | None = None) -> np.ndarray:
        """Return bool[num_rows], true where the unit's row is in the set; by default up to its last one."""
        bitmap = self._units.get(unit, np.empty(0, bool))
        size = len(bitmap) if num_rows is None else num_rows
        return np.pad(bitmap[:size], (0, max(0, size - len(bitmap))))

    def count(self, unit: int | None = None) -> int:
        """Return how many keys are in the set, or in one unit of it."""
        bitmaps = self._units.values() if unit is None else [self.positions(unit)]
        return sum(int(bitmap.sum()) for bitmap in bitmaps)

    @property
    def units(self) -> set[int]:
        """Ordinals of the units that were ever added to."""
        return set(self._units)


def _by_unit(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (unit, int64 places of its keys) for each unit among the keys."""
    order = np.argsort(keys, kind="stable")
    units, starts = np.unique(keys[order] >> 32, return_index=True)
    yield from zip(units.tolist(), np.split(order, starts[1:]), strict=False)  # without keys there is one empty piece
