"""For what part of its time a model waited: one clock a worker, held busy by several threads."""

import pyarrow as pa

from captioner.captioning.model_clock import ModelClock
from captioner.schema import captioned_schema
from captioner.tables.clock_readings import Reading, first_caption_at, last_readings, waited_share


class Hand:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_time_counts_as_waited_unless_some_call_is_with_the_model() -> None:
    hand = Hand()
    clock = ModelClock(now=hand)
    hand.now_s += 3
    with clock.busy():
        hand.now_s += 1
        with clock.busy():
            hand.now_s += 1
        hand.now_s += 1
        assert (clock.read().waited_s, clock.read().ready_s) == (3, 6)
    hand.now_s += 4
    assert (clock.read().waited_s, clock.read().ready_s) == (7, 10)
    hand.now_s += 1
    with clock.busy():
        assert (clock.read().waited_s, clock.read().ready_s) == (8, 11)


def test_the_share_is_of_the_time_of_all_workers_by_the_last_word_of_each() -> None:
    early, late = Reading("a", 1.0, 2.0), Reading("a", 2.0, 10.0)
    assert waited_share([late, early, Reading("b", 28.0, 30.0)]) == 30 / 40
    assert waited_share([]) is None


def test_a_part_keeps_the_last_reading_of_each_worker_and_nothing_of_rows_without() -> None:
    kind = captioned_schema().field("model_clock").type
    readings = [
        {"worker": "a", "waited_s": 1.0, "ready_s": 2.0, "first_at": None},
        None,
        {"worker": "b", "waited_s": 0.0, "ready_s": 1.0, "first_at": None},
        {"worker": "a", "waited_s": 1.5, "ready_s": 4.0, "first_at": 900.0},
    ]
    column = pa.chunked_array([pa.array(readings[:2], kind), pa.array(readings[2:], kind)])
    found = sorted(last_readings(column), key=lambda reading: reading.worker)
    assert found == [Reading("a", 1.5, 4.0, 900.0), Reading("b", 0.0, 1.0)]
    assert last_readings(pa.chunked_array([pa.array([None], kind)])) == ()


def test_the_first_caption_is_that_of_the_first_worker_and_stays_the_first() -> None:
    wall = Hand()
    clock = ModelClock(wall=wall)
    assert clock.read().first_at is None
    for _ in range(2):
        wall.now_s += 5
        with clock.busy():
            pass
    assert clock.read().first_at == 105
    assert first_caption_at([clock.read(), Reading("b", 0.0, 1.0, 103.0), Reading("c", 0.0, 1.0)]) == 103
    assert first_caption_at([Reading("c", 0.0, 1.0)]) is None
