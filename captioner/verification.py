"""What `jobs/verify.py` says: whether a caption table holds every image of its input exactly once."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from captioner.config import VerifyConfig
from captioner.errors import InputError
from captioner.sources import load_frozen
from captioner.sources.faults import output_errors
from captioner.sources.urls import absolute, redact
from captioner.tables import Audit, CaptionTable

__all__ = ["verify"]


def verify(config: VerifyConfig) -> Mapping[str, Any]:
    """Return the proof as a summary, `ok` if it holds. Raises InputError where no table is."""
    table = CaptionTable(absolute(config.table), config.storage_options)
    with output_errors(table.url):
        frozen = load_frozen(table.run_folder, config.storage_options)
        if frozen is None or table.identity() is None:
            raise InputError(f"{redact(table.url)} is no caption table; expected the OUTPUT of jobs/caption.py")
        audit = table.audit({unit.ordinal: unit.num_rows for unit in frozen.units})
    for line in _lines(audit):
        print(line, file=sys.stderr)
    return {"ok": audit.is_whole, **vars(audit), "output": redact(table.url)}


def _lines(audit: Audit) -> Iterator[str]:
    """Yield the proof as people read it: the sum, the reasons, and whatever breaks it."""
    read = "unknown" if audit.read is None else f"{audit.read:,}"
    sign = "=" if audit.is_whole else "!="
    yield f"read {read} {sign} captioned {audit.captioned:,} + failed {audit.failed:,}"
    for reason, count in sorted(audit.failed_by_reason.items(), key=lambda item: -item[1]):
        yield f"  {reason:16} {count:,}"
    yield f"  missing {audit.missing:,}, twice {audit.duplicated:,}, of no input row {audit.alien:,}"
    if audit.unread_units:
        yield f"  {audit.unread_units:,} input files were not read to their end: run the same command again"
    yield from (f"  torn: {part}" for part in audit.torn_parts)
    yield from (f"  of another run: {part}" for part in audit.foreign_parts)
