"""Sets of rows of a folder."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from captioner.schema import row_key
from captioner.tables.row_set import RowSet, is_repeated_later
from tests.hypothesis_profiles import max_examples

rows = st.lists(st.tuples(st.builds(row_key, st.integers(0, 2), st.integers(0, 9)), st.integers(0, 2)), max_size=40)


def columns(found: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([key for key, _ in found], np.int64), np.array([attempt for _, attempt in found], np.int64)


@given(rows, rows, st.integers(1, 7))
@max_examples(50)
def test_a_set_of_rows_knows_them_counts_them_and_steps_through_them_in_order(
    first: list[tuple[int, int]], then: list[tuple[int, int]], step: int
) -> None:
    found = RowSet()
    found.add(*columns(first))
    again = found.add(*columns(then))
    assert set(zip(*(column.tolist() for column in again), strict=True)) == {
        row for row in then if row in first or then.count(row) > 1
    }
    in_order = sorted({*first, *then})
    assert len(found) == len(in_order)
    assert found.contains(*columns([*first, *then])).all()
    assert list(found.every(step)) == in_order[::step]


@given(rows)
@max_examples(50)
def test_of_equal_rows_all_but_the_last_are_repeated_later(found: list[tuple[int, int]]) -> None:
    assert is_repeated_later(*columns(found)).tolist() == [row in found[place + 1 :] for place, row in enumerate(found)]
