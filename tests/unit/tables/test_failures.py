"""Failed attempts: the last of each key, the ones that are there twice, and what they take."""

import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from captioner.schema import MAX_UNIT_ROWS, row_key
from captioner.tables.failures import FailedAttempts
from captioner.tables.keys import KeySet
from tests.hypothesis_profiles import max_examples

attempts = st.tuples(
    st.builds(row_key, st.integers(0, 1), st.integers(0, 3) | st.sampled_from([65_536, MAX_UNIT_ROWS - 1])),
    st.integers(1, 3) | st.sampled_from([-1, 0, 15, 16, 2**31 - 1]),
)
reasons = st.sampled_from(["corrupt", "fetch_failed", "of a later release", ""])


def part(rows: list[tuple[int, int, str]]) -> pa.Table:
    keys, numbers, why = zip(*rows, strict=True) if rows else ((), (), ())
    columns = {"key": pa.array(keys, pa.int64()), "attempt": pa.array(numbers, pa.int32())}
    return pa.table({**columns, "reason": pa.array(why, pa.string())})


@given(
    st.lists(st.lists(st.tuples(attempts, reasons).map(lambda row: (*row[0], row[1])), max_size=6), max_size=4),
    st.sets(attempts.map(lambda row: row[0]), max_size=2),
)
@max_examples(100)
def test_of_each_key_the_highest_attempt_counts(parts: list[list[tuple[int, int, str]]], captioned: set[int]) -> None:
    failed, known = FailedAttempts(), KeySet()
    known.add(np.array(sorted(captioned), np.int64))
    for rows in parts:
        failed.add(part(rows))
    everything = [row for rows in parts for row in rows]
    times = Counter((key, attempt) for key, attempt, _ in everything)
    assert failed.num_duplicates == len(everything) - len(times)
    highest = {key: max(number for of, number in times if of == key) for key, _ in times if key not in captioned}
    found = [row for rows in failed.last(known) for row in rows.to_pylist()]
    assert {row["key"]: row["attempt"] for row in found} == highest
    assert len(found) == len(highest)
    assert {(row["key"], row["attempt"], row["reason"]) for row in found} <= set(everything)


def test_an_attempt_takes_two_bytes_and_one_of_an_unknown_reason_sixteen() -> None:
    failed, num_rows = FailedAttempts(), 1 << 18
    keys = np.arange(num_rows)
    reason = pa.DictionaryArray.from_arrays(np.zeros(num_rows, np.int32), ["corrupt"])
    parts = [
        pa.table({"key": keys, "attempt": np.full(num_rows, attempt, np.int32), "reason": reason.cast(pa.string())})
        for attempt in (1, 2)
    ]
    in_arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    for rows in parts:
        failed.add(rows)
    assert failed.num_duplicates == 0  # all are sorted in
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken + pa.total_allocated_bytes() - in_arrow < 2 * len(parts) * num_rows


def test_made_up_reasons_take_no_set_each() -> None:
    failed, num_rows = FailedAttempts(), 2000
    tracemalloc.start()
    failed.add(part([(key, 1 + key, f"reason {key}") for key in range(num_rows)]))
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 300 * num_rows  # `part` among it
    assert sum(rows.num_rows for rows in failed.last(KeySet())) == num_rows
