"""The caption table on any store: write parts, find what is done, keep two jobs apart, audit, repair, compact.

    OUTPUT/captions/part-*.parquet   one row an image that has a caption
    OUTPUT/failures/part-*.parquet   one row a failed attempt; append-only
    OUTPUT/columns/NAME/             answers and failures of a prompt that was added later (see `column_family`)
    OUTPUT/_run/run.json             what this table was made with: input, model, decoding
    OUTPUT/_run/runs/*.json          one file a run: config, versions, summary
    OUTPUT/_run/lease/               who writes the table now (see `lease`)
    OUTPUT/_run/removed/RUN/         what a repair took out of the table; a repair deletes nothing
    OUTPUT/_run/units.parquet, listing/    the frozen input (see `captioner.inputs`)

The parts are the only record of which rows are done: a run reads nothing else to continue. Knows no Ray and no model.

**Every row once, whatever dies when.** A part appears whole or not at all, under a name made from its rows, so that
writing it twice is writing it once. A run takes the lease before it lists the parts; a writer checks that its run holds
the lease right before it publishes. Take a part that a writer of run A publishes while or after run B works:

1. It is published before B lists the parts: B leaves its rows out. Each row is there once.
2. It is published later, and the writer checked the lease after B took it: the writer is refused. Nothing comes.
3. It is published later, and the writer checked before B took the lease: the writer was stopped, or its upload took,
   for as long as B needed to take over. Rows may now be there twice. At its end B compares the parts with those it
   found and those it wrote, and drops the duplicates of any other (`repair`); a part that comes even later is found by
   the next run or by `jobs/verify.py`. This moment, between check and publication, is the only one that is left.

A repair drops a row only when another part on disk holds the same row, and writes what else a file held before the file
goes: at every moment each row is there at least once, and a repair after one that a crash cut short ends with each row
once.
"""

from captioner.tables.audit import Audit, audit
from captioner.tables.column_family import ColumnFamily
from captioner.tables.compaction import compact
from captioner.tables.done import Done, find_done
from captioner.tables.keys import KeySet
from captioner.tables.lease import Lease, holder
from captioner.tables.parts import PartName, Stamp
from captioner.tables.repair import Finding, deduplicate, deduplicate_late_parts, findings, repair
from captioner.tables.table import CaptionTable, PartSummary, open_table, table_around

__all__ = [
    "Audit",
    "CaptionTable",
    "ColumnFamily",
    "Done",
    "Finding",
    "KeySet",
    "Lease",
    "PartName",
    "PartSummary",
    "Stamp",
    "audit",
    "compact",
    "deduplicate",
    "deduplicate_late_parts",
    "find_done",
    "findings",
    "holder",
    "open_table",
    "repair",
    "table_around",
]
