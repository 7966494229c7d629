"""Captions in a Parquet file, one or several a row."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from captioner.errors import InputError
from captioner.evaluation.caption_files.records import ColumnNames, Record
from captioner.inputs.columns import holds_uris, is_bytes, is_struct, plain_type
from captioner.inputs.parquet import open_parquet, plain_batches
from captioner.storage import Store
from captioner.storage.faults import StoreError
from captioner.storage.urls import shown

__all__ = ["read_parquet_rows"]


def read_parquet_rows(store: Store, url: str, wanted: ColumnNames) -> Iterator[Record]:
    """Yield the rows of a Parquet file, some at a time; columns of bytes and structs are not read."""
    file, _ = open_parquet(store, url, as_dictionaries=True)
    with file:
        types = {field.name: plain_type(field.type) for field in file.schema_arrow}
        plain = [n for n, kind in types.items() if holds_uris(n, kind) or not (is_bytes(kind) or is_struct(kind))]
        columns = wanted.choose(plain, shown(url))
        try:
            for batch in plain_batches(file, wanted.rows_per_batch, sorted(set(columns.values()))):
                yield from _records({field: _values(batch.column(column)) for field, column in columns.items()})
        except StoreError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            seen = " ".join(str(error).split())
            raise InputError(f"{shown(url)} is damaged: {seen}; expected a whole Parquet file") from error


def _values(column: pa.Array) -> list[Any]:
    """Return the values; bytes, as some writers store URLs, as texts."""
    values: list[Any] = column.to_pylist()
    return [v.decode("utf-8", "backslashreplace") if isinstance(v, bytes) else v for v in values]


def _records(values: Mapping[str, Sequence[Any]]) -> Iterator[Record]:
    return (Record(**dict(zip(values, row, strict=True))) for row in zip(*values.values(), strict=True))
