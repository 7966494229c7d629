"""One part of a caption table: its name, its bytes, its footer.

    part-RUN-ROWS-DIGEST.parquet    the run that wrote it, how many rows, a digest of their identities

The identity of a caption is its key, that of a failure its key and attempt. So two parts of one name hold the same
rows: writing rows twice is writing them once, and no part ever replaces one of other rows.

The footer says the run, the table and a digest of the whole file, so that a byte that changed anywhere - data, page
header, footer - is found; the pages carry Parquet's own checksums besides, for other readers. Knows one part at a time
and no store.
"""

import hashlib
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.storage.parquet import open_parquet_file

__all__ = ["PartName", "Stamp", "encode", "footer", "has_digest", "is_intact", "read_ahead", "row_identity"]

_ROW_GROUP_ROWS = 131_072
_NAME = re.compile(r"part-(?P<run_id>.+)-(?P<num_rows>\d+)-(?P<digest>[0-9a-f]{16})\.parquet")
_DIGEST = "captioner.digest"
_NO_DIGEST = "0" * 32
_MARK = _DIGEST.encode() + b"\x18\x20"  # Thrift's compact protocol: field 2, a string, of 32 bytes
_READERS = 16  # parts read at the same time: they wait for the store, not for a core
_TAIL = struct.Struct("<I4s")  # the length of the footer, and PAR1

T = TypeVar("T")
R = TypeVar("R")


def row_identity(folder: str) -> list[str]:
    """Return the columns that tell the rows of a folder apart, and that they are sorted by: `key`, of failures also
    `attempt`."""
    return ["key", "attempt"] if folder.endswith("failures") else ["key"]


@dataclass(frozen=True)
class Stamp:
    """The footer of a part: the run that wrote it, and the table it is of."""

    run_id: str
    identity: str
    is_leased: bool = False
    """True for a run that holds the table's lease: its parts are published only while it still does."""

    @property
    def footer(self) -> dict[bytes, bytes]:
        """The Parquet key-value metadata."""
        return {b"captioner.run_id": self.run_id.encode(), b"captioner.identity": self.identity.encode()}


class PartName(NamedTuple):
    """The name of a part, in its pieces."""

    run_id: str
    num_rows: int
    digest: str

    @classmethod
    def of(cls, folder: str, run_id: str, rows: pa.Table) -> "PartName":
        """Return the name of a part of `folder` that holds `rows`."""
        return cls(run_id, rows.num_rows, _digest_of_rows(rows, row_identity(folder)))

    def fits(self, folder: str, rows: pa.Table) -> bool:
        """Return True if this names a part of `folder` that holds `rows`.

        The digest may be that of the keys alone: earlier releases named failures so."""
        return self.num_rows == rows.num_rows and self.digest in (
            _digest_of_rows(rows, row_identity(folder)),
            _digest_of_rows(rows, ["key"]),
        )

    @classmethod
    def parse(cls, name: str) -> "PartName | None":
        """Return the pieces of a name, or None where it is not a part's."""
        found = _NAME.fullmatch(name)
        return found and cls(found["run_id"], int(found["num_rows"]), found["digest"])

    def __str__(self) -> str:
        return f"part-{self.run_id}-{self.num_rows}-{self.digest}.parquet"


def _digest_of_rows(rows: pa.Table, columns: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for column in columns:
        digest.update(rows.column(column).to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()


def encode(rows: pa.Table, stamp: Stamp) -> bytes:
    """Return the bytes of a part that holds `rows`."""
    buffer = pa.BufferOutputStream()
    rows = rows.replace_schema_metadata(stamp.footer)
    with pq.ParquetWriter(buffer, rows.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(rows, row_group_size=_ROW_GROUP_ROWS)
        writer.add_key_value_metadata({_DIGEST: _NO_DIGEST})
    return _sealed(bytes(buffer.getvalue()))


def _sealed(data: bytes) -> bytes:
    """Return a file with the digest of all of it in its footer, taken while zeros are in the digest's place."""
    place = _digest_slice(data)
    assert place is not None
    return b"".join([data[: place.start], _digest(data, place), data[place.stop :]])


def is_intact(data: bytes) -> bool:
    """Return True if these are, to the last byte, what `encode` returned.

    Of a part from before parts had a digest, True if it can be read to its end."""
    place = _digest_slice(data)
    return _is_readable_without_digest(data) if place is None else data[place] == _digest(data, place)


def has_digest(data: bytes) -> bool:
    """Return True for a part that says in its footer what its bytes are, as all do but those of early releases."""
    return _digest_slice(data) is not None


def _is_readable_without_digest(data: bytes) -> bool:
    """Return True for a part of an earlier release, which no part of this one becomes by one damaged byte."""
    if len(data) < _TAIL.size or _DIGEST.encode() in data[-_TAIL.size - _TAIL.unpack(data[-_TAIL.size :])[0] :]:
        return False
    try:
        with open_parquet_file(data) as file:
            names = set(file.metadata.metadata or {})
            file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError):
        return False
    return names == {*Stamp("", "").footer, b"ARROW:schema"}


def _digest(data: bytes, place: slice) -> bytes:
    """Return the digest of a file that has zeros at `place`."""
    view, digest = memoryview(data), hashlib.blake2b(digest_size=len(_NO_DIGEST) // 2)
    for piece in (view[: place.start], _NO_DIGEST.encode(), view[place.stop :]):
        digest.update(piece)
    return digest.hexdigest().encode()


def _digest_slice(data: bytes) -> slice | None:
    if len(data) < _TAIL.size:
        return None
    size, magic = _TAIL.unpack_from(data, len(data) - _TAIL.size)
    start = data.rfind(_MARK, max(0, len(data) - _TAIL.size - size)) + len(_MARK)
    is_there = magic == b"PAR1" and start >= len(_MARK)
    return slice(start, start + len(_NO_DIGEST)) if is_there else None


def footer(metadata: dict[bytes, bytes] | None) -> Stamp:
    """Return the footer in a part's key-value metadata, with empty strings for what is missing."""
    found = metadata or {}
    run_id, identity = (found.get(name, b"").decode("utf-8", "replace") for name in Stamp("", "").footer)
    return Stamp(run_id, identity)


def read_ahead(read: Callable[[T], R], items: Iterable[T], num_threads: int = _READERS) -> Iterator[tuple[T, R]]:
    """Yield each item and what `read` returns for it, in order; only `num_threads` results are ever held.

    Without a second item no thread is started."""
    items = iter(items)
    first_two = list(islice(items, 2))
    if len(first_two) < 2:
        yield from ((item, read(item)) for item in first_two)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[tuple[T, Any]] = deque()
        for item in chain(first_two, items):
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) == num_threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
