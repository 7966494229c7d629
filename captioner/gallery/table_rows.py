"""Some rows of a caption table, without reading all of it: drawn at random, or found by key or by image.

Reads the footers of all parts, and then only the parts that hold the wanted rows; answers to prompts that were added
later are joined to them by key. Works while a job still writes the table. Knows captions and failures, and nothing of
images and pages.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.errors import CaptionerError, InputError, JobError
from captioner.query.moved_parts import NUM_ATTEMPTS, ask_again
from captioner.schema import TRANSIENT_REASONS, RejectReason
from captioner.storage.faults import StoreError, output_errors
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import redact
from captioner.tables import CaptionTable, ColumnFamily

__all__ = ["Part", "TableRows", "ask_rows", "choose_parts"]

T = TypeVar("T")

Keys = npt.NDArray[np.int64]

_READERS = 16  # footers read at the same time: they wait for the store, not for a core
_FEWEST_PARTS = 32  # that a sample comes from: neighbours in a table are neighbours in the input, and look alike
_SPARE = 4  # rows of the chosen parts for each one drawn


class _MovedError(JobError):
    """A part that was listed is not there any more."""


def ask_rows(table: CaptionTable, question: Callable[["TableRows"], T]) -> T:
    """Return the answer of `question`, which is given the rows of a table and asked again if parts were moved."""
    with output_errors(table.location):
        return ask_again(lambda: _urls(table), lambda _: question(TableRows.of(table)), _MovedError)


def _urls(table: CaptionTable) -> list[str]:
    return [url for family in table.families() for folder in family.folders for url in table.parts(folder)]


class Part(NamedTuple):
    """One file of a table, as its footer describes it."""

    url: str
    num_rows: int
    keys: tuple[int, int] | None  # least and greatest; None where the footer has no statistics


@dataclass
class TableRows:
    """The rows of a table as its parts were when this was made."""

    table: CaptionTable
    captions: list[Part]
    failures: list[Part]
    added: list[tuple[ColumnFamily, list[Part]]]
    """The answers to each prompt that was added later."""

    @classmethod
    def of(cls, table: CaptionTable) -> "TableRows":
        """Return what a table holds now. Raises InputError for a part that cannot be read."""
        with output_errors(table.location):
            captions, *added = table.families()
        answers = [(family, _parts(table, family.rows)) for family in added]
        return cls(table, _parts(table, captions.rows), _parts(table, captions.failures), answers)

    @property
    def num_captions(self) -> int:
        """Rows with a caption."""
        return sum(part.num_rows for part in self.captions)

    @property
    def num_failures(self) -> int:
        """Failed attempts: an image may have several, and may have got its caption since."""
        return sum(part.num_rows for part in self.failures)

    def draw(self, num_rows: int, seed: int) -> pa.Table:
        """Return `num_rows` rows, or all of a smaller table, by key: captions and failures in proportion, at least one.

        The same rows for the same parts and seed. Each row is as likely as any other; of a table of many parts only
        some are read, so that neighbours are drawn together more often than chance would have it.
        """
        rng = np.random.default_rng(seed)
        whole = self.num_captions + self.num_failures
        share = min(1.0, num_rows / whole) if whole else 0.0
        num_failures = max(round(share * self.num_failures), min(1, self.num_failures, num_rows - 1))
        if not self.num_captions:
            num_failures = min(num_rows, self.num_failures)
        failures = self._last_failures(self._drawn(self.failures, num_failures, rng))
        captions = self._drawn(self.captions, min(num_rows - num_failures, self.num_captions), rng)
        return self._with_answers(_joined([captions, failures]))

    def _drawn(self, parts: Sequence[Part], num_rows: int, rng: np.random.Generator) -> list[pa.Table]:
        if not num_rows:
            return []
        chosen = choose_parts(parts, num_rows, rng)
        ends = np.cumsum([part.num_rows for part in chosen])
        drawn = np.sort(rng.choice(int(ends[-1]), num_rows, replace=False))
        places = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
        starts = ends - [part.num_rows for part in chosen]
        wanted = [(part, rows - start) for part, rows, start in zip(chosen, places, starts, strict=True) if len(rows)]
        return list(self._each(lambda pair: self._read(pair[0]).take(pa.array(pair[1])), wanted))

    def _last_failures(self, failures: list[pa.Table]) -> list[pa.Table]:
        """Return the last failure of each image that has no caption since."""
        if not failures:
            return []
        rows = pa.concat_tables(failures, promote_options="default").sort_by([("attempt", "descending")])
        keys = rows.column("key").to_numpy()
        rows = rows.take(pa.array(np.unique(keys, return_index=True)[1]))
        may_pass = pc.is_in(rows.column("reason"), pa.array([str(reason) for reason in TRANSIENT_REASONS]))
        if not pc.any(may_pass).as_py():
            return [rows]
        again = self._found(self.captions, rows.filter(may_pass).column("key").to_numpy(), ["key"])
        captioned = pa.concat_tables(again).column("key") if again else pa.chunked_array([], pa.int64())
        return [rows.filter(pc.invert(pc.is_in(rows.column("key"), captioned.combine_chunks())))]

    def with_keys(self, keys: Keys) -> pa.Table:
        """Return the captions of these keys, and the failures of those without one, by key."""
        captions = self._found(self.captions, keys, None)
        captioned = pa.concat_tables(captions, promote_options="default").column("key") if captions else []
        rest = np.setdiff1d(keys, np.asarray(captioned, dtype=np.int64))
        return self._with_answers(_joined([captions, self._last_failures(self._found(self.failures, rest, None))]))

    def of_images(self, image_ids: pa.Array) -> pa.Table:
        """Return the captions of these images, and the failures of those without one, by key. Reads every image_id."""
        found = [
            list(self._each(lambda part: self._matching(part, "image_id", image_ids), parts))
            for parts in (self.captions, self.failures)
        ]
        captions, failures = ([rows for rows in tables if rows.num_rows] for tables in found)
        return self._with_answers(_joined([captions, self._last_failures(failures)]))

    def _with_answers(self, rows: pa.Table) -> pa.Table:
        """Return rows by key with the columns of added prompts, null where an image has none."""
        wanted = rows.column("key").to_numpy()
        for family, parts in self.added:
            schema = family.schema(family.rows)
            of_rows = self._found(parts, wanted, schema.names)
            found = pa.concat_tables([schema.empty_table(), *of_rows], promote_options="default")
            keys, firsts = np.unique(found.column("key").to_numpy(), return_index=True)
            places = np.searchsorted(keys, wanted)
            is_missing = ~np.isin(wanted, keys)
            places[is_missing] = 0
            taken = pa.array(firsts[places] if len(keys) else places, mask=is_missing)
            for field in family.answers:
                rows = rows.append_column(field.with_nullable(True), found.column(field.name).take(taken))
        return rows

    def _found(self, parts: Sequence[Part], keys: Keys, columns: list[str] | None) -> list[pa.Table]:
        """Return the rows with these keys; parts whose footer rules them out are not read."""
        wanted = np.sort(keys)
        near = [part for part in parts if _may_hold(part, wanted)]
        rows = self._each(lambda part: self._matching(part, "key", pa.array(wanted), columns), near)
        return [found for found in rows if found.num_rows]

    def _matching(self, part: Part, name: str, values: pa.Array, columns: list[str] | None = None) -> pa.Table:
        column = self._read(part, [name]).column(name)
        is_wanted = pc.is_in(column, values.cast(column.type))
        if not pc.any(is_wanted).as_py():
            return self._read(part, columns).slice(0, 0) if columns else pa.table({name: column.slice(0, 0)})
        return self._read(part, columns).filter(is_wanted)

    def _each(self, read: Callable[..., pa.Table], items: Iterable[object]) -> Iterator[pa.Table]:
        with ThreadPoolExecutor(4) as threads:
            yield from threads.map(read, items)

    def _read(self, part: Part, columns: list[str] | None = None) -> pa.Table:
        try:
            with open_parquet_file(self.table.store.open(part.url)) as file:
                return file.read(columns=columns).replace_schema_metadata()
        except (StoreError, pa.ArrowException, OSError) as error:
            raise _unreadable(part.url, error) from error


def _parts(table: CaptionTable, folder: str) -> list[Part]:
    """Return the parts that a folder of the table holds, in the order of their names."""
    with output_errors(table.location):
        urls = table.parts(folder)
    with ThreadPoolExecutor(_READERS) as threads:
        return list(threads.map(lambda url: _read_footer(table, url), urls))


def _read_footer(table: CaptionTable, url: str) -> Part:
    try:
        with open_parquet_file(table.store.open_unbuffered(url)) as file:
            return Part(url, file.metadata.num_rows, _key_range(file.metadata))
    except (StoreError, pa.ArrowException, OSError) as error:
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: Exception) -> CaptionerError:
    if isinstance(error, StoreError) and error.fault.reason == RejectReason.MISSING:
        return _MovedError(f"{redact(url)} was moved while it was read, {NUM_ATTEMPTS} times: {error}; try again")
    if isinstance(error, StoreError) and error.fault.is_transient:
        return JobError(f"{redact(url)} cannot be read: {error}; try again")
    seen = " ".join(str(error).split())[:200]
    return InputError(f"{redact(url)} cannot be read: {seen}; expected a part of a table. See what jobs/verify.py says")


def _key_range(metadata: pq.FileMetaData) -> tuple[int, int] | None:
    """Return the least and the greatest key of a part, from the statistics of its row groups."""
    index = metadata.schema.names.index("key") if "key" in metadata.schema.names else -1
    groups = [metadata.row_group(group).column(index).statistics for group in range(metadata.num_row_groups)]
    if index < 0 or not groups or any(group is None or not group.has_min_max for group in groups):
        return None
    return min(group.min for group in groups), max(group.max for group in groups)


def _may_hold(part: Part, wanted: Keys) -> bool:
    if part.keys is None:
        return True
    first, last = np.searchsorted(wanted, [part.keys[0], part.keys[1] + 1])
    return bool(first < last)


def choose_parts(parts: Sequence[Part], num_rows: int, rng: np.random.Generator) -> list[Part]:
    """Return parts in random order, as many as it takes for a sample of `num_rows`."""
    chosen: list[Part] = []
    for place in rng.permutation(len(parts)):
        if len(chosen) >= _FEWEST_PARTS and sum(part.num_rows for part in chosen) >= _SPARE * num_rows:
            break
        chosen.append(parts[place])
    return chosen


def _joined(tables: Sequence[list[pa.Table]]) -> pa.Table:
    """Return captions and failures as one table by key, with nulls where one of them lacks a column."""
    rows = [part for kind in tables for part in kind]
    if not rows:
        return pa.table({"key": pa.array([], pa.int64()), "image_id": pa.array([], pa.string())})
    return pa.concat_tables(rows, promote_options="default").sort_by("key")
