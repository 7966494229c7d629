"""Columns of bytes and texts read as dictionaries: a value that a file holds once may stand in millions of rows.

Knows Arrow batches; opens nothing.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.inputs.columns import plain_type

__all__ = ["decoded"]


def decoded(batch: pa.RecordBatch, max_bytes: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows without dictionaries, as many at once as hold `max_bytes` of values, or one larger row."""
    ends = np.cumsum(sum((_sizes(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64)))
    start = 0
    while start < batch.num_rows:
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))
        piece = batch.take(pa.array(np.arange(start, stop)))  # a cast of a slice casts all items of a list
        yield pa.RecordBatch.from_arrays([_plain(column) for column in piece.columns], names=batch.schema.names)
        start = stop


def _sizes(values: pa.Array) -> npt.NDArray[np.int64]:
    """Return the bytes of each row's values that stand in dictionaries."""
    if pa.types.is_struct(values.type):
        fields = (pc.struct_field(values, [index]) for index in range(values.type.num_fields))
        return sum(map(_sizes, fields), np.zeros(len(values), np.int64))
    if pa.types.is_map(values.type):
        return _of_lists(values, _sizes(values.keys) + _sizes(values.items))
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return _of_lists(values, _sizes(values.values))
    if pa.types.is_fixed_size_list(values.type):
        size = values.type.list_size
        items = _sizes(values.values)[values.offset * size : (values.offset + len(values)) * size]
        return np.asarray(items.reshape(len(values), size).sum(axis=1))
    if not pa.types.is_dictionary(values.type):
        return np.zeros(len(values), np.int64)
    lengths = pc.fill_null(pc.binary_length(values.dictionary), 0).take(values.indices)
    return np.asarray(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False), np.int64)


def _of_lists(lists: pa.Array, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the bytes of each list. sizes: of the items of all of them."""
    ends = np.concatenate([[0], np.cumsum(sizes)])[lists.offsets.to_numpy()]
    return np.asarray(np.diff(ends))


def _plain(values: pa.Array) -> pa.Array:
    """Return the values without dictionaries."""
    wanted = plain_type(values.type)
    return values if wanted == values.type else values.cast(wanted)
