"""How many examples a property test tries, and the profiles that decide it.

`local` draws at random, `ci` draws the same examples at each run, `long` draws five times as many at random. None has a
deadline or another check that a busy machine could fail.
"""

import os

from hypothesis import HealthCheck, settings

PER_HUNDRED = {"local": 100, "ci": 100, "long": 500}

_INDEPENDENT_OF_SPEED = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,  # a test that writes gives each example a path of its own
    ],
)


def load_profile() -> None:
    """Register the three profiles and load `ci` where the environment variable CI is set, else `local`.

    `pytest --hypothesis-profile long` loads another one afterwards.
    """
    for name, num_examples in PER_HUNDRED.items():
        is_ci = name == "ci"
        settings.register_profile(
            name,
            parent=_INDEPENDENT_OF_SPEED,
            max_examples=num_examples,
            derandomize=is_ci,
            database=None if is_ci else settings.default.database,
        )
    settings.load_profile("ci" if os.environ.get("CI") else "local")


def max_examples(num: int) -> settings:
    """Return settings that try `num` examples in the profiles `local` and `ci`, and five times as many in `long`."""
    assert settings.default is not None
    return settings(max_examples=num * settings.default.max_examples // 100)
