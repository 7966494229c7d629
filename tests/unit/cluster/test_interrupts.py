"""How a job ends early: the first signal lets it finish what it began; a second one, or the death of Ray, ends it."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest

from captioner.cluster.interrupts import stopping, watch_ray_processes
from captioner.cluster.watching import watching
from captioner.errors import JobError
from captioner.storage.stop_file import StopFile


@pytest.fixture
def file(tmp_path: Path) -> StopFile:
    return StopFile(str(tmp_path / "_run"), "run-1")


@pytest.fixture(autouse=True)
def _as_in_a_job() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for(file: StopFile) -> None:
    give_up = time.monotonic() + 200
    while not file.exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def job_with_one_signal(file: StopFile, *, is_lost: bool = False, drain_s: float = 20) -> None:
    with stopping(file, lambda: is_lost, drain_s):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_tells_the_tasks_and_the_second_ends_the_job(file: StopFile, number: signal.Signals) -> None:
    def job() -> None:
        with stopping(file, lambda: False, drain_s=20) as stop:
            assert not file.exists()
            os.kill(os.getpid(), number)
            wait_for(file)
            assert stop.is_made
            os.kill(os.getpid(), number)
            time.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        job()
    assert not file.exists()


def test_a_job_that_does_not_end_in_time_is_ended(file: StopFile) -> None:
    with pytest.raises(KeyboardInterrupt):
        job_with_one_signal(file, drain_s=0.2)


def test_a_job_that_ignores_ctrl_c_is_ended_in_time_too(file: StopFile) -> None:
    """As one behind `nohup ... &` in a script: only SIGTERM reaches it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt):
        job_with_one_signal(file, drain_s=0.2)
    assert not file.exists()


def test_a_job_without_a_signal_leaves_nothing_behind(file: StopFile) -> None:
    with stopping(file, lambda: False, drain_s=20) as stop:
        pass
    assert not stop.is_made
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Path(file.location.local_path).parent.exists()


def test_a_job_that_lost_its_table_has_nothing_to_finish(file: StopFile) -> None:
    with pytest.raises(KeyboardInterrupt):
        job_with_one_signal(file, is_lost=True)
    assert not file.exists()


def test_signals_that_are_ignored_stay_so(file: StopFile) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping(file, lambda: False, drain_s=20) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert not stop.is_made
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as running:
        yield running
        running.kill()


def test_a_block_that_waits_ends_with_an_error_that_names_the_process_that_died(
    process: subprocess.Popen[bytes],
) -> None:
    began = time.monotonic()
    threading.Timer(0.05, process.kill).start()
    watched = watch_ray_processes({os.getpid(): "this one", process.pid: "the raylet"}, every_s=0.01)
    with pytest.raises(JobError, match=r"the raylet has died.*The same command continues"), watched:
        Queue[None]().get(timeout=30)
    assert time.monotonic() < began + 20


def test_a_block_in_which_no_process_dies_runs_to_its_end_and_leaves_the_signal_as_it_was() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with watch_ray_processes({os.getpid(): "this one"}, every_s=0.01):
        time.sleep(0.05)
        assert signal.getsignal(signal.SIGUSR2) != before
    assert signal.getsignal(signal.SIGUSR2) == before
    assert "ray processes" not in {thread.name for thread in threading.enumerate()}


def test_a_watch_ends_though_a_look_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for its resources, a Ray whose GCS server has died answers after a minute."""
    monkeypatch.setattr("captioner.cluster.watching._LAST_LOOK_S", 0.01)
    looked, answer = threading.Event(), threading.Event()

    def look() -> None:
        looked.set()
        answer.wait()

    with watching(look, every_s=0.01, name="a look without end"):
        looked.wait()
    assert not answer.is_set()
    answer.set()


def test_an_error_that_clearing_up_outlasts_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.cluster.interrupts._AGAIN_S", 0.05)
    gone = {2**22 + 1: "the raylet"}

    def job() -> None:
        with watch_ray_processes(gone, every_s=0.01):
            try:
                Queue[None]().get()
            finally:
                Queue[None]().get()  # as Ray, which waits for a server that is gone

    with pytest.raises(JobError, match="the raylet has died"):
        job()
    assert "ray processes" not in {thread.name for thread in threading.enumerate()}


def test_an_error_at_the_first_look_ends_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        began(thread)
        raise JobError("as a signal makes it be raised")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(JobError), watching(lambda: None, every_s=0.01, name="an early look"):
        pass
    assert "an early look" not in {thread.name for thread in threading.enumerate()}


def test_a_look_that_is_late_neither_raises_nor_ends_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes when the handler is gone would: it did, when a busy machine held up the end of the block."""
    looks: list[Callable[[], object]] = []

    @contextmanager
    def watching(look: Callable[[], object], **_: object) -> Iterator[None]:
        looks.append(look)
        yield
        look()

    monkeypatch.setattr("captioner.cluster.interrupts.watching", watching)
    before = signal.getsignal(signal.SIGUSR2)
    with watch_ray_processes({2**22 + 1: "the raylet"}):
        pass
    looks[0]()
    assert signal.getsignal(signal.SIGUSR2) == before


def test_outside_the_main_thread_nothing_is_watched() -> None:
    ended: list[bool] = []

    def work() -> None:
        with watch_ray_processes({2**22 + 1: "a process that never was"}, every_s=0.01):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended
