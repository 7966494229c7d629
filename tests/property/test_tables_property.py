"""Duplicate rows, torn parts, steps that a crash cuts short: each row is there once in the end, and at no time gone."""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from captioner.inputs import Frozen, Unit
from captioner.schema import TRANSIENT_REASONS, row_key
from captioner.tables import Audit, CaptionTable, Stamp, audit, compact, deduplicate, find_done, findings, repair
from tests.hypothesis_profiles import max_examples
from tests.unit.tables.test_tables import IDENTITY, captioned

NUM_ROWS = 12
RUNS = ("20260101T000000Z-aaaa", "20260102T000000Z-bbbb", "20260103T000000Z-cccc")
REPAIRER = "20260104T000000Z-dddd"
FROZEN = Frozen(
    kind="webdataset",
    units=tuple(
        Unit(ordinal=ordinal, kind="webdataset", path="x", name="x", num_rows=NUM_ROWS, size_bytes=None)
        for ordinal in range(2)
    ),
)

keys = st.builds(row_key, st.integers(0, 1), st.integers(0, NUM_ROWS - 1))
writes = st.lists(
    st.tuples(
        st.sampled_from(RUNS),
        st.lists(keys, min_size=1, max_size=6, unique=True),
        st.dictionaries(keys, st.sampled_from(["corrupt", "fetch_failed"]), max_size=3),
        st.integers(1, 2),
    ),
    min_size=1,
    max_size=6,
)
"""Calls of `write` by runs that knew nothing of each other: run, captioned keys, failed keys, attempt."""


class KilledError(BaseException):
    """The process dies here: nothing may catch it."""


@contextmanager
def made(calls: list[tuple[str, list[int], dict[int, str], int]]) -> Iterator[CaptionTable]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as folder:  # in memory: see conftest
        table = CaptionTable(f"{folder}/out")
        table.claim(IDENTITY)
        for run_id in (*RUNS, REPAIRER):
            table.record(run_id, {})
        for run_id, captions, failures, attempt in calls:
            failed = {key: reason for key, reason in failures.items() if key not in captions}
            table.write(captioned(captions, failed, attempt), Stamp(run_id, table.digest))
        yield table


def rows(table: CaptionTable) -> tuple[Counter[int], Counter[tuple[int, int]]]:
    """How often a reader of the two folders sees each caption and each failed attempt."""
    columns = {"captions": ["key", "caption"], "failures": ["key", "attempt"]}
    found: dict[str, list[dict[str, Any]]] = {
        folder: [
            row
            for part in Path(table.location.local_path, folder).glob("*.parquet")
            for row in pq.ParquetFile(part).read(wanted, use_threads=False).to_pylist()
        ]
        for folder, wanted in columns.items()
    }
    assert all(row["caption"] == f"caption {row['key']}" for row in found["captions"])
    return (
        Counter(row["key"] for row in found["captions"]),
        Counter((row["key"], row["attempt"]) for row in found["failures"]),
    )


@dataclass
class Killer:
    """Kills at the n-th change of the store, before or after it happens, and checks the readers' view after each."""

    table: CaptionTable
    at: int
    is_after: bool
    look: Callable[[], None] = lambda: None
    num_changes: int = 0
    lock: Lock = field(default_factory=Lock)  # files are removed by several threads

    def wrap(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any) -> Any:
            with self.lock:
                self.num_changes += 1
                if self.num_changes > self.at or (self.num_changes == self.at and not self.is_after):
                    raise KilledError
                result = change(*arguments)
                self.look()
                if self.num_changes == self.at:
                    raise KilledError
                return result

        return changed


@contextmanager
def killed(
    table: CaptionTable, at: int, *, is_after: bool, look: Callable[[], None] = lambda: None
) -> Iterator[Killer]:
    killer, store = Killer(table, at, is_after, look), table.store
    names = ("write_atomic", "move", "remove", "exchange")
    try:
        for name in names:
            setattr(store, name, killer.wrap(getattr(store, name)))
        yield killer
    except KilledError:
        pass
    finally:
        for name in names:
            vars(store).pop(name, None)


