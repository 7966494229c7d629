"""The one place where a Parquet file is opened: no code runs and no type of another package is made, whoever wrote it.

Arrow keeps its own schema in the footer, with the names of extension types. Where a package has registered such a name,
Arrow makes its type from bytes of the file, and `to_pylist` its values: Ray's `arrow_pickled_object` unpickles them.
Here the names are masked before Arrow reads them, so that every column has its storage type. Pages that become
gigabytes are refused before they do (`parquet_pages`). Knows no columns.
"""

import base64
import binascii
import functools
import io
import re
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.storage.parquet_pages import PageGuard, values_of_chunks

__all__ = ["ParquetFile", "open_parquet_file", "read_schema"]

_TAIL_BYTES = 1 << 16  # what Arrow reads first, in which most footers fit
_MAX_FOOTER_BYTES = 1 << 28
_END_BYTES = 8  # the length of the footer, and PAR1
_SCHEMA_KEY = b"ARROW:schema"
_SCHEMA = re.compile(rb"(?P<key>ARROW:schema)(?:\x18(?P<size>[\x80-\xff]{0,4}[\x00-\x7f]))?")
_EXTENSION = b"ARROW:extension:"


class ParquetFile(pq.ParquetFile):  # type: ignore[misc]  # pyarrow has no types
    """An open file, and what its footer says that is dangerous to ask Arrow for."""

    footer: bytes = b""

    @functools.cached_property
    def values_of_chunks(self) -> list[list[int]]:
        """How many values each chunk of each row group has, nulls and empty lists among them."""
        return values_of_chunks(self.footer)


def open_parquet_file(
    source: IO[bytes] | io.RawIOBase | bytes,
    guard: PageGuard | None = None,
    *,
    as_dictionaries: bool = False,
    **options: Any,
) -> ParquetFile:
    """Return an open file without extension types. Raises as pq.ParquetFile, whose options these are.

    guard: sees each page before it is decompressed; without one, pages without measure alone are refused.
    as_dictionaries: whether bytes and texts are read as dictionaries: one value may stand in millions of rows."""
    file = _File(io.BytesIO(source) if isinstance(source, bytes) else source)
    options["arrow_extensions_enabled"] = False
    opened = ParquetFile(file, **options)
    if as_dictionaries and (columns := _dictionary_columns(opened.schema)):
        opened = ParquetFile(file, metadata=opened.metadata, read_dictionary=columns, **options)
    opened.footer = file.footer
    file.guard = guard or PageGuard()
    return opened


def _dictionary_columns(schema: pq.ParquetSchema) -> list[str]:
    """Return the paths of columns, and of what structs, lists and maps hold, that Arrow can read as dictionaries."""
    columns = (schema.column(index) for index in range(len(schema)))
    return [
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type != "DECIMAL"
    ]


def read_schema(serialized: bytes) -> pa.Schema:
    """Return a schema that Arrow serialized, without extension types. Raises pa.ArrowException, OSError."""
    return pa.ipc.read_schema(pa.py_buffer(_without_extensions(serialized)))


def _without_extensions(serialized: bytes) -> bytes:
    return serialized.replace(_EXTENSION, _EXTENSION.lower())


class _File(io.RawIOBase):
    """A file whose end is held, with its footer masked; all else is read where it lies."""

    guard: PageGuard | None = None
    """None until the footer is read: from then on only pages are."""

    def __init__(self, file: IO[bytes] | io.RawIOBase) -> None:
        super().__init__()
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        self._position = 0
        tail = self._last(_TAIL_BYTES)
        size = _footer_bytes(tail)
        if len(tail) < size <= self._size:
            if size > _MAX_FOOTER_BYTES:
                raise pa.ArrowInvalid(f"a footer of {size:,} bytes; expected at most {_MAX_FOOTER_BYTES:,}")
            tail = self._last(size)
        self._tail = _masked(tail)
        self._held_from = self._size - len(self._tail)

    def _last(self, size: int) -> bytes:
        size = min(size, self._size)
        self._file.seek(self._size - size)
        return self._file.read(size) or b""

    @property
    def footer(self) -> bytes:
        """The footer, in Thrift."""
        return self._tail[-_footer_bytes(self._tail) : -_END_BYTES]

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move within the file, and no further; return the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = min(max(0, base + offset), self._size)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return `size` bytes, or all that are left."""
        start = self._position
        data = self._read(size)
        if self.guard:
            self.guard.read(start, data)
        return data

    def _read(self, size: int | None) -> bytes:
        start = self._position
        stop = self._size if size is None or size < 0 else min(self._size, start + size)
        self._position = stop
        held = self._tail[max(0, start - self._held_from) : max(0, stop - self._held_from)]
        if start >= self._held_from:
            return held
        self._file.seek(start)
        data = self._file.read(min(stop, self._held_from) - start) or b""
        return data + held if held else data

    def close(self) -> None:
        """As RawIOBase.close; closes the file too."""
        if not self.closed:
            self._file.close()
        super().close()


def _footer_bytes(tail: bytes) -> int:
    """Return the length of the footer and what follows it, as the last bytes of the file give it."""
    return int.from_bytes(tail[-_END_BYTES:-4], "little") + _END_BYTES


def _masked(tail: bytes) -> bytes:
    """Return the end of a file, as long as before, so that Arrow finds no name of an extension type in its footer."""
    start = max(0, len(tail) - _footer_bytes(tail))
    footer = tail[start:]
    pieces, done = [tail[:start]], 0
    for found in _SCHEMA.finditer(footer):
        if found.start() < done:
            continue
        stop, value = _schema(footer, found)
        pieces += [footer[done : found.start()], value]
        done = stop
    return b"".join([*pieces, footer[done:]])


def _schema(footer: bytes, found: "re.Match[bytes]") -> tuple[int, bytes]:
    """Return where the key and its value end, and what stands in their place.

    Masked is a value in the only form that Arrow writes: a string of Thrift's compact protocol right behind its key,
    base64, and the end of the pair. In any other form the key is masked, so that Arrow sees no schema at all.
    """
    if found["size"] is not None:
        stop = found.end() + sum((byte & 0x7F) << 7 * place for place, byte in enumerate(found["size"]))
        try:
            serialized = base64.b64decode(value := footer[found.end() : stop], validate=True)
        except binascii.Error:
            serialized = value = b""
        if footer[stop : stop + 1] == b"\0" and value and base64.b64encode(serialized) == value:
            return stop, found[0] + base64.b64encode(_without_extensions(serialized))
    return found.start() + len(_SCHEMA_KEY), _SCHEMA_KEY.lower()
