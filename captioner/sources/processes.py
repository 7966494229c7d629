"""Which processes of this machine live: an id alone says little, for it is given again, and containers share disks.

Knows Linux's /proc; elsewhere it knows nothing, and says so.
"""

import os
from pathlib import Path

__all__ = ["machine", "process_start"]


def machine() -> str:
    """Return what two processes share exactly when they see each other's ids; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - it points to no path
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Return when a process of this machine began, in ticks since the boot; None when it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
