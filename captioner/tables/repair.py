"""What a crash or a late writer may leave in a table, named first, then put aside below `_run/removed/`.

Torn parts, rows that stand in two parts, failures of no row of the input, temporaries, and the leftovers of a
compaction. Nothing is deleted. What is not ours - strangers, parts of another table - is left to whoever put it there.
Asks for no lease.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from captioner.sources import Frozen
from captioner.sources.urls import join, name
from captioner.tables.audit import Problem
from captioner.tables.compaction import STAGING
from captioner.tables.mending import aliens, doubled, drop, mend, put_aside
from captioner.tables.table import FOLDERS, CaptionTable

__all__ = ["Finding", "findings", "repair"]


class Finding(NamedTuple):
    """One file that a repair takes out of the table, or some of whose rows it does."""

    kind: Literal["torn", "doubled", "alien", "leftover"]
    url: str
    why: str


def findings(table: CaptionTable, frozen: Frozen, problems: Sequence[Problem]) -> Iterator[Finding]:
    """Yield what a repair would do. problems: of an audit of the same table. Changes nothing; raises StoreError."""
    for problem in problems:
        if problem.kind == "torn":
            why = f"{problem.why}; rows that stand only in it are captioned again by the next run"
            yield Finding("torn", problem.url, why)
    for url in _temporaries(table):
        yield Finding("leftover", url, "a writer that ended before its file was whole")
    for url in _staged(table):
        yield Finding("leftover", url, "of a compaction; its rows stand in the table")
    wrong = {problem.url for problem in problems}
    failures = [url for url in table.parts("failures") if url not in wrong]
    for part in (*aliens(table, frozen, failures), *doubled(table, without=wrong)):
        yield Finding(part.kind, part.url, part.why)


def repair(table: CaptionTable, frozen: Frozen, found: Sequence[Finding], run_id: str) -> int:
    """Do what was found, under the lease of `run_id`; return how many rows went: those that stood twice, or nowhere."""
    for finding in found:
        if finding.kind in ("torn", "leftover"):
            put_aside(table, finding.url, run_id)
    strays = aliens(table, frozen, [finding.url for finding in found if finding.kind == "alien"])
    return sum(drop(table, part, run_id) for part in list(strays)) + mend(table, run_id)


def _temporaries(table: CaptionTable) -> Iterator[str]:
    run = table.run_folder
    places = [*(join(table.url, folder) for folder in FOLDERS), run]
    places += [join(run, folder) for folder in ("runs", "listing", "counts", "lease")]
    for place in places:
        names = table.store.names(place)
        yield from (join(place, name) for name in names if name.startswith(".") and name.endswith(".tmp"))


def _staged(table: CaptionTable) -> Iterator[str]:
    for entry in table.store.entries(table.run_folder):
        if entry.is_folder and name(entry.url).startswith(STAGING):
            yield from (found.url for page in table.store.pages(entry.url) for found in page)
