"""The file of a lease: who holds it, which number is the highest. Knows no rules of taking one."""

import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from captioner.storage import Store
from captioner.storage.faults import StoreError
from captioner.storage.json_text import parse_json
from captioner.storage.processes import machine, process_start
from captioner.storage.urls import join
from captioner.terminal import visible

__all__ = ["EXPIRY_S", "Found", "Holder", "encoded", "file_number", "latest", "new_holder", "remove_below"]

EXPIRY_S = 90.0
"""Age of the last heartbeat at which another machine may take over."""

_CLOCKS_S = 30.0  # by how much two clocks may differ and are taken for equal
_FAR_FUTURE = 1e11  # seconds since 1970: what any calendar can show
_TEMPORARY = re.compile(r"\.([0-9]{1,9})\.json\..*\.tmp")  # of `write_atomic` and `create` on a local disk


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds the lease, as its file says."""

    run_id: str
    purpose: str
    """`caption`, `repair` or `compact`."""

    host: str
    machine: str
    """Identifies the running system and its process ids; empty where the system has no such identifier."""

    pid: int
    process_start: str
    since: float
    """When it began, in seconds since 1970, as are the others."""

    last_beat: float

    @property
    def expires(self) -> float:
        """When another machine may take over."""
        return self.last_beat + EXPIRY_S

    @property
    def is_here(self) -> bool:
        """True if its process, living or dead, is one of this machine."""
        return bool(self.machine) and self.machine == machine()

    @property
    def is_dead(self) -> bool:
        """True if its process has certainly ended, which only its own machine can tell."""
        return self.is_here and process_start(self.pid) != self.process_start

    @property
    def ahead_s(self) -> float:
        """By how much its clock is ahead of this machine's; 0 for a difference that does not matter."""
        ahead = self.last_beat - time.time()
        return ahead if ahead > _CLOCKS_S else 0.0

    @property
    def is_beating(self) -> bool:
        """True if its last heartbeat is not too old, as far as this machine's clock can tell."""
        return not self.ahead_s and time.time() <= self.expires


class Found(NamedTuple):
    """The lease in force."""

    url: str
    data: bytes
    holder: Holder | None
    """None where the file cannot be read as a lease."""


def new_holder(purpose: str) -> Holder:
    """Return this process as the holder of a lease that begins now, under a new run id."""
    now = time.time()
    return Holder(
        run_id=f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{secrets.token_hex(2)}",
        purpose=purpose,
        host=socket.gethostname(),
        machine=machine(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()) or "",
        since=now,
        last_beat=now,
    )


def encoded(held: Holder) -> bytes:
    """Return the bytes of a lease's file."""
    return (json.dumps(asdict(held), indent=2) + "\n").encode()


def _decoded(data: bytes) -> Holder | None:
    """Return the holder that a file names; None for any other bytes. Unknown fields are those of a later release."""
    try:
        values = parse_json(data)
    except ValueError:
        return None
    if not isinstance(values, Mapping) or not all(_is_fitting(field.type, values.get(field.name)) for field in _FIELDS):
        return None
    known: dict[str, Any] = {field.name: values[field.name] for field in _FIELDS}
    return Holder(**known | {name: visible(value) for name, value in known.items() if isinstance(value, str)})


_FIELDS = fields(Holder)


def _is_fitting(kind: Any, value: object) -> bool:
    if kind is str:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind is int:
        return isinstance(value, int) and 0 <= value < 1 << 31
    return math.isfinite(value) and 0 <= value < _FAR_FUTURE


def latest(store: Store, folder: str) -> Found | None:
    """Return the lease in force, the file of the highest number; None where there is none. Raises StoreError."""
    names = [name for name in store.names(folder) if file_number(name) >= 0]
    if not names:
        return None
    url = join(folder, max(names, key=file_number))
    try:
        data = store.read_bytes(url)
    except StoreError:
        if store.info(url) is None:  # removed at this moment
            return latest(store, folder)
        raise
    return Found(url, data, _decoded(data))


def file_number(url: str) -> int:
    """Return the number of a lease's file, -1 for any other file."""
    stem = url.rpartition("/")[2].removesuffix(".json")
    return int(stem) if re.fullmatch("[0-9]{1,9}", stem) else -1


def remove_below(store: Store, folder: str, number: int) -> None:
    """Remove the leases of lower numbers, and what writers that died left of their files."""
    for name in store.names(folder):
        temporary = _TEMPORARY.fullmatch(name)
        if 0 <= (int(temporary[1]) if temporary else file_number(name)) < number:
            store.remove(join(folder, name))
