"""The rows of one unit as a stream of tables. A read task of a job runs this.

Bad data becomes a row with a reason, and so does a unit that is missing or has changed since it was frozen.
"""

from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import InputConfig
from captioner.inputs.access import open_input
from captioner.inputs.blocks import Done, Limits, Row, positions_left, rebatch, tables_of
from captioner.inputs.listing import read_listing
from captioner.inputs.parquet import read_parquet
from captioner.inputs.units import Columns, Unit
from captioner.inputs.webdataset import OnEnd, count_samples, read_tar
from captioner.storage import Place, as_location, open_store

__all__ = ["count_images", "empty_columns", "read_unit"]

_DEFAULT_LIMITS = Limits()


def read_unit(
    unit: Unit,
    columns: Columns,
    config: InputConfig,
    *,
    run_folder: Place,
    limits: Limits = _DEFAULT_LIMITS,
    done: Done | None = None,
    on_end: Callable[[int], None] = lambda _: None,
    on_further: Callable[[int], None] = lambda _: None,
) -> Iterator[pa.Table]:
    """Yield the rows of a unit that are left, in order, as tables of `source_schema(columns.kept)`.

    done: bool[N], true at the positions to leave out, from `limits.start_at` on; those past its end are read. A table
    has at most `limits.rows_per_block` rows and 32 MiB. on_end: called with the number of rows of a tar before its last
    row is yielded; on_further: before that, with the number of its images that are left out. Raises StoreError when a
    part of the job's own listing cannot be read.
    """
    tables = _tables(unit, columns, config, run_folder, limits, done, OnEnd(on_end, on_further))
    return rebatch(tables, limits.rows_per_block)


def _tables(
    unit: Unit,
    columns: Columns,
    config: InputConfig,
    run_folder: Place,
    limits: Limits,
    done: Done | None,
    on_end: OnEnd,
) -> Iterator[pa.Table]:
    if unit.reject is not None:
        left = positions_left(1, done, limits)
        rows = (Row(int(position), unit.name, reject=unit.reject) for position in left)
        return tables_of(rows, unit.ordinal, columns.kept, limits.rows_per_block)
    if unit.kind == "listing":
        part = as_location(run_folder) / unit.path
        return read_listing(open_store(part), part, unit, columns.kept, limits, done)
    store = open_input(config, unit.path)
    if unit.kind == "parquet":
        return read_parquet(store, unit, columns, limits, done)
    return read_tar(store, unit, columns, limits, done, on_end)


def empty_columns(unit: Unit, columns: Columns, config: InputConfig, *, run_folder: Place, num_rows: int) -> list[str]:
    """Return the kept columns, by their names in the input, that none of the first rows of a unit has a value of.

    None where no row can be read. Raises StoreError as `read_unit`."""
    found = pa.concat_tables(read_unit(unit, columns, config, run_folder=run_folder, limits=Limits(stop_at=num_rows)))
    found = found.filter(pc.is_null(found.column("reason")))
    names = zip(columns.kept, columns.kept_from, strict=True)
    return [old for field, old in names if found.num_rows and found.column(field.name).null_count == found.num_rows]


def count_images(
    unit: Unit,
    columns: Columns,
    config: InputConfig,
    on_end: Callable[[int], None] = lambda _: None,
    on_further: Callable[[int], None] = lambda _: None,
) -> int:
    """Return how many rows a unit has. A tar that was not counted yet is read to its end, bodies skipped.

    on_end, on_further: called as by `read_unit`, unless the store drops it: then fewer may be returned.
    """
    if unit.num_rows is not None:
        return unit.num_rows
    return count_samples(open_input(config, unit.path), unit, columns, OnEnd(on_end, on_further))
