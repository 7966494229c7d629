"""Sets of row keys."""

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from captioner.schema import MAX_UNIT_ROWS, row_key, split_key
from captioner.tables.keys import KeySet
from captioner.tables.row_set import RowSet
from tests.hypothesis_profiles import max_examples

positions = st.integers(0, 9) | st.sampled_from([65_535, 65_536, 200_000, MAX_UNIT_ROWS - 1])
keys = st.lists(st.builds(row_key, st.integers(0, 2), positions), max_size=40)


@given(keys, keys)
@max_examples(50)
def test_a_set_of_keys_is_a_set(first: list[int], then: list[int]) -> None:
    found = KeySet()
    found.add(np.array(first, np.int64))
    again = found.add(np.array(then, np.int64))
    everything = {*first, *then}
    assert set(again.tolist()) == {key for key in then if key in first or then.count(key) > 1}
    assert found.count() == len(everything)
    assert found.units == {split_key(key)[0] for key in everything}
    assert [key for span in found.spans for key in found.keys_of(span).tolist()] == sorted(everything)
    asked = [*first, *then, row_key(1, 5), row_key(3, 0)]
    assert found.contains(np.array(asked)).tolist() == [key in everything for key in asked]
    for unit in range(3):
        own = {position for key in everything for of, position in [split_key(key)] if of == unit}
        assert found.end(unit) == max(own, default=-1) + 1
        assert found.count(unit, start=3, stop=65_536) == len({place for place in own if 3 <= place < 65_536})
        assert np.flatnonzero(found.positions(unit, 70_000, 4)).tolist() == sorted(
            p - 4 for p in own if 4 <= p < 70_000
        )


def test_a_container_with_many_keys_is_a_set_too() -> None:
    found = KeySet()
    shuffled = np.random.default_rng(0).permutation(100_000)
    for piece in np.split(shuffled, 20):
        assert not len(found.add(piece))
    assert len(found.add(shuffled[:7])) == 7
    assert (found.count(), found.end(0)) == (100_000, 100_000)
    assert found.positions(0, 100_000).all()
    assert not found.contains(np.array([100_000, row_key(0, 131_071)])).any()


def test_keys_made_up_to_be_far_apart_take_little_memory() -> None:
    """A key at the end of a unit took 4 GB, and each attempt at one row a megabyte."""
    tracemalloc.start()
    far = KeySet()
    far.add(np.array([row_key(unit, MAX_UNIT_ROWS - 1 - unit) for unit in range(1_000)]))
    assert far.count(3, start=1_000_000_000) == 1
    rows = RowSet()
    rows.add(np.zeros(2_000, np.int64), np.arange(2_000))
    assert rows.contains(np.zeros(2, np.int64), np.array([7, 3_000])).tolist() == [True, False]
    assert len(list(rows.every(2))) == 1_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
