"""Digests of images in Parquet files whose names do not identify them: rows with one digest hold one image.

A table with one row a caption repeats an image. An id column says which rows are the same image; without one, the path
beside the bytes does if it is unique; else the bytes have to be read. Knows no captions and no splits. Holds a name a
row, and few images at once.
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

from captioner.inputs.columns import is_list, is_struct, plain_type
from captioner.inputs.image_lists import first_images
from captioner.inputs.parquet import open_parquet, plain_batches
from captioner.storage import open_store

__all__ = ["read_digests"]

_THREADS = 8
_NAMES_PER_BATCH = 4096
_ROWS_PER_BATCH = 64  # images held at once, of each file


def read_digests(
    urls: Sequence[str], image: str, options: Mapping[str, Any], *, id_column: str
) -> dict[str, dict[int, str]]:
    """Return, for each file, the digest of the bytes of every row whose name is missing or not unique.

    image: the column with the images. An image that cannot be read has no digest. Raises StoreError for a store that
    does not deliver."""
    with ThreadPoolExecutor(_THREADS) as threads:
        names = list(threads.map(lambda url: _names(url, image, options, id_column), urls))
        counts = Counter(name for of_file in names for name in of_file)
        unnamed_rows = [[row for row, name in enumerate(found) if name is None or counts[name] > 1] for found in names]
        found = threads.map(lambda url, rows: _digests(url, rows, image, options), urls, unnamed_rows)
        return dict(zip(urls, found, strict=True))


def _names(url: str, image: str, options: Mapping[str, Any], id_column: str) -> list[str | None]:
    """Return the name of each row's image: its id, or the path beside it; None for neither."""
    file, _ = open_parquet(open_store(url, options), url, as_dictionaries=True)
    known: dict[str, str] = {}  # a name that the file holds once is held once
    with file:
        schema = file.schema_arrow
        kind = plain_type(schema.field(image).type)
        if id_column in schema.names:
            names = (
                name for batch in plain_batches(file, _NAMES_PER_BATCH, [id_column]) for name in batch[0].to_pylist()
            )
            return [None if name is None else known.setdefault(str(name), str(name)) for name in names]
        if is_struct(kind) and kind.get_field_index("path") >= 0:
            batches = plain_batches(file, _NAMES_PER_BATCH, [f"{image}.path"])
            paths = (name for batch in batches for name in pc.struct_field(batch[0], "path").to_pylist())
            return [known.setdefault(name, name) if name else None for name in paths]
        return [None] * int(file.metadata.num_rows)


def _digests(url: str, rows: Sequence[int], image: str, options: Mapping[str, Any]) -> dict[int, str]:
    """Return the digest of the bytes of some rows, reading only row groups that have one."""
    if not rows:
        return {}
    file, _ = open_parquet(open_store(url, options), url, as_dictionaries=True)
    with file:
        is_wanted = np.zeros(file.metadata.num_rows, bool)
        is_wanted[list(rows)] = True
        found, first = dict[int, str](), 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if is_wanted[first : first + num_rows].any():
                with suppress(pa.ArrowException):  # a damaged group: the job that decodes it reports the fault
                    for row, data in enumerate(_bytes_of(file, group, image), first):
                        if data and is_wanted[row]:
                            found[row] = hashlib.blake2b(data, digest_size=16).hexdigest()
            first += num_rows
    return found


def _bytes_of(file: pq.ParquetFile, group: int, image: str) -> Iterator[bytes | None]:
    for batch in plain_batches(file, _ROWS_PER_BATCH, [image], row_groups=[group]):
        batch = first_images(batch, image) if is_list(batch.schema.field(image).type) else batch
        values = batch.column(image)
        yield from (pc.struct_field(values, "bytes") if is_struct(values.type) else values).to_pylist()
