"""Files of all kinds, drawn by code: formats, modes, depths, orientations, profiles, frames, and files that are cut."""

from collections import Counter

import numpy as np
import pytest

from captioner.config import ImageConfig
from captioner.images import Decoded, Preprocessing, decode
from captioner.schema import Reject
from tests.unit.images.drawn_files import DrawnFile, drawn_files

SIDE = 32
SQUEEZED = Preprocessing(size=SIDE, shortest_edge=None)
FILES = list(drawn_files())
_TOLERANCE = 16  # of lossy formats, and of those with 5 bits


def quadrants(decoded: Decoded) -> np.ndarray:
    centres = np.ix_(range(3), (SIDE // 4, 3 * SIDE // 4), (SIDE // 4, 3 * SIDE // 4))
    return decoded.pixels[centres].reshape(3, 4).T.astype(int)


@pytest.mark.parametrize("is_fast", [False, True], ids=["default", "fast"])
def test_a_file_of_any_kind_has_its_outcome(is_fast: bool) -> None:
    wrong = {file.name: found for file in FILES if (found := _wrong(file, ImageConfig(fast_decode=is_fast)))}
    assert not wrong


def _wrong(file: DrawnFile, config: ImageConfig) -> str:
    outcome = decode(file.data, SQUEEZED, config)
    if isinstance(outcome, Reject):
        return "" if outcome.reason == file.expected else f"{outcome.reason}: {outcome.detail}"
    if isinstance(file.expected, str):
        return f"pixels, not {file.expected}"
    seen = quadrants(outcome)
    is_right = (outcome.width, outcome.height) == file.size and np.abs(seen - file.expected).max() <= _TOLERANCE
    return "" if is_right else f"{outcome.width} x {outcome.height}: {seen.tolist()}, not {list(file.expected)}"


def test_the_files_are_many_small_and_named_apart() -> None:
    assert len(FILES) > 300
    assert max(len(file.data) for file in FILES) < 100_000
    assert not [name for name, count in Counter(file.name for file in FILES).items() if count > 1]
