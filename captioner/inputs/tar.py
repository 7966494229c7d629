"""Tar archives as a stream of members: never whole in memory, never unpacked.

A member's name is only ever text, so `..`, links and devices lead nowhere. Knows GNU's and pax headers and gzip; knows
nothing of samples.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from captioner.inputs.suffixes import IMAGE_SUFFIXES
from captioner.schema import Reject, RejectReason
from captioner.storage import Store, urls
from captioner.storage.faults import StoreError, changed

__all__ = ["TAR_ERRORS", "BrokenTarError", "Member", "check_tar", "members", "open_tar", "plain_name"]

_BLOCK = 512
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_HEADER_BYTES = 1 << 20  # of pax records
_MAX_NAME_BYTES = 1 << 14  # four times what Linux takes for a path
_MAX_BODY_BYTES = 1 << 60  # beyond it no store can seek
_MAX_DIGITS = 19
_DESCRIBING = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE),
)
_WITHOUT_BODY = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE),
    *(tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE),
)
_PAX_KEYS = frozenset({b"path", b"linkpath", b"size"})
_SPARSE = b"GNU.sparse."
_IS_SPARSE = "is sparse"  # no key of a pax header


class BrokenTarError(Exception):
    """The bytes are not a tar."""


TAR_ERRORS = (BrokenTarError, EOFError, zlib.error, gzip.BadGzipFile)
"""What reading bytes that are not a whole tar raises."""


@dataclass
class Member:
    """One member of a tar. Its body can be read until the next member is asked for."""

    file: BinaryIO
    name: str
    size_bytes: int
    refusal: str | None = None
    """Why this member has no body of its own, though its name is that of an image."""

    def __post_init__(self) -> None:
        self._end = self.file.tell() + self.size_bytes

    def read(self) -> bytes:
        """Return the body."""
        data = self.file.read(self.size_bytes)
        if len(data) < self.size_bytes:
            raise BrokenTarError(f"cut short in {urls.printable(self.name)}")
        return data

    def skip(self) -> None:
        """Move to the end of the body from any position in it."""
        if self.file.seek(self._end - self.file.tell(), io.SEEK_CUR) != self._end:
            raise BrokenTarError(f"cut short in {urls.printable(self.name)}")


def open_tar(store: Store, url: str, size_bytes: int | None = None) -> BinaryIO:
    """Return an open tar, decompressed if it is gzip.

    size_bytes: of the file when it was frozen; None for any. Raises StoreError, `changed` for another size.
    """
    raw = store.open(url)
    found = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    if size_bytes not in (None, found):
        raw.close()
        raise StoreError(changed(f"it has {found} bytes, not {size_bytes}"))
    return _decompressed(raw)


def _decompressed(raw: BinaryIO) -> BinaryIO:
    is_gzip = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    raw.seek(0)
    return cast("BinaryIO", gzip.GzipFile(fileobj=raw, mode="rb")) if is_gzip else raw


def check_tar(store: Store, url: str) -> Reject | None:
    """Return why a tar cannot be opened; None where it can, or where another try may succeed."""
    try:
        with open_tar(store, url) as file:
            if next(members(file), None) is None:
                return Reject(RejectReason.EMPTY, "a tar without a member")
    except TAR_ERRORS as error:
        return Reject(RejectReason.CORRUPT, f"{type(error).__name__}: {error}"[:300])
    except StoreError as error:
        return None if error.fault.is_transient else error.fault.reject
    return None


def members(file: BinaryIO) -> Iterator[Member]:
    """Yield the members with data, and links with the name of an image; hidden ones are left out."""
    overrides: dict[str, str] = {}
    while (info := _header(file)) is not None:
        if info.type in _DESCRIBING:
            overrides |= _description(file, info)
            continue
        name = overrides.get("path", info.name)
        member = Member(file, name, _body_size(info, overrides), _refusal(info, overrides))
        overrides = {}
        if not info.isdir() and not _is_hidden(name) and (_is_image_name(name) or not member.refusal):
            yield member
        member.skip()


def _header(file: BinaryIO) -> tarfile.TarInfo | None:
    """Return the next header and leave the file where its body starts; None at the end-of-archive block."""
    file.read(-file.tell() % _BLOCK)
    start = file.tell()
    block = file.read(_BLOCK)
    if block.count(0) == _BLOCK:
        return None
    if len(block) < _BLOCK:
        raise BrokenTarError(f"cut short at byte {start:,}, before the block that ends a tar")
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BrokenTarError(f"no tar header at byte {start:,}: {error}") from error
    if not 0 <= info.size <= _MAX_BODY_BYTES:
        raise BrokenTarError(f"a size of {info.size:,} bytes at byte {start:,}")
    if info.type == tarfile.GNUTYPE_SPARSE and block[482]:
        _skip_sparse_map(file)
    return info


def _description(file: BinaryIO, info: tarfile.TarInfo) -> dict[str, str]:
    """Return the fields that an extended header sets for the next member."""
    body = Member(file, "an extended header", info.size)
    if info.size > _MAX_HEADER_BYTES:
        raise BrokenTarError(f"an extended header of {info.size:,} bytes")
    data = body.read()
    if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        return {"path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath": _name(data.rstrip(b"\0"))}
    return {} if info.type == tarfile.XGLTYPE else _pax_records(data)


def _pax_records(data: bytes) -> dict[str, str]:
    """Return the records of a pax header that are used here; each is `LENGTH KEY=VALUE` and a line feed."""
    records, start = dict[str, str](), 0
    stop = len(data.rstrip(b"\0"))
    while start < stop:
        length, space, _ = data[start : start + _MAX_DIGITS + 1].partition(b" ")
        end = start + int(length) if space and length.isdigit() else 0
        if not start + len(length) + 2 < end <= len(data):
            raise BrokenTarError("a malformed pax header")
        key, _, value = data[start + len(length) + 1 : end - 1].partition(b"=")
        if key in _PAX_KEYS:
            records[key.decode()] = _name(value)
        elif key.startswith(_SPARSE):
            records[_IS_SPARSE] = ""
        start = end
    return records


def _name(text: bytes) -> str:
    """Return a name, or another value of a header. Raises BrokenTarError for one that no file can have."""
    if len(text) > _MAX_NAME_BYTES:
        raise BrokenTarError(f"a name of {len(text):,} bytes; at most {_MAX_NAME_BYTES:,} are read")
    return text.decode("utf-8", "surrogateescape")


def _body_size(info: tarfile.TarInfo, overrides: dict[str, str]) -> int:
    if info.type in _WITHOUT_BODY:
        return 0
    size = overrides.get("size", str(info.size))
    if not size.isdecimal() or len(size) > _MAX_DIGITS or int(size) > _MAX_BODY_BYTES:
        raise BrokenTarError(f"a size of {urls.printable(size)[:40]}")
    return int(size)


def _refusal(info: tarfile.TarInfo, overrides: dict[str, str]) -> str | None:
    if info.islnk() or info.issym():
        return f"a link to {urls.printable(overrides.get('linkpath', info.linkname))[:200]}; links are not followed"
    if info.type == tarfile.GNUTYPE_SPARSE or _IS_SPARSE in overrides:
        return "a sparse member"
    return "a device or a pipe" if info.isdev() else None


def _skip_sparse_map(file: BinaryIO) -> None:
    while len(block := file.read(_BLOCK)) == _BLOCK and block[504]:
        pass


def _is_hidden(name: str) -> bool:
    parts = plain_name(name).split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part.strip(".") for part in parts)


def _is_image_name(name: str) -> bool:
    return urls.suffix(name) in IMAGE_SUFFIXES


def plain_name(name: str) -> str:
    """Return a member's name without `./` or `/` at its start."""
    return name.removeprefix("./").lstrip("/")
