"""What a running job says without a terminal."""

import logging
import time

import pytest

from captioner import progress as room
from captioner.progress import progress


def messages(caplog: pytest.LogCaptureFixture, wanted: int) -> list[str]:
    give_up = time.monotonic() + 20
    while len(caplog.messages) < wanted and time.monotonic() < give_up:
        time.sleep(0.01)
    return caplog.messages[:wanted]


def test_a_job_that_waits_says_for_what_until_it_has_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_LINE_S", 0.01)
    answers = iter(["waiting for GPUs: 0", "waiting for GPUs: 0"])
    with caplog.at_level(logging.INFO), progress(100, lambda: 25, "/tmp/out", lambda: next(answers, "")):
        said = messages(caplog, 3)
    assert said[:2] == ["waiting for GPUs: 0"] * 2
    assert said[2].startswith("written=25 left=75 images_per_s=")
