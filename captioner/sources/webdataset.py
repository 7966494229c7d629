"""Tar shards as the webdataset library reads them: consecutive members that share a key are one sample.

A key is a member's path up to the first dot of its base name. The first image member of a sample is its image. The tar
is a stream: never whole in memory, never unpacked - a member's name is only ever text, so `..`, links and devices lead
nowhere. Beyond webdataset: a broken tar gives the rows before the break and one reject, samples without an image and
links in place of one are rejects too, a tar without samples is one, and members without a suffix count as images.

A tar that nobody has counted has a last row that is not done: how many there are is noted before it is given out. So
whenever a store drops such a tar there is a row that exists and can say so, and the count is never guessed.
"""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import BinaryIO, cast

import pyarrow as pa

from captioner.rows import Reject, RejectReason
from captioner.sources import urls
from captioner.sources.blocks import Done, Limits, Row, tabulate, too_large
from captioner.sources.faults import StoreError, changed
from captioner.sources.store import Store
from captioner.sources.units import Columns, Unit

__all__ = ["check_tar", "count_samples", "read_tar"]

_BLOCK = 512
_NO_ENDING = "(none)"
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_HEADER_BYTES = 1 << 20  # of a long name or of pax records
_MAX_BODY_BYTES = 1 << 60  # beyond it no store can seek
_MAX_DIGITS = 19
_MAX_MEMBERS = 10_000  # of one sample
_MAX_SIDECAR_BYTES = 16 << 20  # a larger text beside an image is a null in its kept column
_DESCRIBING = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE),
)
_WITHOUT_BODY = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE),
    *(tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE),
)
_PAX_KEYS = ("path", "linkpath", "size")
_SPARSE = "GNU.sparse."
_DATA_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


OnEnd = Callable[[int], None]
"""Is told how many rows a unit has."""


def _ignore(_: int) -> None:
    pass


def check_tar(store: Store, url: str) -> Reject | None:
    """Return why a tar cannot be opened, or None where it can, or where another try may."""
    try:
        raw, _ = _sized(store, url)
        with raw:
            if next(_members(_decompressed(raw)), None) is None:
                return Reject(RejectReason.EMPTY, "a tar without a member")
    except (_BrokenTarError, *_DATA_ERRORS) as error:
        return Reject(RejectReason.CORRUPT, f"{type(error).__name__}: {error}"[:300])
    except StoreError as error:
        return None if error.fault.is_transient else error.fault.reject
    return None


def count_samples(store: Store, unit: Unit, columns: Columns, on_end: OnEnd = _ignore) -> int:
    """Return how many rows `read_tar` gives, or is known to give where the store drops the tar; `on_end` as there.

    Reads the headers, and the bodies only where the store cannot skip.
    """
    walk = _Walk(store, unit, columns, Limits(), lambda _: False)
    for _ in walk:
        pass
    assert walk.end is not None
    if walk.end.is_certain:
        on_end(walk.end.num_rows)
    return walk.end.num_rows


def read_tar(
    store: Store, unit: Unit, columns: Columns, limits: Limits, done: Done | None = None, on_end: OnEnd = _ignore
) -> Iterator[pa.Table]:
    """Yield the samples that are not done; where they cannot be read, rejects in their place.

    on_end: is told how many rows the tar has as soon as that is certain, before the last one is given out. A store that
    drops the tar costs all rows up to `limits.stop_at`, and the first one that is left where nobody has counted them.
    """

    def is_wanted(position: int) -> bool:
        return done is None or position >= len(done) or not done[position]

    rows = _rows(_Walk(store, unit, columns, limits, is_wanted), on_end)
    return tabulate(rows, unit.ordinal, columns.kept, limits.rows_per_block)


def _rows(walk: "_Walk", on_end: OnEnd) -> Iterator[Row]:
    yield from (sample.row(walk.unit, walk.columns) for sample in walk if walk.is_wanted(sample.position))
    if walk.end is None:
        return
    if walk.end.is_certain:
        on_end(walk.end.num_rows)
    if walk.end.last is not None and walk.is_wanted(walk.end.last.position):
        yield walk.end.last.row(walk.unit, walk.columns)
    yield from _rejects(walk, walk.end)


