"""The benchmark of a card at toy size on the CPU, so that it runs when there is a card."""

import pytest

from tests.bench.device import measure


@pytest.mark.parametrize("only", ["step_eager_64", pytest.param("beam4", marks=pytest.mark.slow)])
def test_each_part_of_the_device_benchmark_runs_without_a_card(only):
    figures = measure("cpu", is_tiny=True, rounds=1, price=2.5, only=only)
    assert figures
    assert all(value > 0 for part in figures.values() for value in part.values())
