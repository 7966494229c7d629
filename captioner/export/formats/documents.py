"""JSON documents of any length, written piece by piece: a list, or an object whose members are lists."""

import json
from collections.abc import Iterable
from typing import IO, Any

__all__ = ["encoded", "write_members"]


def encoded(value: Any) -> bytes:
    """Return a value as JSON in one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")


def write_members(file: IO[bytes], members: Iterable[bytes], opening: bytes, closing: bytes) -> int:
    """Write JSON values with commas between, one a line, in brackets of any kind; return how many."""
    count = 0
    file.write(opening)
    for count, member in enumerate(members, 1):
        file.write((b",\n" if count > 1 else b"\n") + member)
    file.write(b"\n" + closing)
    return count
