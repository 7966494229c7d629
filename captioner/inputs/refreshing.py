"""Refresh the frozen input: add the files that are new below the same prefix, the rows that are new in the same list.

    frozen, refreshed = refresh(input_path, config, frozen, run_folder)

New images become new units behind the others, so no key ever changes. Images that changed or vanished are counted, and
their rows stay. `revisit` adds the rows of a Parquet file that was out of reach and can be read again. The units are
saved last, atomically: an interrupted refresh leaves the earlier input as it was. Memory holds 48 bytes for each image
of a listing, and a page.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from captioner.config import InputConfig
from captioner.errors import InputError
from captioner.inputs.access import open_input
from captioner.inputs.freezing import TableFile, counted, read_footer, table_unit, tar_unit, widen
from captioner.inputs.listing import ListingWriter
from captioner.inputs.selection import Census, Selection, input_errors, select
from captioner.inputs.units import Columns, Frozen, Unit, save_frozen
from captioner.inputs.uri_lists import write_uri_list
from captioner.schema import TRANSIENT_REASONS, Reject, RejectReason
from captioner.storage import Entry, Location, Place, Store, as_location, open_store, urls
from captioner.storage.faults import StoreError
from captioner.storage.parquet import open_parquet_file

__all__ = ["Refreshed", "refresh", "revisit"]

_THREADS = 16
_NUM_NAMED = 3  # of the images that changed or vanished
_COLUMNS = ["uri", "image_id", "size_bytes"]
# CloudFront's and S3's older kind, and Azure's shared access signatures
_OF_SIGNATURE = re.compile(r"(?<=[?&])(expires|se|st|ske|skt|sks|skv|skoid|sktid|sp|spr|sr|sv)=[^&#\0]*", re.IGNORECASE)


@dataclass
class Refreshed:
    """How many are new, changed or vanished since the input was frozen."""

    noun: str
    """What is counted: `images` of a listing, or `files` that hold images."""

    num_new: int = 0
    num_changed: int = 0
    num_vanished: int = 0
    names: list[str] = field(default_factory=list)
    """Some that changed or vanished."""

    def __str__(self) -> str:
        text = f"{self.num_new:,} new {self.noun}"
        if self.num_changed or self.num_vanished:
            text += (
                f"; {self.num_changed:,} changed and {self.num_vanished:,} vanished since the input was frozen; their"
            )
            text += f" rows stay: {', '.join(self.names)}"
        return text

    def note_changed(self, name: str) -> None:
        """Count one whose size changed."""
        self.num_changed += 1
        self.names += [name] if len(self.names) < _NUM_NAMED else []


def refresh(
    input_path: str,
    config: InputConfig,
    frozen: Frozen,
    run_folder: Place,
    on_progress: Callable[[int], None] = lambda _: None,
    scratch: str | None = None,
    before_write: Callable[[], None] = lambda: None,
) -> tuple[Frozen, Refreshed]:
    """Return the input with what is new added, and save it below `run_folder`, or only in a local `scratch`.

    before_write: called before each change, which it prevents by raising a CaptionerError. Raises InputError for an
    input that is gone, or whose new files do not fit; JobError for a store that fails.
    """
    with input_errors(input_path):
        selection = select(input_path, config)
        grow = _files if frozen.kind in ("files", "list") else _units
        new, refreshed, skipped = grow(
            selection, config, frozen, _Folders(run_folder, scratch, before_write), on_progress
        )
    grown = replace(frozen, units=(*frozen.units, *new), skipped=skipped)
    if new and scratch is None:
        save_frozen(grown, run_folder, before_write)
    return grown, refreshed


def revisit(
    config: InputConfig, frozen: Frozen, run_folder: Place | None, before_write: Callable[[], None] = lambda: None
) -> Frozen:
    """Return the input with the rows of each Parquet file that was out of reach and can be read now; save it.

    Such a file was frozen as one row that says why. The key of that row becomes that of its first row, and no other key
    changes. run_folder: None to save nothing. before_write: as of `refresh`.
    """
    unreachable = [unit for unit in frozen.units if unit.reject and unit.reject.reason in TRANSIENT_REASONS]
    if not unreachable:
        return frozen
    with ThreadPoolExecutor(_THREADS) as threads:
        found = {unit.ordinal: unit for unit in threads.map(lambda unit: _retry(unit, frozen, config), unreachable)}
    revisited = replace(frozen, units=tuple(found.get(unit.ordinal, unit) for unit in frozen.units))
    if revisited != frozen and run_folder is not None:
        save_frozen(revisited, run_folder, before_write)
    return revisited


def _retry(unit: Unit, frozen: Frozen, config: InputConfig) -> Unit:
    store = open_input(config, unit.path)
    try:
        table = read_footer(store, Entry(unit.path, unit.size_bytes))
        if table.reject is not None:
            return unit if table.reject.reason != RejectReason.CORRUPT else replace(unit, reject=table.reject)
        return table_unit(unit.ordinal, _fit_to(table, frozen.columns, unit.name, store, config), unit.name)
    except StoreError:
        return unit


def _fit_to(table: TableFile, columns: Columns, name: str, store: Store, config: InputConfig) -> TableFile:
    """Return the table, or one row that says why its rows cannot be added: the row that was frozen for it needs one."""
    assert table.schema is not None
    if not table.num_rows:
        return TableFile(table.entry, reject=Reject(RejectReason.EMPTY, "a table without rows"))
    try:
        is_fitting = widen(columns, table.schema, ("the table", name), config) == columns
    except InputError:
        is_fitting = False
    if not is_fitting:
        detail = "kept columns of types that the table's do not hold"
        return TableFile(table.entry, reject=Reject(RejectReason.UNSUPPORTED, detail))
    return counted(table, columns, store)


@dataclass(frozen=True)
class _Folders:
    """Where the listing is, and where its new parts are written."""

    run_folder: Place
    scratch: str | None
    before_write: Callable[[], None]

    def writer(self, known: "_Known", first: int, on_progress: Callable[[int], None]) -> "_NewRows":
        return _NewRows(
            known, self.run_folder if self.scratch is None else self.scratch, on_progress, first, self.before_write
        )


_Grown = tuple[Sequence[Unit], Refreshed, Mapping[str, int]]


def _files(
    selection: Selection, config: InputConfig, frozen: Frozen, folders: _Folders, on_progress: Callable[[int], None]
) -> _Grown:
    """Add the images, or rows of a list, that are not in the listing."""
    census = Census(config)
    known = _Known(folders.run_folder, frozen)
    writer = folders.writer(known, len(frozen.units), on_progress)
    for entry in census.images(selection):
        if frozen.kind == "files":
            writer.add(entry.url, entry.size_bytes)
    if frozen.kind == "list":
        for entry in census.units.get("list", ()):
            write_uri_list(selection.store, entry.url, config, writer)
    units = writer.close()
    refreshed = known.refreshed
    refreshed.num_new = sum(unit.num_rows or 0 for unit in units)
    known.count_vanished()
    return units, refreshed, census.skipped(frozen.kind)


class _Known:
    """The rows of the listing, each as a digest of its image_id and its URI without a signature."""

    def __init__(self, run_folder: Place, frozen: Frozen) -> None:
        self.refreshed = Refreshed("images")
        self._parts = [as_location(run_folder) / unit.path for unit in frozen.units]
        self._store = open_store(run_folder)
        digests, sizes = [np.empty(0, "S32")], [np.empty(0, np.int64)]
        for rows in map(self._rows, self._parts):
            digests.append(np.array([_digest(uri, name) for uri, name, _ in rows], "S32"))
            sizes.append(np.array([-1 if size is None else size for _, _, size in rows], np.int64))
        self._digests, first, self._left = np.unique(np.concatenate(digests), return_index=True, return_counts=True)
        self._sizes = np.concatenate(sizes)[first]

    def _rows(self, part: Location) -> list[tuple[str | None, str, int | None]]:
        table = open_parquet_file(self._store.read_bytes(part)).read(_COLUMNS)
        return list(zip(*(table.column(name).to_pylist() for name in _COLUMNS), strict=True))

    def take(self, uri: str | None, image_id: str, size_bytes: int | None) -> bool:
        """Return whether the listing has such a row that was not taken yet, and take it."""
        index = self._index(uri, image_id)
        if index is None or not self._left[index]:
            return False
        self._left[index] -= 1
        if size_bytes is not None and self._sizes[index] not in (-1, size_bytes):
            self.refreshed.note_changed(image_id)
        return True

    def _index(self, uri: str | None, image_id: str) -> int | None:
        digest = np.bytes_(_digest(uri, image_id))
        index = int(np.searchsorted(self._digests, digest))
        return index if index < len(self._digests) and self._digests[index] == digest else None

    def count_vanished(self) -> None:
        """Count the rows that were not taken, and name the first of them."""
        self.refreshed.num_vanished = int(self._left.sum())
        if not self.refreshed.num_vanished:
            return
        for uri, image_id, _ in chain.from_iterable(map(self._rows, self._parts)):
            if len(self.refreshed.names) == _NUM_NAMED:
                return
            index = self._index(uri, image_id)
            if index is not None and self._left[index]:
                self.refreshed.names.append(image_id)


def _digest(uri: str | None, image_id: str) -> bytes:
    text = f"{urls.redact(uri or '')}\0{image_id}"
    if "***" in text:  # signed: its expiry and scope belong to the signature, not to the image
        text = _OF_SIGNATURE.sub(r"\1=***", text)
    return (
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest().encode()
    )  # in hex, since NumPy strips zeros from bytes


class _NewRows(ListingWriter):
    """Writes the rows that are not in the listing."""

    def __init__(self, known: _Known, *where: Any) -> None:
        super().__init__(*where)
        self._known = known

    def add(
        self,
        uri: str,
        size_bytes: int | None = None,
        image_id: str | None = None,
        kept: Sequence[Any] = (),
        num_further: int = 0,
    ) -> None:
        """As ListingWriter.add."""
        if not self._known.take(uri or None, image_id or urls.shown(uri), size_bytes):
            super().add(uri, size_bytes, image_id, kept, num_further)


def _units(
    selection: Selection, config: InputConfig, frozen: Frozen, folders: _Folders, on_progress: Callable[[int], None]
) -> _Grown:
    """Add the tars, or Parquet files, that are not units yet."""
    del folders, on_progress
    census = Census(config)
    for _ in census.images(selection):
        pass
    entries = census.units.get("tar" if frozen.kind == "webdataset" else "parquet", [])
    known = {unit.path: unit for unit in frozen.units}
    refreshed = Refreshed("files")
    for entry in entries:
        size_bytes = known[entry.url].size_bytes if entry.url in known else None
        if size_bytes is not None and entry.size_bytes not in (None, size_bytes):
            refreshed.note_changed(known[entry.url].name)
    vanished = [unit.name for path, unit in known.items() if path not in {entry.url for entry in entries}]
    refreshed.num_vanished = len(vanished)
    refreshed.names += vanished[: _NUM_NAMED - len(refreshed.names)]
    new = [entry for entry in entries if entry.url not in known]
    refreshed.num_new = len(new)
    return _made(selection, frozen, new, config), refreshed, census.skipped(frozen.kind)


def _made(selection: Selection, frozen: Frozen, new: Sequence[Entry], config: InputConfig) -> list[Unit]:
    first = len(frozen.units)
    if frozen.kind == "webdataset":
        return [tar_unit(first + index, entry, selection) for index, entry in enumerate(new)]
    units = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for index, table in enumerate(threads.map(lambda entry: read_footer(selection.store, entry), new)):
            name = selection.name(table.entry.url)
            if table.schema is not None:
                if widen(frozen.columns, table.schema, ("the table", name), config) != frozen.columns:
                    raise InputError(
                        f"{name} has kept columns of types that the table's do not hold; caption it into a new OUTPUT"
                    )
                table = counted(table, frozen.columns, selection.store)
            units.append(table_unit(first + index, table, name))
    return units
