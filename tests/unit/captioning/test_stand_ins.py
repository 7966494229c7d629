"""What benchmarks put in the captioner's place is called as the captioner is."""

import inspect

import pytest

from captioner.captioning.captioner import Captioner
from tests.bench.stand_ins import NullCaptioner, SleepingCaptioner


@pytest.mark.parametrize("stand_in", [NullCaptioner, SleepingCaptioner])
@pytest.mark.parametrize("method", ["caption_pixels", "monitor"])
def test_a_stand_in_takes_what_the_captioner_takes(stand_in: type[NullCaptioner], method: str) -> None:
    ours, theirs = (inspect.signature(getattr(kind, method)) for kind in (stand_in, Captioner))
    assert list(ours.parameters) == list(theirs.parameters)
