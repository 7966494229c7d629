"""What a crash or a late writer may leave in a table: found first, then moved below `_run/removed/RUN/`.

    torn         parts that are not as they were written
    duplicate    rows that another part holds too
    orphan       failures of no row of the input
    leftover     temporaries, and the staged parts of a compaction

Nothing is deleted, and no row leaves the table while it is the last of its kind: a part that loses some rows is first
written again without them, then the old file is moved. After a crash between any two steps each row is still there, and
the next repair ends as if there had been no crash. Of equal rows the one of the latest run stays; within a run that of
the smaller part, which is what an interrupted repair has written. Files that no run writes, and parts of other tables,
stay where they are. Takes no lease.
"""

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from captioner.inputs import Frozen
from captioner.schema import MAX_UNIT_ROWS, RejectReason
from captioner.storage import full_url
from captioner.storage.faults import StoreError
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import name, redact
from captioner.tables.audit import Problem
from captioner.tables.compaction import STAGING
from captioner.tables.parts import PartName, footer, is_intact, read_ahead, row_identity
from captioner.tables.row_set import RowSet, is_repeated_later, row_ids
from captioner.tables.table import CaptionTable

__all__ = ["Finding", "deduplicate", "deduplicate_late_parts", "findings", "repair"]

log = logging.getLogger("captioner")


class Finding(NamedTuple):
    """One file that a repair takes out of the table, or some of whose rows it does."""

    kind: Literal["torn", "duplicate", "orphan", "leftover"]
    url: str
    why: str


class _RowsToDrop(NamedTuple):
    """Rows of one part that have to leave it."""

    kind: Literal["duplicate", "orphan"]
    folder: str
    url: str
    is_dropped: np.ndarray
    """bool[N], true for the rows that this part loses."""

    @property
    def why(self) -> str:
        reasons = {"duplicate": "are in another part too", "orphan": "are failures of no row of the input"}
        return f"{int(self.is_dropped.sum()):,} of its {len(self.is_dropped):,} rows {reasons[self.kind]}"


def findings(table: CaptionTable, frozen: Frozen, problems: Sequence[Problem]) -> Iterator[Finding]:
    """Yield what a repair would do. problems: of an audit of the same table. Changes nothing; raises StoreError."""
    for problem in problems:
        if problem.kind == "torn":
            why = f"{problem.why}; rows that no other part holds are captioned again by the next run"
            yield Finding("torn", problem.url, why)
    for url in _temporaries(table):
        yield Finding("leftover", url, "a writer that ended before its file was whole")
    for url in _staged(table):
        yield Finding("leftover", url, "staged by a compaction; its rows are in the table")
    wrong = {problem.url for problem in problems}
    for part in (*_orphans(table, frozen, without=wrong), *_duplicates(table, without=wrong)):
        yield Finding(part.kind, part.url, part.why)


def repair(table: CaptionTable, frozen: Frozen, found: Sequence[Finding], run_id: str) -> int:
    """Do what was found, under the lease of `run_id`; return how many duplicate and orphan rows were dropped."""
    for finding in found:
        if finding.kind in ("torn", "leftover"):
            _put_aside(table, finding.url, run_id)
    wanted = {finding.url for finding in found if finding.kind == "orphan"}
    orphans = [part for part in _orphans(table, frozen) if part.url in wanted]
    return sum(_drop(table, part, run_id) for part in orphans) + deduplicate(table, run_id)


def deduplicate(table: CaptionTable, run_id: str) -> int:
    """Drop every row that another part holds too; return how many. run_id: of the run that holds the lease."""
    return sum(_drop(table, part, run_id) for part in list(_duplicates(table)))


def deduplicate_late_parts(table: CaptionTable, known: Container[str], run_id: str) -> int:
    """Deduplicate the table if it has parts beside the known ones, those that a run found and wrote.

    Such a part is of a writer that outlived its driver, or of a task that Ray ran twice. Returns as `deduplicate` does.
    """
    late = [url for family in table.families() for folder in family.folders for url in table.parts(folder)]
    late = [url for url in late if url not in known]
    if not late:
        return 0
    num_dropped = deduplicate(table, run_id)
    log.info("late_parts=%d duplicates=%d reason=%s", len(late), num_dropped, "a writer outlived its driver")
    return num_dropped


# Files


def _temporaries(table: CaptionTable) -> Iterator[str]:
    run = table.run_folder
    places = [*(table.location / folder for family in table.families() for folder in family.folders), run]
    places += [
        run / folder for folder in ("runs", "listing", "counts", "stopping")
    ]  # not `lease`, whose holder writes it
    for place in places:
        names = table.store.names(place)
        yield from (full_url(place / name) for name in names if name.startswith(".") and name.endswith(".tmp"))


def _staged(table: CaptionTable) -> Iterator[str]:
    for entry in table.store.entries(table.run_folder):
        if entry.is_folder and name(entry.url).startswith(STAGING):
            yield from (found.url for page in table.store.pages(entry.url) for found in page)


