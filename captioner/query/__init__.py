"""SQL over a caption table in place, by DuckDB.

    part_files.py      the parts as a file system for DuckDB, on any store
    moved_parts.py     ask again where parts were moved while they were read
    texts.py           columns of texts, of the rows that a condition selects
    views.py           captions, failures, attempts, unanswered, images and runs
    runs.py            _run/runs/*.json as a table
    output.py          rows for a terminal, CSV, JSON or Parquet
    summary.py         statistics of a table
    review.py          the most doubtful captions
    query.py           what jobs/query.py does, except for pages

Other code reads a table by `read_rows(table, "SELECT ...")`. Knows no pages and writes no table.
"""

from captioner.query.query import query
from captioner.query.views import read_rows

__all__ = ["query", "read_rows"]
