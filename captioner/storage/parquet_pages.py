"""The headers of a Parquet file's pages, read as the pages pass: a page may say that it becomes gigabytes.

What a footer says of sizes may be untrue, and a small page may decompress to 2 GB. The header before each page is what
Arrow itself follows. Knows Thrift's compact protocol, the struct PageHeader of parquet.thrift, and of a footer the
number of values alone: Arrow 26 ends the process when it is asked for that of a damaged one. Decodes no value.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Page", "PageError", "PageGuard", "values_of_chunks"]

_MAX_PAGE_BYTES = 1 << 30
_MAX_BOMB_BYTES = 1 << 27  # of a page that decompresses to more than _MAX_RATIO times its bytes
_MAX_RATIO = 64
_MAX_HEADER_BYTES = 1 << 24  # Arrow's own limit
_MAX_NESTED = 64  # Thrift's own limit

_UNCOMPRESSED, _COMPRESSED, _DATA, _DATA_V2 = 2, 3, 5, 8  # fields of PageHeader
_NUM_VALUES = 1  # field of DataPageHeader and DataPageHeaderV2
_ROW_GROUPS, _CHUNKS, _CHUNK, _VALUES_OF_CHUNK = 4, 1, 3, 5  # of FileMetaData, RowGroup, ColumnChunk, ColumnMetaData


class PageError(OSError):
    """A page is larger than any that holds images or texts."""


@dataclass(frozen=True)
class Page:
    """What the header of a page of data says."""

    size_bytes: int
    """Once it is decompressed."""

    compressed_bytes: int
    num_values: int


@dataclass
class PageGuard:
    """Follows what Arrow reads of a file's column chunks, each from its start on, and looks at each page before Arrow.

    on_page: called for each page of data. `read` raises PageError for a page without measure, and what `on_page`
    raises."""

    on_page: Callable[[Page], None] = lambda _: None
    _expected: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """Offset at which a chunk goes on -> bytes up to its next header, and what was read of that header."""

    def restart(self) -> None:
        """Forget the chunks that were read in part: the next read is the start of one."""
        self._expected.clear()

    def read(self, offset: int, data: bytes) -> None:
        """Look at the headers in bytes that Arrow has asked for."""
        num_left, header = self._expected.pop(offset, (0, b""))
        data, end = header + data, offset + len(data)
        position = num_left
        while position < len(data):
            try:
                found, position = _struct(data, position, 0)
            except IndexError:  # goes on in the next piece
                if len(data) - position <= _MAX_HEADER_BYTES:
                    self._expected[end] = (0, data[position:])
                return
            except _MalformedError:  # as it is for Arrow, or what lies behind the last page
                return
            size = found.get(_COMPRESSED)
            if not isinstance(size, int) or size < 0:
                return
            self._check(found, size)
            position += size
        self._expected[end] = (position - len(data), b"")

    def _check(self, header: dict[int, Any], compressed: int) -> None:
        size = _number(header, _UNCOMPRESSED)
        if size > _MAX_PAGE_BYTES or (size > _MAX_BOMB_BYTES and size > _MAX_RATIO * compressed):
            raise PageError(f"a page of {compressed:,} bytes that becomes {size:,}")
        for kind in (_DATA, _DATA_V2):
            if isinstance(described := header.get(kind), dict):
                self.on_page(Page(size, compressed, max(0, _number(described, _NUM_VALUES))))


def values_of_chunks(footer: bytes) -> list[list[int]]:
    """Return how many values each chunk of each row group has, nulls and empty lists among them, as a footer says.

    Empty for a footer that is none."""
    try:
        described, _ = _struct(footer, 0, 0)
    except (IndexError, _MalformedError):
        return []
    return [
        [_number(_field(chunk, _CHUNK), _VALUES_OF_CHUNK) for chunk in _items(group, _CHUNKS)]
        for group in _items(described, _ROW_GROUPS)
    ]


def _field(found: Any, name: int) -> dict[int, Any]:
    value = found.get(name) if isinstance(found, dict) else None
    return value if isinstance(value, dict) else {}


def _items(found: Any, name: int) -> list[Any]:
    value = found.get(name) if isinstance(found, dict) else None
    return value if isinstance(value, list) else []


def _number(header: dict[int, Any], name: int) -> int:
    """Return a field that is an integer; 0 where it is of another type, as Thrift skips it."""
    value = header.get(name, 0)
    return value if isinstance(value, int) else 0


class _MalformedError(Exception):
    """No struct of Thrift's compact protocol."""


def _struct(data: bytes, position: int, depth: int) -> tuple[dict[int, Any], int]:
    """Return integers, structs and lists in a struct, by field, and where it ends. Raises IndexError for its rest."""
    if depth > _MAX_NESTED:
        raise _MalformedError
    found: dict[int, Any] = {}
    last = 0
    while head := data[position]:
        position += 1
        if head >> 4:
            last += head >> 4
        else:
            number, position = _varint(data, position)
            last = _signed(number, 16)
        found[last], position = _value(data, position, head & 15, depth, is_field=True)
    return found, position + 1


def _value(data: bytes, position: int, kind: int, depth: int, *, is_field: bool = False) -> tuple[Any, int]:
    if kind in (1, 2):
        return None, position if is_field else position + 1
    if kind in (4, 5, 6):
        number, position = _varint(data, position)
        return _signed(number, {4: 16, 5: 32, 6: 64}[kind]), position
    if kind == 12:
        return _struct(data, position, depth + 1)
    if kind == 9:
        return _list(data, position, depth)
    return None, _skipped(data, position, kind, depth)


def _list(data: bytes, position: int, depth: int) -> tuple[list[Any], int]:
    if depth > _MAX_NESTED:
        raise _MalformedError
    head = data[position]
    size, position = (head >> 4, position + 1) if head >> 4 != 15 else _varint(data, position + 1)
    values = []
    for _ in range(size):
        value, position = _value(data, position, head & 15, depth + 1)
        values.append(value)
    return values, position


def _skipped(data: bytes, position: int, kind: int, depth: int) -> int:
    """Return where a value ends that no header needs."""
    if depth > _MAX_NESTED:
        raise _MalformedError
    if kind in (3, 7, 13):
        return position + {3: 1, 7: 8, 13: 16}[kind]
    if kind == 8:
        size, position = _varint(data, position)
        return position + size
    if kind == 10:  # a set, which is as a list
        return _list(data, position, depth)[1]
    if kind == 11:
        size, position = _varint(data, position)
        kinds = [data[position] >> 4, data[position] & 15] if size else []
        position += bool(size)
    else:
        raise _MalformedError
    for _ in range(size):
        for item in kinds:
            _, position = _value(data, position, item, depth + 1)
    return position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise _MalformedError


def _signed(number: int, bits: int) -> int:
    """Return the integer that a zigzag varint stands for, as a type of so many bits holds it."""
    value = (number >> 1) ^ -(number & 1)
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
