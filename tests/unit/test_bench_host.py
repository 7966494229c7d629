"""The benchmark of the host's side, in small."""

from tests.bench.host import measure


def test_a_pretended_card_is_never_faster_than_its_bound() -> None:
    report = measure(512, rounds=1, step_s=1e-3, images_per_s=20_000)
    for calls in ("calls_4", "calls_8"):
        assert 0 < report[calls]["share_of_bound"] <= 1.05
        assert 0 < report[calls]["slots_filled"] <= 1