def _rejects(walk: "_Walk", end: "_End") -> Iterator[Row]:
    """Yield what stands in place of the rows that cannot be read."""
    if end.reject is None and walk.unit.num_rows is None:
        return
    reject = end.reject or changed(f"it has {end.position} samples, not {walk.unit.num_rows}").reject
    for position in filter(walk.is_wanted, _unread(walk.limits.stop_at, end)):
        key = f"/{end.key}" if end.key and position == end.position else f"#{position}"
        yield Row(position, f"{walk.unit.name}{key}", reject=reject)
        if walk.limits.stop_at is None:
            return


def _unread(stop_at: int | None, end: "_End") -> Iterable[int]:
    """Return the positions from the end of a pass on: those that are known, or else those of which one has to exist."""
    if stop_at is not None:
        return range(end.position, stop_at)
    return range(end.position, end.num_rows) if end.is_certain else count(end.position)


@dataclass
class _Sample:
    """The members that share a key, as far as they are wanted."""

    position: int
    key: str
    endings: list[str] = field(default_factory=list)
    image_name: str | None = None
    image: bytes | Reject | None = None
    texts: dict[str, bytes] = field(default_factory=dict)

    def has_image_of(self, ending: str, columns: Columns) -> bool:
        """Say whether a member with this ending is another image of the same name, which is a sample of its own."""
        return _is_image(ending, columns.image) and (ending or _NO_ENDING) in self.endings

    def row(self, unit: Unit, columns: Columns) -> Row:
        image_id = f"{unit.name}/{self.image_name or self.key}".removesuffix("/")
        kept = tuple(self._kept(name) for name in columns.kept_from)
        if isinstance(self.image, bytes):
            return Row(self.position, image_id, data=self.image, kept=kept)
        missing = Reject(RejectReason.MISSING, f"no image member among: {', '.join(self.endings)[:200]}")
        return Row(self.position, image_id, reject=self.image or missing, kept=kept)

    def _kept(self, name: str) -> str | None:
        """Return the text of the member with that ending, else the value of that key in the sample's .json."""
        if name in self.texts:
            return self.texts[name].decode("utf-8", "backslashreplace")
        try:
            described = json.loads(self.texts.get("json", b"{}"))
        except (ValueError, RecursionError):
            return None
        value = described.get(name) if isinstance(described, dict) else None
        if value is None:
            return None
        return urls.printable(value) if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class _End:
    """Where a pass over a tar ended."""

    position: int
    """The first position without a sample."""

    last: _Sample | None = None
    """The sample before it, which was held back."""

    reject: Reject | None = None
    """What stands at `position`, if not even that there is none."""

    key: str = ""
    """Key of the sample there, as far as it was read."""

    is_certain: bool = True
    """False where another try may get further."""

    @property
    def num_rows(self) -> int:
        """Rows up to here."""
        return self.position + (self.reject is not None)


