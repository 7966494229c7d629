"""The audit of a table: did each row of the input come out exactly once, and is each byte as it was written?

    audit(table, frozen, ids_of)

Streams: memory holds a few parts, a byte for each row of the input, and some two for each failed attempt. Reads every
part whole. Changes nothing; `repair` acts on what it finds.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.inputs import Frozen
from captioner.schema import FAILURES, MAX_UNIT_ROWS, captions_schema
from captioner.storage.faults import StoreError
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import name, redact
from captioner.tables.failures import FAILURE_COLUMNS, FailedAttempts
from captioner.tables.keys import KeySet
from captioner.tables.layouts import is_known_layout
from captioner.tables.parts import PartName, footer, has_digest, is_intact, read_ahead
from captioner.tables.table import FOLDERS, CaptionTable

__all__ = ["Audit", "IdsOf", "Problem", "audit"]

_READERS = 4  # parts that are held at the same time
_COLUMNS = {"captions": ["key", "image_id", "run_id"], "failures": [*FAILURE_COLUMNS, "image_id", "run_id"]}
IdsOf = Callable[[int], pa.ChunkedArray | None]
"""Unit ordinal -> image_id of each of its rows as the frozen input has them; None where that is not cheap to know."""


class Problem(NamedTuple):
    """Something in `captions/` or `failures/` that is not a part as it was written."""

    kind: Literal["torn", "foreign", "unknown"]
    url: str
    why: str


@dataclass
class Audit:
    """What `audit` found, under the names that it has in the summary of jobs/verify.py."""

    read: int | None
    captioned: int
    failed: int
    failed_by_reason: dict[str, int]
    missing: int
    duplicated: int
    alien: int
    """Orphan rows: of no row of the input."""
    alien_failures: int
    """Those of them that a repair drops: failures of units whose rows were not counted yet."""
    misnamed: int
    """Rows with another image_id than the input has at their place."""
    unread_units: int
    torn_parts: list[str]
    foreign_parts: list[str]
    strangers: list[str]
    """Files and folders that no run writes."""

    @property
    def is_whole(self) -> bool:
        """True if every row of the input came out exactly once, and nothing else did."""
        wrong = self.missing or self.duplicated or self.alien or self.misnamed or self.unread_units
        return not (wrong or self.torn_parts or self.foreign_parts or self.strangers)


class _Part(NamedTuple):
    """A part that was read: its problem, or its rows."""

    problem: Problem | None
    rows: pa.Table | None = None  # FAILURE_COLUMNS, or the key alone
    num_misnamed: int = 0


def audit(table: CaptionTable, frozen: Frozen, ids_of: IdsOf = lambda _: None) -> tuple[Audit, list[Problem]]:
    """Return whether each row of the input came out exactly once, and what is wrong with which file. Raises StoreError.

    ids_of: the image_ids of the input, to compare those of the rows with.
    """
    reader = _Reader(table, frozen, ids_of)
    seen = _Seen()
    for folder in FOLDERS:
        for entry in table.store.entries(table.location / folder):
            if entry.is_folder or not _is_part(name(entry.url)):
                seen.note_unknown(entry.url)
        for _, part in read_ahead(reader.part, [(folder, url) for url in table.parts(folder)], _READERS):
            seen.add(folder, part)
    return seen.judge({unit.ordinal: unit.num_rows for unit in frozen.units}), seen.problems


def _is_part(base: str) -> bool:
    return base.endswith(".parquet") and not base.startswith((".", "_"))


class _Reader:
    """Reads one part and checks all that can be checked of it alone; several threads call it."""

    def __init__(self, table: CaptionTable, frozen: Frozen, ids_of: IdsOf) -> None:
        self._store = table.store
        self._identity = table.digest
        self._run_ids = table.run_ids()
        self._schemas = {"captions": captions_schema(frozen.columns.kept, table.answers()), "failures": FAILURES}
        self._ids_of = ids_of

    def part(self, place: tuple[str, str]) -> _Part:
        """Return what the part (folder, URL) holds, or what is wrong with it."""
        folder, url = place
        try:
            data = self._store.read_bytes(url)
            with open_parquet_file(data, page_checksum_verification=True) as file:
                metadata, schema = file.metadata.metadata, file.schema_arrow
                rows = file.read(columns=_COLUMNS[folder], use_threads=False)
        except StoreError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            return _Part(Problem("torn", url, f"cannot be read: {' '.join(str(error).split())[:200]}"))
        if why := self._is_foreign(metadata):
            return _Part(Problem("foreign", url, why))
        if not is_intact(data):
            return _Part(Problem("torn", url, "its bytes are not those that were written"))
        if not is_known_layout(schema, self._schemas[folder]):
            # Whole as it is, perhaps of a later release: a repair must not put it aside.
            kind: Literal["foreign", "torn"] = "foreign" if has_digest(data) else "torn"
            return _Part(Problem(kind, url, f"its columns are not those of {folder}"))
        if why := self._is_wrong(folder, url, rows, footer(metadata).run_id):
            return _Part(Problem("torn", url, why))
        columns = ["key"] if folder == "captions" else FAILURE_COLUMNS
        return _Part(None, rows.select(columns), self._num_misnamed(rows))

    def _is_foreign(self, metadata: dict[bytes, bytes]) -> str:
        stamp = footer(metadata)
        if stamp.identity != self._identity:
            return f"belongs to another table: its footer says {stamp.identity or 'nothing'}"
        if stamp.run_id not in self._run_ids:
            return f"its footer names run {stamp.run_id}, which has no record in _run/runs/"
        return ""

    def _is_wrong(self, folder: str, url: str, rows: pa.Table, run_id: str) -> str:
        named = PartName.parse(name(url))
        if named is None:
            return "its name is not one that a part has"
        if named.run_id != run_id:
            return f"its name says run {named.run_id}, and its footer run {run_id}"
        if not named.fits(folder, rows):
            return "it holds other rows than its name says"
        unknown = set(rows.column("run_id").unique().to_pylist()) - self._run_ids
        return f"rows of runs without a record in _run/runs/: {', '.join(sorted(unknown))}" if unknown else ""

    def _num_misnamed(self, rows: pa.Table) -> int:
        """Return how many rows have another image_id than the frozen input; rows of no input row count as orphans."""
        keys, ids = rows.column("key").to_numpy(), rows.column("image_id")
        count = 0
        for unit in np.unique(keys >> 32):
            expected = self._ids_of(int(unit))
            if expected is None:
                continue
            is_here = (keys >> 32 == unit) & (keys & (MAX_UNIT_ROWS - 1) < len(expected))
            wanted = expected.take(pa.array(keys[is_here] & (MAX_UNIT_ROWS - 1)))
            count += pc.sum(pc.not_equal(ids.filter(pa.array(is_here)), wanted)).as_py() or 0
        return count


@dataclass
class _Seen:
    """What an audit has read so far."""

    captioned: KeySet = field(default_factory=KeySet)
    failures: FailedAttempts = field(default_factory=FailedAttempts)
    problems: list[Problem] = field(default_factory=list)
    duplicated: int = 0
    misnamed: int = 0

    def note_unknown(self, url: str) -> None:
        if not name(url).startswith("."):  # temporaries of writers, which readers of *.parquet do not see
            kind = "folder" if url.endswith("/") else "file"
            self.problems.append(Problem("unknown", url, f"a {kind} that no run writes"))

    def add(self, folder: str, part: _Part) -> None:
        if part.problem is not None or part.rows is None:
            self.problems += [part.problem] if part.problem else []
            return
        self.misnamed += part.num_misnamed
        if folder == "captions":
            self.duplicated += len(self.captioned.add(part.rows.column("key").to_numpy()))
        else:
            self.failures.add(part.rows)

    def judge(self, unit_rows: dict[int, int | None]) -> Audit:
        failed, reasons = self._failed()
        present = _union(self.captioned, failed)
        expected = [(unit, rows) for unit, rows in unit_rows.items() if rows is not None]
        missing = sum(rows - present.count(unit, stop=rows) for unit, rows in expected)
        return Audit(
            read=sum(rows for _, rows in expected) if len(expected) == len(unit_rows) else None,
            captioned=self.captioned.count(),
            failed=failed.count(),
            failed_by_reason=reasons,
            missing=missing,
            duplicated=self.duplicated,
            alien=_num_orphans(present, unit_rows),
            alien_failures=_num_orphans(failed, unit_rows),
            misnamed=self.misnamed,
            unread_units=len(unit_rows) - len(expected),
            torn_parts=self._urls("torn"),
            foreign_parts=self._urls("foreign"),
            strangers=self._urls("unknown"),
        )

    def _urls(self, kind: str) -> list[str]:
        return [redact(problem.url) for problem in self.problems if problem.kind == kind]

    def _failed(self) -> tuple[KeySet, dict[str, int]]:
        """Return the keys that have failures and no caption, and how many have each reason at their last attempt."""
        self.duplicated += self.failures.num_duplicates
        failed, reasons = KeySet(), Counter[str]()
        for rows in self.failures.last(self.captioned):
            failed.add(rows.column("key").to_numpy())
            reasons.update(rows.column("reason").to_pylist())
        return failed, dict(reasons)


def _num_orphans(keys: KeySet, unit_rows: Mapping[int, int | None]) -> int:
    behind = sum(keys.count(unit, start=rows) for unit, rows in unit_rows.items() if rows is not None)
    return behind + sum(keys.count(unit) for unit in keys.units - set(unit_rows))


def _union(first: KeySet, second: KeySet) -> KeySet:
    union = KeySet()
    for keys in (first, second):
        for span in keys.spans:
            union.add(keys.keys_of(span))
    return union
