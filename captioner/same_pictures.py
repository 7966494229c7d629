"""Which rows of Parquet files hold one picture: the digests of those that no name tells from all others.

A table with one row a caption holds a picture several times. An id column tells which rows are the same; without one,
the path beside the bytes, if no other row has it; else the bytes themselves, which have to be read for it. Knows no
captions and no splits; holds a name a row, and no picture.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.sources.columns import is_struct
from captioner.sources.parquet import open_parquet
from captioner.sources.store import open_store

__all__ = ["read_digests"]

_THREADS = 8
_ROWS_A_BATCH = 64  # pictures that are held at once, of each file that is read


def read_digests(
    urls: Sequence[str], image: str, options: Mapping[str, Any], *, id_column: str
) -> dict[str, dict[int, str]]:
    """Return, for each file, the digest of the bytes of every row that its name does not tell from all others.

    image: the column with the pictures. A picture that cannot be read has no digest. Raises StoreError for a store that
    does not deliver."""
    with ThreadPoolExecutor(_THREADS) as threads:
        names = list(threads.map(lambda url: _names(url, image, options, id_column), urls))
        counts = Counter(name for of_file in names for name in of_file)
        open_rows = [[row for row, name in enumerate(found) if name is None or counts[name] > 1] for found in names]
        found = threads.map(lambda url, rows: _digests(url, rows, image, options), urls, open_rows)
        return dict(zip(urls, found, strict=True))


def _names(url: str, image: str, options: Mapping[str, Any], id_column: str) -> list[str | None]:
    """Return what each row of a file calls its picture: its id, or the path beside it; None for nothing."""
    file, _ = open_parquet(open_store(url, options), url)
    with file:
        schema = file.schema_arrow
        kind = schema.field(image).type
        if id_column in schema.names:
            return [None if name is None else str(name) for name in file.read([id_column])[id_column].to_pylist()]
        if is_struct(kind) and kind.get_field_index("path") >= 0:
            column = file.read([f"{image}.path"])[image].combine_chunks()
            return [name or None for name in pc.struct_field(column, "path").to_pylist()]
        return [None] * int(file.metadata.num_rows)


def _digests(url: str, rows: Sequence[int], image: str, options: Mapping[str, Any]) -> dict[int, str]:
    """Return the digest of the bytes of some rows, reading no row group that has none of them."""
    if not rows:
        return {}
    file, _ = open_parquet(open_store(url, options), url)
    with file:
        is_wanted = np.zeros(file.metadata.num_rows, bool)
        is_wanted[list(rows)] = True
        found, first = dict[int, str](), 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if is_wanted[first : first + num_rows].any():
                with suppress(pa.ArrowException):  # a damaged group: the job that decodes it says what is wrong
                    for row, data in enumerate(_bytes_of(file, group, image), first):
                        if data and is_wanted[row]:
                            found[row] = hashlib.blake2b(data, digest_size=16).hexdigest()
            first += num_rows
    return found


def _bytes_of(file: pq.ParquetFile, group: int, image: str) -> Iterator[bytes | None]:
    for batch in file.iter_batches(_ROWS_A_BATCH, row_groups=[group], columns=[image], use_threads=False):
        values = batch.column(image)
        values = values.storage if isinstance(values, pa.ExtensionArray) else values
        yield from (pc.struct_field(values, "bytes") if is_struct(values.type) else values).to_pylist()