def audited(table: CaptionTable) -> Audit:
    return audit(table, FROZEN)[0]


def repaired(table: CaptionTable) -> None:
    repair(table, FROZEN, list(findings(table, FROZEN, audit(table, FROZEN)[1])), REPAIRER)


def is_each_once(table: CaptionTable, captions: set[int], failures: set[tuple[int, int]]) -> bool:
    return rows(table) == (Counter(dict.fromkeys(captions, 1)), Counter(dict.fromkeys(failures, 1)))


@given(writes, st.integers(1, 30), st.booleans())
@max_examples(25)
def test_a_deduplication_that_dies_anywhere_and_one_after_it_leave_each_row_once(
    calls: list[tuple[str, list[int], dict[int, str], int]], at: int, is_after: bool
) -> None:
    with made(calls) as table:
        before = rows(table)
        captions, failures = set(before[0]), set(before[1])

        def look() -> None:
            now = rows(table)
            assert (set(now[0]), set(now[1])) == (captions, failures), "a row was nowhere for a moment"

        with killed(table, at, is_after=is_after, look=look):
            deduplicate(table, REPAIRER)
        deduplicate(table, REPAIRER)
        assert is_each_once(table, captions, failures)
        found = audited(table)
        assert (found.duplicated, found.torn_parts, found.foreign_parts, found.strangers) == (0, [], [], [])


@given(writes, st.integers(0, 5), st.integers(1, 200), st.integers(1, 20), st.booleans())
@max_examples(30)
def test_a_repair_of_a_torn_table_keeps_every_row_of_every_whole_part(
    calls: list[tuple[str, list[int], dict[int, str], int]], torn: int, offset: int, at: int, is_after: bool
) -> None:
    with made(calls) as table:
        parts = [Path(part) for folder in ("captions", "failures") for part in table.parts(folder)]
        data = bytearray((broken := parts[torn % len(parts)]).read_bytes())
        data[offset % len(data)] ^= 0x40
        broken.write_bytes(data)
        kept = [row for part in parts if part != broken for row in pq.read_table(part).to_pylist()]
        captions = {row["key"] for row in kept if "caption" in row}
        failures = {(row["key"], row["attempt"]) for row in kept if "reason" in row}
        for run in (at, 1000):
            with killed(table, run, is_after=is_after):
                repaired(table)
        assert is_each_once(table, captions, failures)
        assert list(findings(table, FROZEN, audit(table, FROZEN)[1])) == []
        assert len(list(Path(table.run_folder.local_path, "removed").rglob(broken.name))) == 1


