"""Sets of rows of a folder, a byte for each: of captions by their keys, of failures by key and attempt.

Knows the columns that tell rows apart; not where parts are. A hundred million captions are a hundred megabytes.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from captioner.tables.keys import KeySet

__all__ = ["RowId", "RowSet", "is_repeated_later", "row_ids"]

RowId = tuple[int, int]
"""Key and attempt; the attempt of a caption is 0. Rows are in order by both."""


def row_ids(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return int64[N] keys and int64[N] attempts of rows."""
    keys = rows.column("key").to_numpy()
    if "attempt" not in rows.column_names:
        return keys, np.zeros(len(keys), np.int64)
    return keys, rows.column("attempt").to_numpy().astype(np.int64)


def is_repeated_later(keys: np.ndarray, attempts: np.ndarray) -> np.ndarray:
    """Return bool[N], true for a row that is there again behind it."""
    order = np.lexsort([np.arange(len(keys)), attempts, keys])
    is_equal = (keys[order][1:] == keys[order][:-1]) & (attempts[order][1:] == attempts[order][:-1])
    is_repeated = np.zeros(len(keys), bool)
    is_repeated[order[:-1][is_equal]] = True
    return is_repeated


class RowSet:
    """A set of rows: a set of keys for each attempt."""

    def __init__(self) -> None:
        self._attempts: dict[int, KeySet] = {}

    def add(self, keys: np.ndarray, attempts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add rows; return the keys and attempts of those that were in the set already, or are twice among them."""
        again_keys, again_attempts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for attempt, indices in _by_attempt(attempts):
            again = self._attempts.setdefault(attempt, KeySet()).add(keys[indices])
            again_keys.append(again)
            again_attempts.append(np.full(len(again), attempt, np.int64))
        return np.concatenate(again_keys), np.concatenate(again_attempts)

    def contains(self, keys: np.ndarray, attempts: np.ndarray) -> np.ndarray:
        """Return bool[N], true where a row is in the set."""
        found = np.zeros(len(keys), bool)
        for attempt, indices in _by_attempt(attempts):
            if (known := self._attempts.get(attempt)) is not None:
                found[indices] = known.contains(keys[indices])
        return found

    def __bool__(self) -> bool:
        return bool(self._attempts)

    def __len__(self) -> int:
        return sum(known.count() for known in self._attempts.values())

    def every(self, step: int) -> Iterator[RowId]:
        """Yield the first row, and each that comes `step` rows after the one before."""
        with_keys: dict[int, list[int]] = {}
        for attempt in sorted(self._attempts):
            for span in self._attempts[attempt].spans:
                with_keys.setdefault(span, []).append(attempt)
        wanted = 0  # index of the next row to yield in the rows of this span and those behind it
        for span in sorted(with_keys):
            parts = [self._attempts[attempt].keys_of(span) for attempt in with_keys[span]]
            keys = np.concatenate(parts)
            attempts = np.repeat(with_keys[span], list(map(len, parts)))
            order = np.lexsort([attempts, keys])
            for index in order[wanted::step]:
                yield int(keys[index]), int(attempts[index])
            wanted = (wanted - len(keys)) % step if wanted < len(keys) else wanted - len(keys)


def _by_attempt(attempts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (attempt, int64 indices of its rows) for each attempt."""
    order = np.argsort(attempts, kind="stable")
    found, starts = np.unique(attempts[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, starts[1:]), strict=False)  # without rows there is one empty piece
