"""What this machine lets a process have. Knows files of Linux and nothing of what the CPUs are for."""

import os
from pathlib import Path

__all__ = ["num_cpus"]

_ROOT = Path("/sys/fs/cgroup")


def num_cpus(root: Path = _ROOT) -> int:
    """Return how many CPUs this process may use: those of the machine, or of its container where that has fewer.

    root: where control groups are mounted, of version 2 or 1.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def _quota(root: Path) -> float | None:
    try:
        if (root / "cpu.max").exists():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError):  # there is no such file, or it says `max`
        return None
