"""Tar shards as the webdataset library reads them: consecutive members that share a key are one sample.

A key is a member's path up to the first dot of its base name. The first image member of a sample is its image; further
ones are counted, or with `--tar-images all` each begins a row of its own. Beyond
webdataset: a broken tar gives the rows before the break and one reject; a sample without an image, or with a link in
place of one, is a reject; so is a tar without samples; members without a suffix count as images; READMEs and their
like, and what macOS adds, are no samples (`suffixes`).

The number of rows of a tar is recorded before its last row is yielded. So an uncounted tar always has a row that is not
done: when the store drops the tar, that row says so, and the count is never a guess.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

import pyarrow as pa

from captioner.inputs.blocks import Done, Limits, Row, tables_of, too_large
from captioner.inputs.suffixes import IMAGE_SUFFIXES, is_beside_samples
from captioner.inputs.tar import TAR_ERRORS, BrokenTarError, Member, members, open_tar, plain_name
from captioner.inputs.units import Columns, Unit
from captioner.schema import Reject, RejectReason
from captioner.storage import Store, urls
from captioner.storage.faults import StoreError, changed
from captioner.storage.json_text import parse_json

__all__ = ["OnEnd", "count_samples", "read_tar"]

_NO_ENDING = "(none)"
_MAX_MEMBERS = 10_000  # of one sample
_MAX_ENDINGS = 1 << 20  # characters of their endings together
_MAX_SIDECAR_BYTES = 16 << 20  # a larger text beside an image is a null in its kept column


class OnEnd(NamedTuple):
    """Called at the end of a tar, once its number of rows is certain."""

    rows: Callable[[int], None] = lambda _: None
    """Called with the number of its rows."""

    further: Callable[[int], None] = lambda _: None
    """Called with the number of images that are left out, since another of their sample comes first."""

    def __call__(self, end: "_End") -> None:
        """Call both, where the end is certain."""
        if end.is_certain:
            self.further(end.num_further)
            self.rows(end.num_rows)


_IGNORED = OnEnd()


def count_samples(store: Store, unit: Unit, columns: Columns, on_end: OnEnd = _IGNORED) -> int:
    """Return how many rows `read_tar` yields; where the store drops the tar, how many at least. `on_end` as there.

    Reads the headers, and bodies only where the store cannot skip them.
    """
    walk = _Walk(store, unit, columns, Limits(), lambda _: False)
    for _ in walk:
        pass
    assert walk.end is not None
    on_end(walk.end)
    return walk.end.num_rows


def read_tar(
    store: Store, unit: Unit, columns: Columns, limits: Limits, done: Done | None = None, on_end: OnEnd = _IGNORED
) -> Iterator[pa.Table]:
    """Yield the samples that are not done; rejects in place of those that cannot be read.

    on_end: called with the number of rows once it is certain, before the last one is yielded. A store that drops the
    tar costs all rows up to `limits.stop_at`; in an uncounted tar, the first row that is left.
    """
    walk = _Walk(store, unit, columns, limits, lambda position: limits.is_wanted(position, done))
    return tables_of(_rows(walk, on_end), unit.ordinal, columns.kept, limits.rows_per_block)


def _rows(walk: "_Walk", on_end: OnEnd) -> Iterator[Row]:
    yield from (sample.row(walk.unit, walk.columns) for sample in walk if walk.is_wanted(sample.position))
    if walk.end is None:
        return
    on_end(walk.end)
    if walk.end.last is not None and walk.is_wanted(walk.end.last.position):
        yield walk.end.last.row(walk.unit, walk.columns)
    yield from _rejects(walk, walk.end)


def _rejects(walk: "_Walk", end: "_End") -> Iterator[Row]:
    """Yield the rejects in place of the rows that cannot be read."""
    if end.reject is None and walk.unit.num_rows is None:
        return
    reject = end.reject or changed(f"it has {end.position} samples, not {walk.unit.num_rows}").reject
    for position in filter(walk.is_wanted, _unread(walk.limits.stop_at, end)):
        key = f"/{end.key}" if end.key and position == end.position else f"#{position}"
        yield Row(position, f"{walk.unit.name}{key}", reject=reject)
        if walk.limits.stop_at is None:
            return


def _unread(stop_at: int | None, end: "_End") -> Iterable[int]:
    """Return the positions after the end of a pass: those that are known, else all, of which at least one exists."""
    if stop_at is not None:
        return range(end.position, stop_at)
    return range(end.position, end.num_rows) if end.is_certain else count(end.position)


@dataclass
class _Sample:
    """The members that share a key, as far as they are read."""

    position: int
    key: str
    endings: list[str] = field(default_factory=list)
    image_name: str | None = None
    image: bytes | Reject | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    num_characters: int = 0
    """Of its endings together."""

    def has_image_of(self, ending: str, columns: Columns) -> bool:
        """Return whether a member with this ending is a second image of the same name, which is a sample of its own."""
        return _is_image(ending, columns.image) and (ending or _NO_ENDING) in self.endings

    def row(self, unit: Unit, columns: Columns) -> Row:
        image_id = f"{unit.name}/{self.image_name or self.key}".removesuffix("/")
        kept = tuple(self._kept(name) for name in columns.kept_from)
        if isinstance(self.image, bytes):
            return Row(self.position, image_id, data=self.image, kept=kept)
        missing = Reject(RejectReason.MISSING, f"no image member among: {', '.join(self.endings)[:200]}")
        return Row(self.position, image_id, reject=self.image or missing, kept=kept)

    def _kept(self, name: str) -> str | None:
        """Return the text of the member with this ending, else the value of this key in the sample's .json."""
        if name in self.texts:
            return self.texts[name].decode("utf-8", "backslashreplace")
        try:
            described = parse_json(self.texts.get("json", b"{}"))
        except ValueError:
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
    """The sample before it, not yielded yet."""

    reject: Reject | None = None
    """The reject at `position`; None if the tar ended there."""

    key: str = ""
    """Key of the sample there, as far as it was read."""

    is_certain: bool = True
    """False where a retry may get further."""

    num_further: int = 0
    """Images before it that are no rows: another of their sample comes first."""

    @property
    def num_rows(self) -> int:
        """Rows up to here."""
        return self.position + (self.reject is not None)


