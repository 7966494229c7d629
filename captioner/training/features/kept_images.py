"""The bytes of images out of tars and Parquet files, kept where a step of a fit can read any of them.

    FOLDER/<digest>/images/part-*.bin    bytes of images, one after another

Such a file is read from its start, and a step reads images of anywhere: a copy that is read by ranges takes the place
of a read of whole files for each step. An address is `part-....bin#START-STOP`. Knows bytes and a store; no Ray.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from captioner.schema import Reject
from captioner.storage import Store, open_store
from captioner.storage.faults import StoreError
from captioner.storage.urls import join

__all__ = ["KeptImages"]

_PART_BYTES = 64 << 20
_READERS = 16
_READ_AT_ONCE = 64  # images that are held encoded


@dataclass(frozen=True)
class KeptImages:
    """Encoded images in the parts of one folder. Reads them as a `Fetcher` reads URIs; can be pickled."""

    url: str
    storage_options: Mapping[str, Any]

    @cached_property
    def _store(self) -> Store:
        return open_store(self.url, self.storage_options)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.storage_options)

    def names(self) -> list[str]:
        """Return the names of the parts. Raises StoreError."""
        return self._store.names(self.url)

    def write(self, stem: str, images: pa.ChunkedArray) -> pa.Array:
        """Write images, binary[N], to parts whose names begin with a stem of their own; return their addresses."""
        addresses = list[str]()
        for number, part in enumerate(_parts(images)):
            name, start = f"{stem}-{number}.bin", 0
            self._store.write_atomic(join(self.url, name), b"".join(part))
            for image in part:
                addresses.append(f"{name}#{start}-{start + len(image)}")
                start += len(image)
        return pa.array(addresses, pa.string())

    def fetch(self, addresses: Sequence[str]) -> list[bytes | Reject]:
        """Return the bytes at each address, or why there are none. Never raises for an address or its store."""
        with ThreadPoolExecutor(_READERS) as threads:
            return list(threads.map(self._read, addresses))

    def stream_rows(self, rows: pa.Table) -> Iterator[list[tuple[int, bytes | Reject]]]:
        """Yield the bytes of rows of `source_schema` whose `uri` is an address, with their indices, a few at a time."""
        addresses = rows["uri"].to_pylist()
        for start in range(0, len(addresses), _READ_AT_ONCE):
            yield list(enumerate(self.fetch(addresses[start : start + _READ_AT_ONCE]), start))

    def _read(self, address: str) -> bytes | Reject:
        name, _, place = address.rpartition("#")
        start, stop = map(int, place.split("-"))
        try:
            return self._store.read_range(join(self.url, name), start, stop)
        except StoreError as error:
            return error.fault.reject


def _parts(images: pa.ChunkedArray) -> Iterator[list[memoryview]]:
    """Yield the images in lists of 64 MiB, or of one that is larger. Copies none."""
    part, num_bytes = list[memoryview](), 0
    for image in (memoryview(value.as_buffer()) for value in images):
        if part and num_bytes + len(image) > _PART_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append(image)
        num_bytes += len(image)
    if part:
        yield part
