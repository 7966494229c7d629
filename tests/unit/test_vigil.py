"""A job whose Ray is gone ends with a reason: wherever its main thread waits."""

import signal
import threading
import time
from queue import Queue

import pytest

from captioner.errors import JobError
from captioner.vigil import vigil


def test_a_block_that_waits_for_what_is_gone_ends_with_an_error_that_names_it() -> None:
    began = time.monotonic()
    watched = vigil(lambda: "the raylet" if time.monotonic() > began + 0.05 else None, every_s=0.01)
    with pytest.raises(JobError, match=r"the raylet is gone.*The same command continues"), watched:
        Queue[None]().get(timeout=30)
    assert time.monotonic() < began + 20


def test_a_block_in_which_nothing_is_lost_goes_on_and_leaves_the_signal_as_it_was() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with vigil(lambda: None, every_s=0.01):
        time.sleep(0.05)
        assert signal.getsignal(signal.SIGUSR2) != before
    assert signal.getsignal(signal.SIGUSR2) == before
    assert "vigil" not in {thread.name for thread in threading.enumerate()}


def test_in_another_thread_than_the_main_one_nothing_is_watched() -> None:
    ended: list[bool] = []

    def work() -> None:
        with vigil(lambda: "the raylet", every_s=0.01):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended
