"""How many CPUs and how much memory this process may use, and whether it can have a GPU.

Knows Linux's files; not what they are for.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["may_have_gpu", "memory_bytes", "num_cpus"]


def num_cpus(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many CPUs this process may use: those of the machine, or of its container where that has fewer.

    root: where control groups are mounted, of version 2 or 1.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def memory_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return how much memory this process may use, of the machine or of its container; None where that is unknown."""
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or `max`
            known.append(int((root / name).read_text()))
    return min(known, default=None)


def may_have_gpu(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> bool:
    """Return False on a machine that cannot have a CUDA device for this process; loads no torch.

    devices: where Linux shows NVIDIA's cards (also below Windows, and on Tegra) and AMD's."""
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    patterns = ("nvidia[0-9]*", "nvhost-gpu", "nvgpu", "dxg", "kfd")
    return sys.platform != "linux" or any(next(devices.glob(pattern), None) for pattern in patterns)


def _quota(root: Path) -> float | None:
    try:
        if (root / "cpu.max").exists():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError):  # no such file, or `max`
        return None
