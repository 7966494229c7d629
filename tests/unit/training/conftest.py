"""The processes that decode, started once for each file of tests."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def children(kept_decode_children: None) -> None:
    """No test of this room is about them."""
