"""Failed attempts of many parts: which came last, and which are there twice. Some two bytes for each attempt.

Knows the columns of `failures/`; not where parts are.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from captioner.schema import FAILURES, RejectReason
from captioner.tables.keys import KeySet

__all__ = ["FAILURE_COLUMNS", "FailedAttempts"]

FAILURE_COLUMNS = ["key", "attempt", "reason"]

_MOST_TRIES = 15
_AT_ONCE = 1 << 20  # rows that are looked at together: parts and spans are many and small
_ROWS_OF_PART = 256  # that take the memory which a part takes beside its rows
_REASONS = frozenset(map(str, RejectReason))
_SCHEMA = pa.schema([FAILURES.field(name).with_nullable(True) for name in FAILURE_COLUMNS])


class FailedAttempts:
    """The failed attempts of a table.

    There is a set of keys for each usual attempt and reason. Attempts of another number or reason, as hostile parts and
    those of a later release may have them, are held as rows, in 16 bytes each."""

    def __init__(self) -> None:
        self._usual: dict[tuple[int, str], KeySet] = {}
        self._others: list[pa.Table] = []
        self._added: list[pa.Table] = []
        """Parts that are not sorted in yet."""
        self._num_added = 0
        self._num_repeated = 0

    def add(self, failures: pa.Table) -> None:
        """Add the FAILURE_COLUMNS of a part."""
        self._added.append(_encoded(failures))
        self._num_added += failures.num_rows
        if max(self._num_added, _ROWS_OF_PART * len(self._added)) >= _AT_ONCE:
            self._sort_in()

    def _sort_in(self) -> None:
        rows, self._added = pa.concat_tables([_encoded(_SCHEMA.empty_table()), *self._added]), []
        self._num_added = 0
        keys, attempts, codes, reasons = _columns(rows)
        is_usual = (attempts >= 1) & (attempts <= _MOST_TRIES)
        is_usual &= np.array([reason in _REASONS for reason in reasons], bool)[codes]
        for attempt in np.unique(attempts[is_usual]).tolist():
            here = is_usual & (attempts == attempt)
            found, first = np.unique(keys[here], return_index=True)
            is_new = ~self._contains(attempt, found)
            self._num_repeated += int(here.sum() - is_new.sum())
            found, code_of = found[is_new], codes[here][first][is_new]
            for code in np.unique(code_of).tolist():
                self._usual.setdefault((attempt, reasons[code]), KeySet()).add(found[code_of == code])
        if not is_usual.all():
            self._others.append(rows.filter(pa.array(~is_usual)))

    def _contains(self, attempt: int, keys: np.ndarray) -> np.ndarray:
        found = np.zeros(len(keys), bool)
        for (number, _), known in self._usual.items():
            if number == attempt:
                found |= known.contains(keys)
        return found

    @property
    def num_duplicates(self) -> int:
        """How many rows repeat the key and attempt of another one."""
        self._sort_in()
        others = self._other_rows()
        distinct = others.group_by(["key", "attempt"]).aggregate([])
        keys, attempts = distinct.column("key").to_numpy(), distinct.column("attempt").to_numpy()
        num_shared = sum(
            int(self._contains(attempt, keys[attempts == attempt]).sum())
            for attempt in {number for number, _ in self._usual}
        )
        return self._num_repeated + int(others.num_rows - distinct.num_rows) + num_shared

    def last(self, known: KeySet) -> Iterator[pa.Table]:
        """Yield FAILURE_COLUMNS of the highest attempt of each key that is not `known`, in no order of keys."""
        self._sort_in()
        seen = KeySet()
        for rows in self._downwards():
            keys = rows.column("key").to_numpy()
            is_left = ~(known.contains(keys) | seen.contains(keys))
            seen.add(keys[is_left])
            yield rows.filter(pa.array(is_left))

    def _downwards(self) -> Iterator[pa.Table]:
        """Yield the attempts in pieces, the highest first."""
        others = _last(self._other_rows())
        attempts = others.column("attempt").to_numpy()
        yield others.filter(pa.array(attempts > _MOST_TRIES))
        seen = {number for number, _ in self._usual}.union(np.unique(attempts).tolist())
        for attempt in filter(seen.__contains__, range(_MOST_TRIES, 0, -1)):
            for (number, reason), keys in sorted(self._usual.items(), key=lambda item: item[0]):
                if number == attempt:
                    yield from (_rows(some, attempt, reason) for some in _pieces(keys))
            yield others.filter(pa.array(attempts == attempt))
        yield others.filter(pa.array(attempts < 1))

    def _other_rows(self) -> pa.Table:
        return pa.concat_tables([_encoded(_SCHEMA.empty_table()), *self._others])


def _columns(failures: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Return int64[N] keys, int[N] attempts, int[N] indices of the reasons, and the reasons."""
    rows = failures.unify_dictionaries().combine_chunks()
    [reasons] = rows.column("reason").chunks or [pa.array([], pa.string()).dictionary_encode()]
    keys, attempts = rows.column("key").to_numpy(), rows.column("attempt").to_numpy()
    return keys, attempts, reasons.indices.to_numpy(), reasons.dictionary.to_pylist()


def _encoded(failures: pa.Table) -> pa.Table:
    """Return the FAILURE_COLUMNS of a part with each reason held once."""
    rows = failures.select(FAILURE_COLUMNS).cast(_SCHEMA)
    return rows.set_column(2, "reason", rows.column("reason").dictionary_encode())


def _pieces(keys: KeySet) -> Iterator[np.ndarray]:
    """Yield the keys of many spans at a time."""
    found: list[np.ndarray] = []
    num_found = 0
    for span in keys.spans:
        found.append(keys.keys_of(span))
        num_found += len(found[-1])
        if num_found >= _AT_ONCE:
            yield np.concatenate(found)
            found, num_found = [], 0
    if found:
        yield np.concatenate(found)


def _rows(keys: np.ndarray, attempt: int, reason: str) -> pa.Table:
    reasons = pa.DictionaryArray.from_arrays(np.zeros(len(keys), np.int32), pa.array([reason], pa.string()))
    return pa.table({"key": keys, "attempt": np.full(len(keys), attempt, np.int32), "reason": reasons})


def _last(attempts: pa.Table) -> pa.Table:
    """Return each key's row of the highest attempt, sorted by key."""
    rows = attempts.sort_by([("key", "ascending"), ("attempt", "ascending")])
    keys = rows.column("key").to_numpy()
    is_last = np.ones(len(keys), bool)
    is_last[:-1] = keys[1:] != keys[:-1]
    return rows.filter(pa.array(is_last))
