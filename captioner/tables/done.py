"""Which rows of a table are done, and what the others lack: read from the keys of all parts.

Knows column families and keys; not what a row is made of.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from captioner.tables.column_family import ColumnFamily
from captioner.tables.failures import FAILURE_COLUMNS, FailedAttempts
from captioner.tables.keys import KeySet, common
from captioner.tables.table import CaptionTable

__all__ = ["Done", "find_done"]


@dataclass
class Done:
    """The rows that a table holds already.

    `keys` need no more work. `attempts` maps the keys that will be tried again to the attempts they had.
    """

    keys: KeySet = field(default_factory=KeySet)
    attempts: dict[int, int] = field(default_factory=dict)
    num_captioned: int = 0
    num_failed: int = 0
    """Images without a caption that are not tried again."""

    num_duplicates: int = 0
    """Rows that another part holds too: a writer outlived its driver (see `repair.deduplicate`)."""

    parts: frozenset[str] = frozenset()
    """URLs of the parts that were read."""

    held: Mapping[str, KeySet] = field(default_factory=dict)
    """For each column family, by its prompt, the keys that need no more of it. Empty where there is one family: a row
    that is not done lacks all of it."""

    def end(self, unit: int) -> int:
        """Return the position after the last row of a unit that the table has something of; 0 for none."""
        return max(keys.end(unit) for keys in (self.keys, *self.held.values()))


@dataclass
class _OfFamily:
    """What one family holds."""

    filled: KeySet = field(default_factory=KeySet)
    final: KeySet = field(default_factory=KeySet)
    """Keys of rows that failed and are not tried again."""

    attempts: dict[int, int] = field(default_factory=dict)
    num_duplicates: int = 0
    parts: frozenset[str] = frozenset()


def find_done(
    table: CaptionTable, is_retried: Callable[[str], bool], families: Sequence[ColumnFamily] | None = None
) -> Done:
    """Return which rows are done: those with every column, and each failed one unless its reason is retried.

    families: those of the job; by default all. Reads the key columns of all their parts. Raises OutputError for a part
    that is torn or of another run, StoreError.
    """
    families = table.families() if families is None else families
    captions, *added = (_of_family(table, family, is_retried) for family in families)
    num_captioned, num_failed = captions.filled.count(), captions.final.count()
    captions.filled.update(captions.final)
    held = {families[0].prompt: captions.filled}
    for family, one in zip(families[1:], added, strict=True):
        one.filled.update(one.final)
        one.filled.update(captions.final)  # an added prompt is asked of images that have a caption
        held[family.prompt] = one.filled
    attempts = captions.attempts
    for one in added:  # a row that two families lack is tried once for both
        attempts |= {key: max(num, attempts.get(key, 0)) for key, num in one.attempts.items()}
    return Done(
        keys=common(*held.values()),
        attempts=attempts,
        num_captioned=num_captioned,
        num_failed=num_failed,
        num_duplicates=sum(one.num_duplicates for one in (captions, *added)),
        parts=frozenset().union(*(one.parts for one in (captions, *added))),
        held=held if added else {},
    )


def _of_family(table: CaptionTable, family: ColumnFamily, is_retried: Callable[[str], bool]) -> _OfFamily:
    rows, failures = (table.parts(folder) for folder in family.folders)
    found = _OfFamily(parts=frozenset([*rows, *failures]))
    for part in table.read_all(rows, ["key"], family.digest):
        found.num_duplicates += len(found.filled.add(part.column("key").to_numpy()))
    failed = FailedAttempts()
    for part in table.read_all(failures, FAILURE_COLUMNS, family.digest):
        failed.add(part)
    found.num_duplicates += failed.num_duplicates
    for last in failed.last(found.filled):
        retried = pa.array([is_retried(reason) for reason in last.column("reason").to_pylist()], pa.bool_())
        again, final = last.filter(retried), last.filter(pc.invert(retried))
        keys, attempts = again.column("key").to_pylist(), again.column("attempt").to_pylist()
        found.attempts.update(zip(keys, attempts, strict=True))
        found.final.add(final.column("key").to_numpy())
    return found