@dataclass
class _Walk:
    """A pass over a tar. Yields every sample once the next one begins; `end` says how it ended."""

    store: Store
    unit: Unit
    columns: Columns
    limits: Limits
    is_wanted: Callable[[int], bool]

    end: _End | None = None
    """None during the pass, and after it reached `limits.stop_at`."""

    _current: _Sample | None = None
    _num_seen: int = 0
    _num_further: int = 0

    def __iter__(self) -> Iterator[_Sample]:
        try:
            yield from self._samples()
        except StoreError as error:  # a retry reads the whole sample, so its beginning does not count
            self.end = self._broken(error.fault.reject_of_unit, is_certain=False)
        except TAR_ERRORS as error:
            reject = Reject(RejectReason.CORRUPT, f"{type(error).__name__}: {error}"[:300])
            is_whole = self._current is not None and self._current.image_name is not None
            end = _End(self._num_seen, self._current, reject) if is_whole else self._broken(reject)
            self.end = replace(end, num_further=self._num_further)

    def _broken(self, reject: Reject, *, is_certain: bool = True) -> _End:
        position, key = (0, "") if self._current is None else (self._current.position, self._current.key)
        return _End(position, None, reject, key, is_certain)

    def _samples(self) -> Iterator[_Sample]:
        with open_tar(self.store, self.unit.path, self.unit.size_bytes) as file:
            for member in members(file):
                if self.columns.leaves_out_texts and is_beside_samples(plain_name(member.name)):
                    continue
                key, ending = _split(member.name)
                if self._is_next(key, ending):
                    if self._current is not None:
                        yield self._current
                    if self._num_seen == self.limits.stop_at:
                        return
                    self._current = _Sample(self._num_seen, key)
                    self._num_seen += 1
                assert self._current is not None
                is_image = _is_image(ending, self.columns.image)
                self._num_further += is_image and self._current.image_name is not None
                is_wanted = self.is_wanted(self._current.position)
                _add(self._current, member, ending, self.columns, self.limits, is_wanted=is_wanted)
        empty = None if self._num_seen else Reject(RejectReason.EMPTY, "a tar without samples")
        self.end = _End(self._num_seen, self._current, empty, num_further=self._num_further)

    def _is_next(self, key: str, ending: str) -> bool:
        """Return whether a member begins another sample."""
        known = self._current
        if known is None or key != known.key:
            return True
        if self.columns.has_all_images and known.image_name is not None:
            return _is_image(ending, self.columns.image)
        return known.has_image_of(ending, self.columns)


def _add(sample: _Sample, member: Member, ending: str, columns: Columns, limits: Limits, *, is_wanted: bool) -> None:
    if len(sample.endings) == _MAX_MEMBERS:
        raise BrokenTarError(f"more than {_MAX_MEMBERS:,} members share the key {sample.key[:100]}")
    sample.endings.append(ending or _NO_ENDING)
    sample.num_characters += len(ending)
    if sample.num_characters > _MAX_ENDINGS:
        raise BrokenTarError(f"the names of the members that share the key {sample.key[:100]} are too long")
    if sample.image_name is None and _is_image(ending, columns.image):
        if is_wanted:
            sample.image = _image(member, limits)
        member.skip()
        sample.image_name = urls.printable(plain_name(member.name))
    elif is_wanted and _is_kept(ending, columns) and member.size_bytes <= _MAX_SIDECAR_BYTES:
        sample.texts[ending] = member.read()


def _is_kept(ending: str, columns: Columns) -> bool:
    return bool(columns.kept) and ending in (*columns.kept_from, "json")


def _image(member: Member, limits: Limits) -> bytes | Reject:
    if member.refusal is not None:
        return Reject(RejectReason.UNSUPPORTED, member.refusal)
    if reject := too_large(member.size_bytes, limits.max_image_bytes):
        return reject
    return member.read() or Reject(RejectReason.EMPTY, "0 bytes")


def _is_image(ending: str, wanted: str | None) -> bool:
    if wanted is not None:
        return ending == wanted.lower().lstrip(".")
    return not ending or "." + ending.rpartition(".")[2] in IMAGE_SUFFIXES


def _split(name: str) -> tuple[str, str]:
    """Return key and ending: `a/b.c/000.seg.png` is sample `a/b.c/000` with the ending `seg.png`."""
    folder, slash, base = plain_name(name).rpartition("/")
    stem, _, ending = base.partition(".")
    return urls.printable(folder + slash + stem), urls.printable(ending.lower())
