"""What a supervised worker tells the registry of its calls."""

from unittest.mock import Mock, call

import pytest

from captioner.cluster.supervision import Serving


def test_calls_that_overlap_are_one_time_of_work() -> None:
    registry = Mock()
    serving = Serving(registry, "a")
    with serving:
        with serving:
            pass
        assert registry.note_busy.remote.mock_calls == [call("a", True)]
    assert registry.note_busy.remote.mock_calls == [call("a", True), call("a", False)]


def test_a_call_that_fails_has_ended_too() -> None:
    registry = Mock()
    with pytest.raises(OSError, match="disk full"), Serving(registry, "a"):
        raise OSError("disk full")
    assert registry.note_busy.remote.mock_calls == [call("a", True), call("a", False)]
