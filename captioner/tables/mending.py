"""Rows that stand in a table twice: each is dropped from all parts but one, and at no moment from the last.

So are failures of no row of the input, which leave the table altogether (`aliens`). A part that loses all its rows is
put aside, below `_run/removed/`. One that loses some is first written anew without them; then the old file is put
aside. Whichever of these steps a crash comes after, each row is still there, and to mend again ends as if there had
been no crash. Of equal rows the one of the latest run stays; within a run that of the smaller part, which is what an
interrupted mend has written anew. Knows the parts of one table; asks for no lease.
"""

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.rows import MAX_UNIT_ROWS
from captioner.sources import Frozen
from captioner.sources.urls import join, name, redact
from captioner.tables.parts import PartName, footer, is_intact, read_ahead
from captioner.tables.table import FOLDERS, CaptionTable

__all__ = ["Surplus", "aliens", "doubled", "drop", "mend", "mend_late", "put_aside"]

log = logging.getLogger("captioner")

_IDENTITY = {"captions": ["key"], "failures": ["key", "attempt"]}


_WHY = {"doubled": "stand in another part too", "alien": "are failures of no row of the input"}


class Surplus(NamedTuple):
    """A part some of whose rows do not belong where they are."""

    kind: Literal["doubled", "alien"]
    folder: str
    url: str
    is_dropped: np.ndarray
    """bool[N], true for the rows that this part loses."""

    @property
    def why(self) -> str:
        """What a person reads of it."""
        return f"{int(self.is_dropped.sum()):,} of its {len(self.is_dropped):,} rows {_WHY[self.kind]}"


def doubled(table: CaptionTable, without: Container[str] = ()) -> Iterator[Surplus]:
    """Yield the parts that have to lose rows, in the order in which they may.

    Only whole parts of this table count, so that no row is dropped for one that cannot be read. without: URLs of parts
    that are known not to be. Raises StoreError.
    """
    for folder in FOLDERS:
        parts = [url for url in sorted(table.parts(folder), key=_age) if url not in without]
        found = _identities(table, folder, parts)
        while not all(is_sound := [_is_sound(table, url, again) for url, _, again in _again(folder, found)]):
            found = [part for part, sound in zip(found, is_sound, strict=True) if sound]
        yield from (
            Surplus("doubled", folder, url, is_dropped)
            for url, is_dropped, _ in _again(folder, found)
            if is_dropped.any()
        )


def _age(url: str) -> tuple[str, int, str]:
    """Order parts from the one that loses its rows first to the one that keeps them."""
    said = PartName.parse(name(url))
    return ("", 0, name(url)) if said is None else (said.run_id, -said.num_rows, name(url))


def _identities(table: CaptionTable, folder: str, parts: Sequence[str]) -> list[tuple[str, pa.Table]]:
    """Return what tells the rows of each part of this table apart."""
    identity = table.digest
    read = read_ahead(lambda url: table.read(url, _IDENTITY[folder]), parts)
    return [
        (url, part.replace_schema_metadata())
        for url, part in read
        if part is not None and footer(part.schema.metadata).identity == identity
    ]


def _again(folder: str, found: Sequence[tuple[str, pa.Table]]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (URL, bool[N], bool[N]) of each part: which rows stand in a later part, which in any other."""
    if not found:
        return
    rows = pa.concat_tables([part for _, part in found])
    columns = [rows.column(column).to_numpy() for column in reversed(_IDENTITY[folder])]
    order = np.lexsort([np.arange(rows.num_rows), *columns])  # equal rows stand together, the one that stays last
    is_next_equal = np.ones(max(0, rows.num_rows - 1), bool)
    for column in columns:
        is_next_equal &= column[order][1:] == column[order][:-1]
    is_dropped, is_again = np.zeros(rows.num_rows, bool), np.zeros(rows.num_rows, bool)
    is_dropped[order[:-1][is_next_equal]] = True
    is_again[order[1:][is_next_equal]] = True
    starts = np.cumsum([0, *(part.num_rows for _, part in found)])
    for (url, _), start, stop in zip(found, starts[:-1], starts[1:], strict=True):
        yield url, is_dropped[start:stop], is_dropped[start:stop] | is_again[start:stop]


def _is_sound(table: CaptionTable, url: str, is_again: np.ndarray) -> bool:
    """Say whether a part may keep, or lose, the rows that stand in another one too."""
    return not is_again.any() or is_intact(table.store.read_bytes(url))


def aliens(table: CaptionTable, frozen: Frozen, parts: Iterable[str]) -> Iterator[Surplus]:
    """Yield those of some whole parts of failures that have rows of no row of the input. Raises StoreError.

    Such a row stood for what nobody could read, before it was known how many rows there are.
    """
    num_rows = {unit.ordinal: unit.num_rows for unit in frozen.units}
    for url, part in read_ahead(lambda url: table.read(url, ["key"]), parts):
        if part is not None and (is_alien := _is_alien(part.column("key").to_numpy(), num_rows)).any():
            yield Surplus("alien", "failures", url, is_alien)


def _is_alien(keys: np.ndarray, num_rows: Mapping[int, int | None]) -> np.ndarray:
    """Return bool[N], true for keys behind the end of their unit; nobody knows where an uncounted one ends."""
    units, places = np.unique(keys >> 32, return_inverse=True)
    ends = [num_rows.get(unit, 0) for unit in units.tolist()]
    ends_of_units = np.array([MAX_UNIT_ROWS if end is None else end for end in ends], np.int64)
    return keys & (MAX_UNIT_ROWS - 1) >= ends_of_units[places]


def mend(table: CaptionTable, run_id: str) -> int:
    """Drop every row that stands in another part too; return how many rows went. run_id: as in `drop`."""
    return sum(drop(table, part, run_id) for part in list(doubled(table)))


def drop(table: CaptionTable, part: Surplus, run_id: str) -> int:
    """Take rows out of a part, and the part away; return how many they were.

    run_id: of the run that mends, which holds the lease; what it puts aside lies below `_run/removed/<run_id>/`.
    """
    log.info("mended=%s reason=%s", redact(part.url), part.why)
    if not part.is_dropped.all():
        _rewrite(table, part)
    put_aside(table, part.url, run_id)
    return int(part.is_dropped.sum())


def mend_late(table: CaptionTable, known: Container[str], run_id: str) -> int:
    """Mend the table if it has parts beside the known ones, those that a run found and wrote; return as `mend` does.

    Such a part is of a writer that outlived its driver, or of a task that Ray made twice.
    """
    late = [url for folder in FOLDERS for url in table.parts(folder) if url not in known]
    if not late:
        return 0
    num_dropped = mend(table, run_id)
    log.info("late_parts=%d doubled=%d reason=%s", len(late), num_dropped, "a writer outlived its driver")
    return num_dropped


def _rewrite(table: CaptionTable, part: Surplus) -> None:
    with pq.ParquetFile(table.store.open(part.url)) as file:
        stamp, rows = footer(file.metadata.metadata), file.read()
    table.write_part(part.folder, rows.filter(pa.array(~part.is_dropped)).replace_schema_metadata(), stamp)


def put_aside(table: CaptionTable, url: str, run_id: str) -> None:
    """Move a file of the table to its place below `_run/removed/<run_id>/`."""
    table.store.move(url, join(table.run_folder, "removed", run_id, url.removeprefix(table.url + "/")))
