"""What a running job says, with and without a terminal."""

import io
import logging
import re
import sys
import time
from collections.abc import Callable

import pytest

from captioner.cluster.progress import Progress, _Bar, progress
from captioner.cluster.worker_registry import WorkerRegistry


def messages(caplog: pytest.LogCaptureFixture, wanted: int) -> list[str]:
    wait_for(lambda: len(caplog.messages) >= wanted)
    return caplog.messages[:wanted]


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 200
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)


def test_a_job_that_waits_says_for_what_until_it_has_it(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter(["waiting for GPUs: 0", "waiting for GPUs: 0"])
    with (
        caplog.at_level(logging.INFO),
        progress(100, num_done=20, line_s=0.01, look_s=0.01) as shown,
        shown.counting(lambda: 25, lambda: next(answers, "")),
    ):
        said = [line for line in messages(caplog, 4) if "finished" not in line]
        wait_for(lambda: any("eta_s" in line for line in caplog.messages))
    assert said[:2] == ["waiting for GPUs: 0"] * 2
    [line, *_] = [line for line in caplog.messages if "eta_s" in line]
    assert re.match(r"finished=45 left=75 images_per_s=[\d.]+ eta_s=\d+$", line)


def test_the_first_thing_that_a_job_says_is_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress(100, line_s=0.01, look_s=0.01) as shown:
        shown.phase = "starting Ray"
        wait_for(lambda: "starting Ray" in caplog.messages)
    assert "starting Ray" in caplog.messages


def test_a_wait_that_is_shorter_than_the_time_between_lines_is_told(caplog: pytest.LogCaptureFixture) -> None:
    waits_for = ["waiting for GPUs: the cluster has 0, a worker needs 1"]
    with caplog.at_level(logging.INFO), progress(100, line_s=3600, look_s=0.01) as shown:
        shown.phase = "starting Ray"
        wait_for(lambda: "starting Ray" in caplog.messages)
        with shown.counting(int, lambda: waits_for[0]):
            wait_for(lambda: waits_for[0] in caplog.messages)
    assert caplog.messages == ["starting Ray", *waits_for]


def test_a_resumed_job_shows_what_earlier_runs_finished(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(3_976, num_done=1_024, bar=True) as shown:
        shown.phase = "loading the model"
    drawn = capsys.readouterr().err
    assert "1,024/5,000" in drawn
    assert "loading the model" in drawn


def test_the_rate_on_the_bar_begins_with_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("captioner.cluster.progress.time.monotonic", lambda: now[0])
    with _Bar(total=5_000, initial=1_024, disable=False, file=io.StringIO()) as bar:
        assert bar.format_dict["rate"] is None
        bar.began_at, bar.n, now[0] = 100.0, 1_074, 110.0
        assert bar.format_dict["rate"] == 5
        assert bar.format_dict["counted"] == "1,074/5,000"


def test_a_line_of_the_log_stands_above_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("captioner")
    handler = logging.StreamHandler(sys.stderr)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with progress(10, bar=True):
            log.warning("a worker is gone")
    finally:
        root.removeHandler(handler)
    assert re.search(r"[\r\n]a worker is gone\n", capsys.readouterr().err)


def test_an_image_that_was_counted_twice_does_not_exceed_the_total() -> None:
    shown = Progress(10, 0)
    with shown.counting(lambda: 12):
        assert shown.read() == (10, "")


def test_the_phase_is_shown_until_the_first_image() -> None:
    shown, finished = Progress(10, 0), [0, 0, 3]
    shown.phase = "loading the model"
    with shown.counting(lambda: finished.pop(0)):
        assert [shown.read() for _ in range(3)] == [(0, "loading the model"), (0, "loading the model"), (3, "")]


def test_what_a_job_waits_for_is_asked_only_while_no_image_comes() -> None:
    shown, finished, asked = Progress(10, 0), [0, 3, 5, 5], []
    with shown.counting(lambda: finished.pop(0), lambda: asked.append(len(finished)) or "waiting for GPUs"):
        says = [shown.read()[1] for _ in range(4)]
    assert says == ["waiting for GPUs", "", "", "waiting for GPUs"]
    assert asked == [3, 0], "asking takes three calls of the cluster"


def test_a_restarted_worker_adds_to_what_its_earlier_process_finished() -> None:
    registry = WorkerRegistry()
    for count in (5, 40, 3, 8):  # its second process began at 3
        registry.note_finished("a", count)
    registry.note_finished("b", 2)
    assert registry.num_finished() == 40 + 8 + 2
