"""Find the table that a path means, for those who only read it."""

from collections.abc import Mapping
from typing import Any

from captioner.errors import InputError
from captioner.sources.faults import output_errors
from captioner.sources.urls import absolute, join, redact
from captioner.tables.table import FOLDERS, CaptionTable

__all__ = ["open_table"]


def open_table(url: str, storage_options: Mapping[str, Any] | None = None) -> CaptionTable:
    """Return a table that is there: a run has begun it, or it has parts. Raises InputError where none is."""
    table = CaptionTable(absolute(url), storage_options)
    with output_errors(table.url):
        if table.identity() is None and not _has_parts(table):
            raise InputError(
                f"{redact(table.url)} is no caption table; expected the OUTPUT of jobs/caption.py, the folder in which"
                f" captions/ and _run/ lie{_near(table)}"
            )
    return table


def _has_parts(table: CaptionTable) -> bool:
    names = (name for folder in FOLDERS for name in table.store.names(join(table.url, folder)))
    return any(name.endswith(".parquet") and not name.startswith((".", "_")) for name in names)


def _near(table: CaptionTable) -> str:
    """Return a hint at the table that the path is a folder of, or nothing."""
    above, _, last = table.url.rpartition("/")
    if last in (*FOLDERS, "_run") and table.store.info(join(above, "_run", "run.json")):
        return f": {redact(above)}"
    return ""
