"""The rows of one unit, as a stream of tables: what a read task of the job runs.

Bad data is a row with a reason, and so is a unit that is gone, or no longer the one that was frozen.
"""

from collections.abc import Callable, Iterator, Mapping
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
    on_end: Callable[[int], None] = lambda _: None,
) -> Iterator[pa.Table]:
    """Yield what is left of a unit, as tables of `rows.source_schema(columns.kept)` in the order of their positions.

    done: bool[N], true at the positions to leave out; those past its end are read. A table has `limits.rows_per_block`
    rows and 32 MiB at most. on_end: is told how many rows a tar has, before its last one is given out. Raises
    StoreError when a part of the listing, which is ours, cannot be read.
    """
    tables = _tables(unit, columns, config, run_folder, output_options, limits, done, on_end)
    return regulate(tables, limits.rows_per_block)


def _tables(
    unit: Unit,
    columns: Columns,
    config: InputConfig,
    run_folder: str,
    output_options: Mapping[str, Any] | None,
    limits: Limits,
    done: Done | None,
    on_end: Callable[[int], None],
) -> Iterator[pa.Table]:
    if unit.problem is not None:
        left = positions_left(1, done, limits.stop_at)
        rows = (Row(int(position), unit.name, reject=unit.problem) for position in left)
        return tabulate(rows, unit.ordinal, columns.kept, limits.rows_per_block)
    if unit.kind == "listing":
        url = urls.join(urls.absolute(run_folder), unit.path)
        return read_listing(open_store(url, output_options), url, unit, columns.kept, limits, done)
    store = open_store(unit.path, config.storage_options)
    if unit.kind == "parquet":
        return read_parquet(store, unit, columns, limits, done)
    return read_tar(store, unit, columns, limits, done, on_end)


def count_images(
    unit: Unit, columns: Columns, config: InputConfig, on_end: Callable[[int], None] = lambda _: None
) -> int:
    """Return how many rows a unit gives; a tar that has not been counted is read through, bodies skipped.

    on_end: is told how many rows a tar has. It is not where the store drops the tar: then fewer may be returned.
    """
    if unit.num_rows is not None:
        return unit.num_rows
    return count_samples(open_store(unit.path, config.storage_options), unit, columns, on_end)