@dataclass
class _Walk:
    """A pass over a tar: yields every sample once the next one begins, and in `end` how it ended."""

    store: Store
    unit: Unit
    columns: Columns
    limits: Limits
    is_wanted: Callable[[int], bool]

    end: _End | None = None
    """None while it lasts, and where it was to stop."""

    _current: _Sample | None = None
    _num_seen: int = 0

    def __iter__(self) -> Iterator[_Sample]:
        try:
            yield from self._samples()
        except StoreError as error:  # another try gives the whole sample, so what is there of it does not count
            self.end = self._broken(error.fault.reject_of_unit, is_certain=False)
        except (_BrokenTarError, *_DATA_ERRORS) as error:
            reject = Reject(RejectReason.CORRUPT, f"{type(error).__name__}: {error}"[:300])
            is_whole = self._current is not None and self._current.image_name is not None
            self.end = _End(self._num_seen, self._current, reject) if is_whole else self._broken(reject)

    def _broken(self, reject: Reject, *, is_certain: bool = True) -> _End:
        position, key = (0, "") if self._current is None else (self._current.position, self._current.key)
        return _End(position, None, reject, key, is_certain)

    def _samples(self) -> Iterator[_Sample]:
        with _open(self.store, self.unit) as file:
            for member in _members(file):
                key, ending = _split(member.name)
                if self._is_next(key, ending):
                    if self._current is not None:
                        yield self._current
                    if self._num_seen == self.limits.stop_at:
                        return
                    self._current = _Sample(self._num_seen, key)
                    self._num_seen += 1
                assert self._current is not None
                is_wanted = self.is_wanted(self._current.position)
                _add(self._current, member, ending, self.columns, self.limits, is_wanted=is_wanted)
        empty = None if self._num_seen else Reject(RejectReason.EMPTY, "a tar without samples")
        self.end = _End(self._num_seen, self._current, empty)

    def _is_next(self, key: str, ending: str) -> bool:
        """Say whether a member begins another sample."""
        known = self._current
        return known is None or key != known.key or known.has_image_of(ending, self.columns)


def _add(sample: _Sample, member: "_Member", ending: str, columns: Columns, limits: Limits, *, is_wanted: bool) -> None:
    if len(sample.endings) == _MAX_MEMBERS:
        raise _BrokenTarError(f"more than {_MAX_MEMBERS:,} members share the key {sample.key[:100]}")
    sample.endings.append(ending or _NO_ENDING)
    if sample.image_name is None and _is_image(ending, columns.image):
        if is_wanted:
            sample.image = _image(member, limits)
        member.skip()
        sample.image_name = urls.printable(_plain_name(member.name))
    elif is_wanted and _is_kept(ending, columns) and member.size_bytes <= _MAX_SIDECAR_BYTES:
        sample.texts[ending] = member.read()


def _is_kept(ending: str, columns: Columns) -> bool:
    return bool(columns.kept) and ending in (*columns.kept_from, "json")


def _image(member: "_Member", limits: Limits) -> bytes | Reject:
    if member.refusal is not None:
        return Reject(RejectReason.UNSUPPORTED, member.refusal)
    if reject := too_large(member.size_bytes, limits.max_image_bytes):
        return reject
    return member.read() or Reject(RejectReason.EMPTY, "0 bytes")


def _is_image(ending: str, wanted: str | None) -> bool:
    if wanted is not None:
        return ending == wanted.lower().lstrip(".")
    return not ending or "." + ending.rpartition(".")[2] in urls.IMAGE_SUFFIXES


