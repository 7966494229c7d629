"""Signals that end a job: the first lets it finish what it began, the second does not."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from captioner import stopping as stopping_module
from captioner.stopping import StopFile, stopping


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
    give_up = time.monotonic() + 30
    while not file.is_there():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def be_told_once(file: StopFile, *, is_lost: bool = False) -> None:
    with stopping(file, lambda: is_lost):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_tells_the_tasks_and_the_second_ends_the_job(file: StopFile, number: signal.Signals) -> None:
    def job() -> None:
        with stopping(file, lambda: False) as stop:
            assert not file.is_there()
            os.kill(os.getpid(), number)
            wait_for(file)
            assert stop.is_asked
            os.kill(os.getpid(), number)
            time.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        job()
    assert not file.is_there()


def test_a_job_that_does_not_end_in_time_is_ended(file: StopFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping_module, "DRAIN_S", 0.2)
    with pytest.raises(KeyboardInterrupt):
        be_told_once(file)


def test_a_job_that_ignores_ctrl_c_is_ended_in_time_too(file: StopFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one behind `nohup ... &` in a script: only SIGTERM reaches it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(stopping_module, "DRAIN_S", 0.2)
    with pytest.raises(KeyboardInterrupt):
        be_told_once(file)
    assert not file.is_there()


def test_a_job_without_a_signal_leaves_nothing_behind(file: StopFile) -> None:
    with stopping(file, lambda: False) as stop:
        pass
    assert not stop.is_asked
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Path(file.url).parent.exists()


def test_a_job_that_lost_its_table_has_nothing_to_finish(file: StopFile) -> None:
    with pytest.raises(KeyboardInterrupt):
        be_told_once(file, is_lost=True)
    assert not file.is_there()


def test_signals_that_are_ignored_stay_so(file: StopFile) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping(file, lambda: False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert not stop.is_asked
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