@given(writes, st.integers(1, 12), st.integers(1, 60), st.booleans(), st.booleans())
@max_examples(30)
def test_a_compaction_that_dies_anywhere_leaves_a_table_that_the_next_run_reads_right(
    calls: list[tuple[str, list[int], dict[int, str], int]],
    rows_per_part: int,
    at: int,
    is_after: bool,
    exchanges: bool,
) -> None:
    with made(calls) as table:
        deduplicate(table, REPAIRER)
        before = rows(table)
        done = find_done(table, lambda reason: reason in TRANSIENT_REASONS)

        def look() -> None:
            now = rows(table)
            assert now == before if exchanges else set(now[0]) == set(before[0]) and set(now[1]) == set(before[1])

        compacting = table.take_lease("compact")
        with compacting as lease, killed(table, at, is_after=is_after, look=look):
            if not exchanges:
                table.store.exchange = lambda folder, other: False  # type: ignore[method-assign]
            table.record(lease.run_id, {})
            compact(table, lease.run_id, target_bytes=rows_per_part * 1000)
        after = find_done(table, lambda reason: reason in TRANSIENT_REASONS)
        if after.num_duplicates:
            deduplicate(table, REPAIRER)
            after = find_done(table, lambda reason: reason in TRANSIENT_REASONS)
        assert (after.num_duplicates, after.attempts) == (0, done.attempts)
        assert (after.num_captioned, after.num_failed) == (done.num_captioned, done.num_failed)
        assert rows(table) == before
        found = audited(table)
        assert (found.duplicated, found.torn_parts, found.foreign_parts, found.strangers) == (0, [], [], [])


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "replaced"])
def test_a_whole_compaction_makes_few_sorted_parts_and_leaves_nothing_behind(exchanges: bool) -> None:
    calls = [(RUNS[0], [key, 20 - key], {}, 1) for key in range(10)]
    with made(calls) as table, table.take_lease("compact") as lease:
        if not exchanges:
            table.store.exchange = lambda folder, other: False  # type: ignore[method-assign]
        before = rows(table)
        table.record(lease.run_id, {})
        assert compact(table, lease.run_id) == {"captions": (10, 1), "failures": (0, 0)}
        [part] = table.parts("captions")
        assert pq.read_table(part).column("key").to_pylist() == sorted(before[0])
        assert [str(path) for path in Path(table.run_folder.local_path).glob("compact-*/*/*")] == []
        assert list(findings(table, FROZEN, audit(table, FROZEN)[1])) == []
        assert compact(table, lease.run_id) == {"captions": (1, 1), "failures": (0, 0)}
        assert rows(table) == before


def test_attempts_of_one_image_that_a_compaction_puts_in_several_parts_are_all_kept() -> None:
    calls = [(RUNS[attempt - 1], list[int](), {1: "corrupt", 2: "corrupt"}, attempt) for attempt in (1, 2)]
    with made(calls) as table, table.take_lease("compact") as lease:
        before = rows(table)
        table.record(lease.run_id, {})
        assert compact(table, lease.run_id, target_bytes=1) == {"captions": (0, 0), "failures": (2, 4)}
        assert rows(table) == before


@given(st.integers(0), st.integers(1, 255))
@max_examples(30)
def test_a_byte_that_changes_anywhere_in_a_part_is_found(place: int, flip: int) -> None:
    with made(
        [(RUNS[0], list(range(NUM_ROWS)), {}, 1), (RUNS[0], [row_key(1, n) for n in range(NUM_ROWS)], {}, 1)]
    ) as table:
        assert audited(table).is_whole
        part = Path(table.parts("captions")[0])
        data = bytearray(part.read_bytes())
        data[place % len(data)] ^= flip
        part.write_bytes(data)
        found = audited(table)
        assert not found.is_whole
        assert [*found.torn_parts, *found.foreign_parts] == [str(part)]


@given(writes, st.integers(1, 9), st.booleans())
@example([(RUNS[1], [], {row_key(0, 0): "corrupt"}, 1)], 9, False)  # one run's failures of one key, two attempts
@max_examples(12)
def test_a_repair_that_dies_anywhere_and_one_after_it_drop_orphan_failures_and_no_other_row(
    calls: list[tuple[str, list[int], dict[int, str], int]], at: int, is_after: bool
) -> None:
    strays = [row_key(1, NUM_ROWS), row_key(1, NUM_ROWS + 5), row_key(2, 0)]  # behind an end, and of no unit
    with made(calls) as table:
        captions, failures = rows(table)
        for of_part in ([*strays, row_key(0, 0)], strays):
            table.write(captioned([], dict.fromkeys(of_part, "fetch_failed"), 9), Stamp(RUNS[1], table.digest))
        assert audited(table).alien == audited(table).alien_failures == len(strays)
        for run in (at, 1000):
            with killed(table, run, is_after=is_after):
                repaired(table)
        found = audited(table)
        assert (found.alien, found.duplicated, found.torn_parts, found.strangers) == (0, 0, [], [])
        assert is_each_once(table, set(captions), set(failures) | {(row_key(0, 0), 9)})