def _put_aside(table: CaptionTable, url: str, run_id: str) -> None:
    """Move a file of the table to its place below `_run/removed/<run_id>/`, unless it is gone by now."""
    below = url.removeprefix(full_url(table.location) + "/")
    try:
        table.store.move(url, table.run_folder / "removed" / run_id / below)
    except StoreError as error:
        if error.fault.reason != RejectReason.MISSING:  # a late writer has finished its temporary
            raise


# Rows


def _drop(table: CaptionTable, part: _RowsToDrop, run_id: str) -> int:
    """Take rows out of a part; return how many they were."""
    log.info("repaired=%s reason=%s", redact(part.url), part.why)
    if not part.is_dropped.all():
        _rewrite(table, part)
    _put_aside(table, part.url, run_id)
    return int(part.is_dropped.sum())


def _rewrite(table: CaptionTable, part: _RowsToDrop) -> None:
    with open_parquet_file(table.store.open(part.url)) as file:
        stamp, rows = footer(file.metadata.metadata), file.read()
    table.write_part(part.folder, rows.filter(pa.array(~part.is_dropped)).replace_schema_metadata(), stamp)


def _orphans(table: CaptionTable, frozen: Frozen, without: Container[str] = ()) -> Iterator[_RowsToDrop]:
    """Yield the parts of failures that have rows of no row of the input. without: as of `_duplicates`, and raises so.

    A job writes such a row for a unit that it cannot read, before it knows how many rows the unit has.
    """
    num_rows = {unit.ordinal: unit.num_rows for unit in frozen.units}
    for folder in (family.failures for family in table.families()):
        parts = [url for url in table.parts(folder) if url not in without]
        for url, part in read_ahead(lambda url: table.read(url, ["key"]), parts):
            if part is not None and (is_orphan := _is_orphan(part.column("key").to_numpy(), num_rows)).any():
                yield _RowsToDrop("orphan", folder, url, is_orphan)


def _is_orphan(keys: np.ndarray, num_rows: Mapping[int, int | None]) -> np.ndarray:
    """Return bool[N], true for keys past the end of their unit; a unit that was not counted has no known end."""
    units, places = np.unique(keys >> 32, return_inverse=True)
    ends = [num_rows.get(unit, 0) for unit in units.tolist()]
    ends_of_units = np.array([MAX_UNIT_ROWS if end is None else end for end in ends], np.int64)
    return keys & (MAX_UNIT_ROWS - 1) >= ends_of_units[places]


def _duplicates(table: CaptionTable, without: Container[str] = ()) -> Iterator[_RowsToDrop]:
    """Yield the parts that have to lose rows, in the order in which they may.

    Only whole parts of this table count, so that no row is dropped for one that cannot be read. without: URLs of parts
    that are known not to be whole. Raises StoreError.
    """
    for family in table.families():
        for folder in family.folders:
            parts = _Parts(table, folder, family.digest)
            urls = [url for url in sorted(table.parts(folder), key=_age) if url not in without]
            shared = parts.shared(urls)
            if shared:
                yield from reversed(list(parts.rows_to_drop(urls, shared)))


def _age(url: str) -> tuple[str, int, str]:
    """Order parts from the one that loses its rows first to the one that keeps them."""
    named = PartName.parse(name(url))
    return ("", 0, name(url)) if named is None else (named.run_id, -named.num_rows, name(url))


class _Parts(NamedTuple):
    """The parts in one folder of a column family."""

    table: CaptionTable
    folder: str
    digest: str

    def _ids(self, urls: Sequence[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield URL, keys and attempts of each part that can be read and is of this family."""
        columns = row_identity(self.folder)
        for url, part in read_ahead(lambda url: self.table.read(url, columns), urls):
            if part is not None and footer(part.schema.metadata).identity == self.digest:
                yield url, *row_ids(part)

    def shared(self, urls: Sequence[str]) -> RowSet:
        """Return the rows that are there more than once."""
        seen, shared = RowSet(), RowSet()
        for _, keys, attempts in self._ids(urls):
            shared.add(*seen.add(keys, attempts))
        return shared

    def rows_to_drop(self, urls: Sequence[str], shared: RowSet) -> Iterator[_RowsToDrop]:
        """Yield the parts that lose rows, the last part first: it keeps what it shares. shared: as `shared` returns."""
        kept = RowSet()
        for url, keys, attempts in self._ids(urls[::-1]):
            places = np.flatnonzero(shared.contains(keys, attempts))
            if not len(places) or not is_intact(self.table.store.read_bytes(url)):
                continue  # a part that is not whole keeps its rows, and no other part loses rows for it
            keys_shared, attempts_shared = keys[places], attempts[places]
            is_dropped = np.zeros(len(keys), bool)
            is_kept_elsewhere = kept.contains(keys_shared, attempts_shared)
            is_dropped[places] = is_kept_elsewhere | is_repeated_later(keys_shared, attempts_shared)
            kept.add(keys_shared, attempts_shared)
            if is_dropped.any():
                yield _RowsToDrop("duplicate", self.folder, url, is_dropped)
