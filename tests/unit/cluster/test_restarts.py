"""How often a worker may start again."""

import pytest

from captioner.cluster.restarts import Start, next_start
from captioner.errors import JobError


def started(num: int, *, lived_s: float | None, alive: bool = True) -> Start:
    """The start after so many processes, each of which lived so long after loading (None: died before)."""
    start, now = next_start(None, "0", "n0", alive={"n0"}, now=0.0), 0.0
    for process in range(1, num + 1):
        if lived_s is not None:
            start = Start(process=start.process, node=start.node, num_ended=start.num_ended, loaded_at=now)
            now += lived_s
        here = {f"n{process - 1}"} if alive else set()
        start = next_start(start, str(process), f"n{process}", alive=here, now=now)
    return start


def test_a_worker_that_is_killed_each_time_it_loads_is_given_up_with_the_cause() -> None:
    assert started(2, lived_s=None).num_ended == 2
    with pytest.raises(JobError, match=r"killed 3 times in a row while it loaded.* too little memory"):
        started(3, lived_s=None)


def test_a_worker_that_dies_soon_after_loading_is_given_up_later() -> None:
    started(9, lived_s=5)
    with pytest.raises(JobError, match="killed 10 times in a row within 10 minutes of loading"):
        started(10, lived_s=5)


def test_lost_nodes_and_long_lives_are_not_counted() -> None:
    assert started(50, lived_s=None, alive=False).num_ended == 0
    assert started(50, lived_s=3600).num_ended == 0


def test_a_second_try_of_the_same_process_is_no_other_start() -> None:
    first = started(2, lived_s=None)
    assert next_start(first, first.process, first.node, alive={first.node}, now=0.0) == first
