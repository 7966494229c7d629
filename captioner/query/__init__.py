"""SQL over a caption table, by DuckDB, where it lies and as it is.

    part_files.py      the parts as DuckDB sees them, on any store
    views.py           captions, failures, attempts, images and runs: a table as its parts are now, and nothing else
    runs.py            _run/runs/*.json as a table
    output.py          rows for a terminal, CSV, JSON or Parquet
    summary.py         what is said of a table without SQL
    review.py          which captions are most doubtful
    query.py           what jobs/query.py does

Other code asks a table by `read_rows(table, "SELECT ...")`.
"""

from captioner.query.query import query
from captioner.query.views import read_rows

__all__ = ["query", "read_rows"]
