"""Names of the files that a write to a local disk begins with, until they are whole and renamed."""

import re
import uuid
from pathlib import Path

__all__ = ["is_temporary", "temporary_of"]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


def temporary_of(path: Path) -> Path:
    """Return a new hidden name beside a file."""
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")


def is_temporary(name: str) -> bool:
    """Return whether `temporary_of` made this name: such a file is a killed writer's, or of one at work."""
    return _TEMPORARY.fullmatch(name) is not None
