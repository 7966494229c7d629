"""Caption tables: find what is done, write a part, keep two jobs apart, prove that every row came out once, mend.

    OUTPUT/captions/part-*.parquet   one row an image that has a caption
    OUTPUT/failures/part-*.parquet   one row a failed attempt; append-only
    OUTPUT/_run/run.json             what this table is: input, model, decoding
    OUTPUT/_run/runs/*.json          one file an invocation: config, versions, summary
    OUTPUT/_run/lease/               who writes the table now (see `lease`)
    OUTPUT/_run/removed/RUN/         what a repair took out of the table; nothing is ever deleted by one
    OUTPUT/_run/units.parquet, listing/    the frozen input (see `captioner.sources`)

The parts themselves are the only record of what is done: nothing else is read to continue a run. Knows no Ray and no
model.

**Every row once, whatever dies when.** A part appears whole or not at all, under a name made from its rows, so that
writing it twice is writing it once. A run takes the lease before it lists the parts; a writer asks for its run's lease
right before it publishes. So take a part that a writer of run A publishes while or after run B works:

1. It is published before B lists the parts: B leaves its rows out. Each row is there once.
2. It is published later, and the writer asked for the lease after B took it: the writer is refused. Nothing is there.
3. It is published later, and the writer asked before B took the lease: the writer was stopped, or its upload took, for
   as long as it took B to take over. Rows may now stand twice. B compares the parts at its end with those it found and
   those it wrote, and mends what it does not know (`mending`); a part that comes even after B's end is found by the
   next run, or by `jobs/verify.py`, and mended there. This moment, between asking and publishing, is all that is left.

To mend removes a row only when the same row is in another part on disk, and puts what else a file held on disk before
the file goes: at every moment each row is there at least once, and to mend again what a crash left half mended ends
with each row once.
"""

from captioner.tables.audit import Audit, audit
from captioner.tables.compaction import compact
from captioner.tables.lease import Lease, holder
from captioner.tables.mending import mend, mend_late
from captioner.tables.opening import open_table
from captioner.tables.parts import PartName, Stamp
from captioner.tables.repair import Finding, findings, repair
from captioner.tables.table import CaptionTable, Done, PartSummary

__all__ = [
    "Audit",
    "CaptionTable",
    "Done",
    "Finding",
    "Lease",
    "PartName",
    "PartSummary",
    "Stamp",
    "audit",
    "compact",
    "findings",
    "holder",
    "mend",
    "mend_late",
    "open_table",
    "repair",
]
