"""Rows that hold several images, in a column of lists: the first image of each, or each image as a row of its own.

An empty list, and a null, stand for one image that is not there; so a Parquet file's footer says how many rows there
are. Knows Arrow's types and batches; opens nothing.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.inputs.columns import is_list
from captioner.storage.parquet import ParquetFile

__all__ = ["ITEM", "ROW", "each_image", "first_images", "num_images"]

ROW, ITEM = "\0row", "\0item"
"""Columns that `each_image` adds: which row of the file an image stands in, and its place there."""


def num_images(file: ParquetFile, column: str, group: int) -> int:
    """Return how many images a row group has in a column, by the footer: rows, or items of its lists."""
    schema = file.schema_arrow
    if not is_list(schema.field(column).type):
        return int(file.metadata.row_group(group).num_rows)
    leaf = sum(_num_leaves(schema.field(index).type) for index in range(schema.names.index(column)))
    found = file.values_of_chunks[group] if group < len(file.values_of_chunks) else []
    return max(0, found[leaf]) if leaf < len(found) else 0


def first_images(batch: pa.RecordBatch, column: str) -> pa.RecordBatch:
    """Return the rows with the first image of each list; null where a list has none."""
    lists = batch.column(column)
    lengths = _lengths(lists)
    return _replaced(batch, column, _items(lists, np.cumsum(lengths) - lengths, lengths > 0))


def each_image(batch: pa.RecordBatch, column: str, first_row: int) -> pa.RecordBatch:
    """Return a row for each image of each list, with the other columns of its row, and `ROW` and `ITEM`.

    first_row: of the batch, in its file."""
    lists = batch.column(column)
    lengths = _lengths(lists)
    counts = np.maximum(lengths, 1)
    rows = np.repeat(np.arange(len(lists)), counts)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    items = _items(lists, np.repeat(np.cumsum(lengths) - lengths, counts) + places, lengths[rows] > 0)
    found = _replaced(batch.drop_columns([column]).take(pa.array(rows)), column, items)
    return found.append_column(ROW, pa.array(first_row + rows)).append_column(ITEM, pa.array(places))


def _replaced(batch: pa.RecordBatch, column: str, values: pa.Array) -> pa.RecordBatch:
    if column not in batch.schema.names:
        return batch.append_column(column, values)
    return batch.set_column(batch.schema.names.index(column), column, values)


def _lengths(lists: pa.Array) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False), np.int64)


def _items(lists: pa.Array, indices: npt.NDArray[np.int64], exist: npt.NDArray[np.bool_]) -> pa.Array:
    """Return the items at these places of all lists together; null where there is none."""
    return pc.list_flatten(lists).take(pa.array(indices, mask=~exist))


def _num_leaves(kind: pa.DataType) -> int:
    """Return how many columns a Parquet file has for values of a type."""
    if not pa.types.is_nested(kind):
        return 1
    return sum(_num_leaves(kind.field(index).type) for index in range(kind.num_fields))
