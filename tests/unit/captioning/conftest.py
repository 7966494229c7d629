"""A tiny bundle, its captioner and the processes that decode, made once for each file of tests."""

from collections.abc import Iterator

import pytest

from captioner.captioning.captioner import Captioner
from captioner.config import DecodingConfig
from tests.bundles import save_tiny_bundle

DECODING = DecodingConfig(max_new_tokens=8)


@pytest.fixture(scope="module", autouse=True)
def children(kept_decode_children: None) -> None:
    """No test of this room is about the processes that decode."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def captioner(bundle: str) -> Iterator[Captioner]:
    captioner = Captioner.from_bundle(bundle, DECODING)
    yield captioner
    captioner.close()
