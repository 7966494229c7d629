"""What a job may change in the process that runs it, and puts back when it ends."""

import logging
import os
import signal
import warnings
from typing import Any

from ray.data import DataContext


def process_state() -> dict[str, Any]:
    """What a session changes in this process."""
    context = DataContext.get_current()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    return {
        "environment": dict(os.environ),
        "levels": {name: logging.getLogger(name).level for name in ("ray", "ray.data")},
        "filters": list(warnings.filters),
        "handlers": {number: signal.getsignal(number) for number in numbers},
        "data": {name: value for name, value in vars(context).items() if isinstance(value, (int, float, str))},
    }
