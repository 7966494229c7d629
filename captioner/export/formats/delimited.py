"""`csv`: a header and a row an image, as `jobs/query.py --format csv` writes them."""

from typing import IO

import pyarrow as pa

from captioner.export.request import ExportFormat, Request, Shard
from captioner.query.output import without_formulas, write_rows

__all__ = ["CSV"]


def _write(shard: Shard) -> None:
    def write(file: IO[bytes]) -> None:
        names = list(shard.request.selected())
        schema = pa.schema([shard.schema().field(name) for name in names])
        batches = (batch.select(names) for batch in shard.rows)
        rows = pa.RecordBatchReader.from_batches(schema, batches)
        write_rows(without_formulas(rows) if shard.request.config.csv_safe else rows, file, "csv")

    shard.publish(CSV.file_of(shard.number), write)


CSV = ExportFormat(
    name="csv",
    help="a header and a row an image, with --columns",
    columns=Request.selected,
    write=_write,
    file="captions-{:05d}.csv",
    has_columns=True,
)
