"""Which processes of this machine are alive. An id alone does not tell: ids are reused, and containers share disks.

Reads Linux's /proc; on other systems the answers say that nothing is known.
"""

import os
from pathlib import Path

__all__ = ["machine", "process_start"]


def machine() -> str:
    """Return a text that two processes share if and only if they see each other's ids; empty where it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - it is no path
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Return when a process of this machine started, in ticks since boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
