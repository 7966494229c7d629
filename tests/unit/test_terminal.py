"""Text of others on a terminal, in lines for people, the log and errors."""

import logging

import pytest

from captioner.command_line import run
from captioner.config import CaptionJobConfig
from captioner.errors import InputError
from captioner.terminal import visible, visible_lines

HOSTILE = "a\x1b[2Jb\x9b31mc\x07d\u202ee\udcfff"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, "a\ufffd[2Jb\ufffd31mc\ufffdd\ufffde\ufffdf"),
        ("a\r\nb\tc\u00a0d", "a  b c d"),
        ("a\x1cb\x85c", "a\ufffdb\ufffdc"),
        ("猫 👩\u200d🚀 é", "猫 👩\u200d🚀 é"),
    ],
)
def test_a_line_has_no_character_that_commands_a_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_lines_keep_their_breaks_and_tabs() -> None:
    assert visible_lines("a\n\tb\r\x1bc") == "a\n\tb \ufffdc"


def test_errors_and_the_log_hold_no_control_character(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def job(config: CaptionJobConfig) -> dict[str, object]:
        logging.getLogger("captioner").warning("file=%s", HOSTILE)
        raise InputError(f"{HOSTILE} is no image\nread on")

    assert run(CaptionJobConfig, job, []) == 2
    told = capsys.readouterr().err
    assert visible_lines(told) == told
    assert told.count(visible(HOSTILE)) == 2
    assert told.endswith("is no image\nread on\n")
