"""The audit of a table: did each row of the input come out exactly once, and is each byte as it was written?

    audit(table, frozen, ids_of)

Each column family is proved by itself: of an added prompt, that each image with a caption has one answer, or failed.
Streams: memory holds a few parts, a byte for each row of the input, and some two for each failed attempt. Reads every
part whole. Changes nothing; `repair` acts on what it finds.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.inputs import Frozen
from captioner.schema import MAX_UNIT_ROWS
from captioner.storage.faults import StoreError
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import name, redact
from captioner.tables.column_family import COLUMNS, ColumnFamily
from captioner.tables.failures import FAILURE_COLUMNS, FailedAttempts
from captioner.tables.keys import KeySet, common
from captioner.tables.layouts import is_known_layout
from captioner.tables.parts import PartName, footer, has_digest, is_intact, read_ahead
from captioner.tables.table import CaptionTable

__all__ = ["AddedAudit", "Audit", "IdsOf", "Problem", "audit"]

_READERS = 4  # parts that are held at the same time
_NAMES = ["image_id", "run_id"]
IdsOf = Callable[[int], pa.ChunkedArray | None]
"""Unit ordinal -> image_id of each of its rows as the frozen input has them; None where that is not cheap to know."""


class Problem(NamedTuple):
    """Something in a folder of parts that is not a part as it was written."""

    kind: Literal["torn", "foreign", "unknown"]
    url: str
    why: str


@dataclass
class AddedAudit:
    """What an audit found of a prompt that was added later."""

    answered: int
    failed: int
    """Images that have a caption and no answer, since they failed."""

    failed_by_reason: dict[str, int]
    missing: int
    """Images that have a caption and neither an answer nor a failure."""

    duplicated: int
    alien: int
    """Rows of no row of the input."""

    alien_failures: int
    misnamed: int

    @property
    def is_whole(self) -> bool:
        """True if every image with a caption has one answer or failed, and there is nothing else."""
        return not (self.missing or self.duplicated or self.alien or self.misnamed)


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

    columns: dict[str, AddedAudit]
    """Of each prompt that was added later, by its name."""

    @property
    def is_whole(self) -> bool:
        """True if every row of the input came out exactly once in each column, and nothing else did."""
        return self.has_whole_captions and all(found.is_whole for found in self.columns.values())

    @property
    def has_whole_captions(self) -> bool:
        """True if that is so of captions and failures, and of every file."""
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
    families = table.families()
    reader = _Reader(table, frozen, ids_of)
    problems = list(_unknown(table, families))
    captions, *added = (_Seen(family, reader, problems) for family in families)
    unit_rows = {unit.ordinal: unit.num_rows for unit in frozen.units}
    return captions.judge(
        unit_rows, {one.family.prompt: one.judge_added(unit_rows, captions) for one in added}
    ), problems


def _unknown(table: CaptionTable, families: Sequence[ColumnFamily]) -> Iterator[Problem]:
    """Yield what lies where a run writes parts, or the folders of prompts, and is neither."""
    known = {COLUMNS: [family.prompt for family in families if family.is_added]}
    known |= {f"{COLUMNS}/{name}": ["answers", "failures", "prompt.json"] for name in known[COLUMNS]}
    for folder in (*known, *(folder for family in families for folder in family.folders)):
        for entry in table.store.entries(table.location / folder):
            base = name(entry.url.rstrip("/"))
            is_known = base in known[folder] if folder in known else not entry.is_folder and _is_part(base)
            if not is_known and not base.startswith("."):  # temporaries of writers, which no reader of *.parquet sees
                kind = "folder" if entry.is_folder else "file"
                yield Problem("unknown", entry.url, f"a {kind} that no run writes")


def _is_part(base: str) -> bool:
    return base.endswith(".parquet") and not base.startswith((".", "_"))


class _Reader:
    """Reads one part and checks all that can be checked of it alone; several threads call it."""

    def __init__(self, table: CaptionTable, frozen: Frozen, ids_of: IdsOf) -> None:
        self.table = table
        self._store = table.store
        self._run_ids = table.run_ids()
        self._kept = frozen.columns.kept
        self._ids_of = ids_of

    def part(self, url: str, folder: str, family: ColumnFamily) -> _Part:
        """Return what a part in a folder of a family holds, or what is wrong with it."""
        columns = FAILURE_COLUMNS if folder == family.failures else ["key"]
        try:
            data = self._store.read_bytes(url)
            with open_parquet_file(data, page_checksum_verification=True) as file:
                metadata, schema = file.metadata.metadata, file.schema_arrow
                rows = file.read(columns=[*columns, *_NAMES], use_threads=False)
        except StoreError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            return _Part(Problem("torn", url, f"cannot be read: {' '.join(str(error).split())[:200]}"))
        if why := self._is_foreign(metadata, family):
            return _Part(Problem("foreign", url, why))
        if not is_intact(data):
            return _Part(Problem("torn", url, "its bytes are not those that were written"))
        if not is_known_layout(schema, family.schema(folder, self._kept)):
            # Whole as it is, perhaps of a later release: a repair must not put it aside.
            kind: Literal["foreign", "torn"] = "foreign" if has_digest(data) else "torn"
            return _Part(Problem(kind, url, f"its columns are not those of {folder}"))
        if why := self._is_wrong(folder, url, rows, footer(metadata).run_id):
            return _Part(Problem("torn", url, why))
        return _Part(None, rows.select(columns), self._num_misnamed(rows))

    def _is_foreign(self, metadata: dict[bytes, bytes], family: ColumnFamily) -> str:
        stamp = footer(metadata)
        if stamp.identity != family.digest:
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


class _Seen:
    """What an audit has read of one family."""

    def __init__(self, family: ColumnFamily, reader: _Reader, problems: list[Problem]) -> None:
        """Read it. problems: gets those of its files."""
        self.family = family
        self.filled, self._failures = KeySet(), FailedAttempts()
        self._problems = problems
        self._duplicated = self._misnamed = 0
        for folder in family.folders:
            read = partial(reader.part, folder=folder, family=family)
            for _, part in read_ahead(read, reader.table.parts(folder), _READERS):
                self._add(folder, part)
        self._duplicated += self._failures.num_duplicates
        self._failed, self._reasons = self._last_failures()

    def _add(self, folder: str, part: _Part) -> None:
        if part.problem is not None or part.rows is None:
            self._problems += [part.problem] if part.problem else []
            return
        self._misnamed += part.num_misnamed
        if folder == self.family.rows:
            self._duplicated += len(self.filled.add(part.rows.column("key").to_numpy()))
        else:
            self._failures.add(part.rows)

    def _last_failures(self) -> tuple[KeySet, dict[str, int]]:
        """Return the keys that failed and were not filled, and how many have each reason at their last attempt."""
        failed, reasons = KeySet(), Counter[str]()
        for rows in self._failures.last(self.filled):
            failed.add(rows.column("key").to_numpy())
            reasons.update(rows.column("reason").to_pylist())
        return failed, dict(reasons)

    def _present(self) -> KeySet:
        present = KeySet()
        present.update(self.filled)
        present.update(self._failed)
        return present

    def judge(self, unit_rows: dict[int, int | None], columns: dict[str, AddedAudit]) -> Audit:
        """Return the audit of a table whose captions these are. columns: of its added prompts."""
        present = self._present()
        expected = [(unit, rows) for unit, rows in unit_rows.items() if rows is not None]
        missing = sum(rows - present.count(unit, stop=rows) for unit, rows in expected)
        return Audit(
            read=sum(rows for _, rows in expected) if len(expected) == len(unit_rows) else None,
            captioned=self.filled.count(),
            failed=self._failed.count(),
            failed_by_reason=self._reasons,
            missing=missing,
            duplicated=self._duplicated,
            alien=_num_orphans(present, unit_rows),
            alien_failures=_num_orphans(self._failed, unit_rows),
            misnamed=self._misnamed,
            unread_units=len(unit_rows) - len(expected),
            torn_parts=self._urls("torn"),
            foreign_parts=self._urls("foreign"),
            strangers=self._urls("unknown"),
            columns=columns,
        )

    def judge_added(self, unit_rows: dict[int, int | None], captions: "_Seen") -> AddedAudit:
        """Return the audit of an added prompt, which is asked of the images that have a caption.

        What it has of other rows of the input is left out: a repair put their captions aside."""
        present = self._present()
        return AddedAudit(
            answered=common(self.filled, captions.filled).count(),
            failed=common(self._failed, captions.filled).count(),
            failed_by_reason=self._reasons,
            missing=captions.filled.count() - common(present, captions.filled).count(),
            duplicated=self._duplicated,
            alien=_num_orphans(present, unit_rows),
            alien_failures=_num_orphans(self._failed, unit_rows),
            misnamed=self._misnamed,
        )

    def _urls(self, kind: str) -> list[str]:
        return [redact(problem.url) for problem in self._problems if problem.kind == kind]


def _num_orphans(keys: KeySet, unit_rows: Mapping[int, int | None]) -> int:
    behind = sum(keys.count(unit, start=rows) for unit, rows in unit_rows.items() if rows is not None)
    return behind + sum(keys.count(unit) for unit in keys.units - set(unit_rows))
