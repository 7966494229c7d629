"""One part of a caption table: its name, its bytes, its footer.

    part-RUN-ROWS-KEYS.parquet    the run that wrote it, how many rows, a digest of their keys

The footer says the run, the table and a digest of the whole file, so that a byte that changed anywhere - data, page
header, footer - is found; the pages carry Parquet's own checksums besides, for other readers. Knows one part at a time
and no store.
"""

import hashlib
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["PartName", "Stamp", "digest_of_keys", "encode", "footer", "is_intact", "read_ahead"]

_ROW_GROUP_ROWS = 131_072
_NAME = re.compile(r"part-(?P<run_id>.+)-(?P<num_rows>\d+)-(?P<keys>[0-9a-f]{16})\.parquet")
_DIGEST = "captioner.digest"
_NO_DIGEST = "0" * 32
_MARK = _DIGEST.encode() + b"\x18\x20"  # Thrift's compact protocol: field 2, a string, of 32 bytes
_READERS = 16  # parts read at the same time: they wait for the store, not for a core
_TAIL = struct.Struct("<I4s")  # the length of the footer, and PAR1

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Stamp:
    """What stands in the footer of every part: who wrote it, and for which table."""

    run_id: str
    identity: str
    is_leased: bool = False
    """True for a run that holds the table's lease: a part of it is written only while it still does."""

    @property
    def footer(self) -> dict[bytes, bytes]:
        """The Parquet key-value metadata."""
        return {b"captioner.run_id": self.run_id.encode(), b"captioner.identity": self.identity.encode()}


class PartName(NamedTuple):
    """What a part's name says of it."""

    run_id: str
    num_rows: int
    keys: str

    @classmethod
    def parse(cls, name: str) -> "PartName | None":
        """Return what a name says, or None for one that no part has."""
        found = _NAME.fullmatch(name)
        return found and cls(found["run_id"], int(found["num_rows"]), found["keys"])

    def __str__(self) -> str:
        return f"part-{self.run_id}-{self.num_rows}-{self.keys}.parquet"


def digest_of_keys(keys: np.ndarray) -> str:
    """Return what stands in a part's name for its sorted int64[N] keys."""
    return hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()


def encode(rows: pa.Table, stamp: Stamp) -> bytes:
    """Return the bytes of a part that holds `rows`."""
    buffer = pa.BufferOutputStream()
    rows = rows.replace_schema_metadata(stamp.footer)
    with pq.ParquetWriter(buffer, rows.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(rows, row_group_size=_ROW_GROUP_ROWS)
        writer.add_key_value_metadata({_DIGEST: _NO_DIGEST})
    return _sealed(bytes(buffer.getvalue()))


def _sealed(data: bytes) -> bytes:
    """Return a file with the digest of all of it in its footer, taken while zeros stand in the digest's place."""
    place = _place_of_digest(data)
    assert place is not None
    return b"".join([data[: place.start], _digest(data, place), data[place.stop :]])


def is_intact(data: bytes) -> bool:
    """Say whether these are, to the last byte, those that `encode` once returned."""
    place = _place_of_digest(data)
    return place is not None and data[place] == _digest(data, place)


def _digest(data: bytes, place: slice) -> bytes:
    """Return the digest of a file that has zeros at `place`."""
    view, digest = memoryview(data), hashlib.blake2b(digest_size=len(_NO_DIGEST) // 2)
    for piece in (view[: place.start], _NO_DIGEST.encode(), view[place.stop :]):
        digest.update(piece)
    return digest.hexdigest().encode()


def _place_of_digest(data: bytes) -> slice | None:
    if len(data) < _TAIL.size:
        return None
    size, magic = _TAIL.unpack_from(data, len(data) - _TAIL.size)
    start = data.rfind(_MARK, max(0, len(data) - _TAIL.size - size)) + len(_MARK)
    is_there = magic == b"PAR1" and start >= len(_MARK)
    return slice(start, start + len(_NO_DIGEST)) if is_there else None


def footer(metadata: dict[bytes, bytes] | None) -> Stamp:
    """Return what a part's key-value metadata says; empty strings where it says nothing."""
    found = metadata or {}
    run_id, identity = (found.get(name, b"").decode("utf-8", "replace") for name in Stamp("", "").footer)
    return Stamp(run_id, identity)


def read_ahead(read: Callable[[T], R], items: Iterable[T], num_threads: int = _READERS) -> Iterator[tuple[T, R]]:
    """Yield each item and what `read` returns for it, in order; only `num_threads` results are ever held."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[tuple[T, Any]] = deque()
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) == num_threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
