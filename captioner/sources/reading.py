"""The rows of one unit, as a stream of tables: what a read task of the job runs.

Bad data is a row with a reason; only a unit that is no longer the one that was frozen raises.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from captioner.config import InputConfig
from captioner.sources import urls
from captioner.sources.blocks import Done, Limits, Row, positions_left, regulate, tabulate
from captioner.sources.listing import read_listing
from captioner.sources.parquet import read_parquet
from captioner.sources.store import open_store
from captioner.sources.units import Columns, Unit
from captioner.sources.webdataset import count_samples, read_tar

__all__ = ["count_images", "read_unit"]

_DEFAULT_LIMITS = Limits()


def read_unit(
    unit: Unit,
    columns: Columns,
    config: InputConfig,
    *,
    run_folder: str,
    output_options: Mapping[str, Any] | None = None,
    limits: Limits = _DEFAULT_LIMITS,
    done: Done | None = None,
) -> Iterator[pa.Table]:
    """Yield what is left of a unit, as tables of `rows.source_schema(columns.kept)` in the order of their positions.

    done: bool[N], true at the positions to leave out; those past its end are read. A table has `limits.rows_per_block`
    rows and 32 MiB at most. Raises JobError when the file changed since it was frozen, StoreError when a part of the
    listing, which is ours, cannot be read.
    """
    return regulate(_tables(unit, columns, config, run_folder, output_options, limits, done), limits.rows_per_block)


def _tables(
    unit: Unit,
    columns: Columns,
    config: InputConfig,
    run_folder: str,
    output_options: Mapping[str, Any] | None,
    limits: Limits,
    done: Done | None,
) -> Iterator[pa.Table]:
    if unit.problem is not None:
        left = positions_left(1, done, limits.stop_at)
        rows = (Row(int(position), unit.name, reject=unit.problem) for position in left)
        return tabulate(rows, unit.ordinal, columns.kept, limits.rows_per_block)
    if unit.kind == "listing":
        url = urls.join(urls.absolute(run_folder), unit.path)
        return read_listing(open_store(url, output_options), url, unit, columns.kept, limits, done)
    store = open_store(unit.path, config.storage_options)
    read = read_parquet if unit.kind == "parquet" else read_tar
    return read(store, unit, columns, limits, done)


def count_images(unit: Unit, columns: Columns, config: InputConfig) -> int:
    """Return how many rows a unit gives; a tar that has not been counted is read through, bodies skipped."""
    if unit.num_rows is not None:
        return unit.num_rows
    return count_samples(open_store(unit.path, config.storage_options), unit, columns)