def _plain_name(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def _split(name: str) -> tuple[str, str]:
    """Return key and ending: `a/b.c/000.seg.png` is sample `a/b.c/000` with the ending `seg.png`."""
    folder, slash, base = _plain_name(name).rpartition("/")
    stem, _, ending = base.partition(".")
    return urls.printable(folder + slash + stem), urls.printable(ending.lower())


class _BrokenTarError(Exception):
    """The bytes are not those of a tar."""


@dataclass
class _Member:
    """One member; its body can be read until the next one is asked for."""

    file: BinaryIO
    name: str
    size_bytes: int
    refusal: str | None = None  # why this member has no body of its own, though its name says image

    def __post_init__(self) -> None:
        self._end = self.file.tell() + self.size_bytes

    def read(self) -> bytes:
        """Return the body."""
        data = self.file.read(self.size_bytes)
        if len(data) < self.size_bytes:
            raise _BrokenTarError(f"cut short in {urls.printable(self.name)}")
        return data

    def skip(self) -> None:
        """Go to the end of the body, wherever the file stands in it."""
        if self.file.seek(self._end - self.file.tell(), io.SEEK_CUR) != self._end:
            raise _BrokenTarError(f"cut short in {urls.printable(self.name)}")


def _open(store: Store, unit: Unit) -> BinaryIO:
    raw, size_bytes = _sized(store, unit.path)
    if unit.size_bytes not in (None, size_bytes):
        raw.close()
        raise StoreError(changed(f"it has {size_bytes} bytes, not {unit.size_bytes}"))
    return _decompressed(raw)


def _sized(store: Store, url: str) -> tuple[BinaryIO, int]:
    raw = store.open(url)
    size_bytes = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    return raw, size_bytes


def _decompressed(raw: BinaryIO) -> BinaryIO:
    is_gzip = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    raw.seek(0)
    return cast("BinaryIO", gzip.GzipFile(fileobj=raw, mode="rb")) if is_gzip else raw


def _members(file: BinaryIO) -> Iterator[_Member]:
    """Yield the members with data, and links that stand for images; hidden ones are left out."""
    overrides: dict[str, str] = {}
    while (info := _header(file)) is not None:
        if info.type in _DESCRIBING:
            overrides |= _description(file, info)
            continue
        name = overrides.get("path", info.name)
        member = _Member(file, name, _body_size(info, overrides), _refusal(info, overrides))
        overrides = {}
        if not info.isdir() and not _is_hidden(name) and (_is_image_name(name) or not member.refusal):
            yield member
        member.skip()


def _header(file: BinaryIO) -> tarfile.TarInfo | None:
    """Return the next header, with the file where its body starts; None at the mark that ends the archive."""
    file.read(-file.tell() % _BLOCK)
    start = file.tell()
    block = file.read(_BLOCK)
    if block.count(0) == _BLOCK:
        return None
    if len(block) < _BLOCK:
        raise _BrokenTarError(f"cut short at byte {start:,}, before the mark that ends a tar")
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _BrokenTarError(f"no tar header at byte {start:,}: {error}") from error
    if not 0 <= info.size <= _MAX_BODY_BYTES:
        raise _BrokenTarError(f"a size of {info.size:,} bytes at byte {start:,}")
    if info.type == tarfile.GNUTYPE_SPARSE and block[482]:
        _skip_sparse_map(file)
    return info


def _description(file: BinaryIO, info: tarfile.TarInfo) -> dict[str, str]:
    """Return what an extended header says of the member after it."""
    body = _Member(file, "an extended header", info.size)
    if info.size > _MAX_HEADER_BYTES:
        raise _BrokenTarError(f"an extended header of {info.size:,} bytes")
    data = body.read()
    text = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": text}
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {"linkpath": text}
    return {} if info.type == tarfile.XGLTYPE else _pax_records(data)


def _pax_records(data: bytes) -> dict[str, str]:
    """Return the records of a pax header that matter here, each written as `LENGTH KEY=VALUE` and a line feed."""
    records = {}
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        is_length = space and length.isdigit() and len(length) <= _MAX_DIGITS
        if not is_length or not len(length) + 2 < int(length) <= len(data):
            raise _BrokenTarError("a pax header that is none")
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        key, _, value = record.decode("utf-8", "surrogateescape").partition("=")
        if key in _PAX_KEYS or key.startswith(_SPARSE):
            records[key] = value
    return records


def _body_size(info: tarfile.TarInfo, overrides: dict[str, str]) -> int:
    if info.type in _WITHOUT_BODY:
        return 0
    size = overrides.get("size", str(info.size))
    if not size.isdecimal() or len(size) > _MAX_DIGITS or int(size) > _MAX_BODY_BYTES:
        raise _BrokenTarError(f"a size of {urls.printable(size)[:40]}")
    return int(size)


def _refusal(info: tarfile.TarInfo, overrides: dict[str, str]) -> str | None:
    if info.islnk() or info.issym():
        return f"a link to {urls.printable(overrides.get('linkpath', info.linkname))[:200]}; links are not followed"
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(_SPARSE) for key in overrides):
        return "a sparse member"
    return "a device or a pipe" if info.isdev() else None


def _skip_sparse_map(file: BinaryIO) -> None:
    while len(block := file.read(_BLOCK)) == _BLOCK and block[504]:
        pass


def _is_hidden(name: str) -> bool:
    parts = _plain_name(name).split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part.strip(".") for part in parts)


def _is_image_name(name: str) -> bool:
    return urls.suffix(name) in urls.IMAGE_SUFFIXES
