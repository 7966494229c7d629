"""The frozen input, grown by what is new: files below the same prefix, rows of the same list.

    frozen, refreshed = refresh(input_path, config, frozen, run_folder)

New images become new units behind the others, so no key ever changes. What changed or vanished since is counted, and
what is there of it stays. `revisit` gives a Parquet file that was out of reach its rows once it is not. The units are
written down last, at one moment: an interrupted refresh leaves the earlier input as it was. Memory holds 48 bytes for
each image of a listing, and a page.
"""

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from captioner.config import InputConfig
from captioner.errors import InputError, JobError
from captioner.rows import TRANSIENT_REASONS, Reject, RejectReason
from captioner.sources import urls
from captioner.sources.faults import StoreError
from captioner.sources.freezing import TableFile, checked, look_at, table_unit, tar_unit, widened
from captioner.sources.listing import ListingWriter, write_uri_list
from captioner.sources.selection import Census, Selection, select
from captioner.sources.store import Entry, Store, open_store
from captioner.sources.units import Columns, Frozen, Unit, save_frozen

__all__ = ["Refreshed", "refresh", "revisit"]

_THREADS = 16
_NUM_NAMED = 3  # of the images that changed or vanished
_COLUMNS = ["uri", "image_id", "size_bytes"]
# CloudFront's and S3's older kind, and Azure's shared access signatures
_OF_SIGNATURE = re.compile(r"(?<=[?&])(expires|se|st|ske|skt|sks|skv|skoid|sktid|sp|spr|sr|sv)=[^&#\0]*", re.IGNORECASE)


@dataclass
class Refreshed:
    """What is new, and what is no longer as it was frozen."""

    noun: str
    """What is counted: `images` of a listing, or `files` with images in them."""

    num_new: int = 0
    num_changed: int = 0
    num_vanished: int = 0
    names: list[str] = field(default_factory=list)
    """Some that changed or vanished."""

    def __str__(self) -> str:
        text = f"{self.num_new:,} new {self.noun}"
        if self.num_changed or self.num_vanished:
            text += f"; {self.num_changed:,} changed and {self.num_vanished:,} vanished since they were frozen, and are"
            text += f" not touched: {', '.join(self.names)}"
        return text

    def note_changed(self, name: str) -> None:
        """Count one whose size is another one."""
        self.num_changed += 1
        self.names += [name] if len(self.names) < _NUM_NAMED else []


def refresh(
    input_path: str,
    config: InputConfig,
    frozen: Frozen,
    run_folder: str,
    output_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
    scratch: str | None = None,
) -> tuple[Frozen, Refreshed]:
    """Return the input with what is new in it, and write it down below `run_folder`, or only in a local `scratch`.

    Raises InputError for an input that is gone, or whose new files do not fit; JobError for a store that fails.
    """
    try:
        selection = select(input_path, config)
        grow = _files if frozen.kind in ("files", "list") else _units
        new, refreshed, skipped = grow(
            selection, config, frozen, _Folders(run_folder, output_options, scratch), on_progress
        )
    except StoreError as error:
        kind = JobError if error.fault.is_transient else InputError
        raise kind(f"{urls.redact(input_path)} cannot be listed: {error.fault.detail}") from error
    grown = replace(frozen, units=(*frozen.units, *new), skipped=skipped)
    if new and scratch is None:
        save_frozen(grown, run_folder, output_options)
    return grown, refreshed


def revisit(
    config: InputConfig, frozen: Frozen, run_folder: str | None, output_options: Mapping[str, Any] | None = None
) -> Frozen:
    """Return the input with the rows of each Parquet file that was out of reach and is not any more; write it down.

    Such a file was frozen as one row that says why; that row's key becomes its first row's, and no other key changes.
    run_folder: None to write nothing.
    """
    away = [unit for unit in frozen.units if unit.problem and unit.problem.reason in TRANSIENT_REASONS]
    if not away:
        return frozen
    with ThreadPoolExecutor(_THREADS) as threads:
        found = {unit.ordinal: unit for unit in threads.map(lambda unit: _seen_again(unit, frozen, config), away)}
    again = replace(frozen, units=tuple(found.get(unit.ordinal, unit) for unit in frozen.units))
    if again != frozen and run_folder is not None:
        save_frozen(again, run_folder, output_options)
    return again


def _seen_again(unit: Unit, frozen: Frozen, config: InputConfig) -> Unit:
    try:
        table = look_at(open_store(unit.path, config.storage_options), Entry(unit.path, unit.size_bytes))
    except StoreError:
        return unit
    if table.problem is not None:
        return unit if table.problem.reason != RejectReason.CORRUPT else replace(unit, problem=table.problem)
    return table_unit(unit.ordinal, _fitting(table, frozen.columns, unit.name), unit.name)


def _fitting(table: TableFile, columns: Columns, name: str) -> TableFile:
    """Return a table that gives one row at least, which one stands for already: its own, or one that says why not."""
    assert table.schema is not None
    if not table.num_rows:
        return TableFile(table.entry, problem=Reject(RejectReason.EMPTY, "a table without rows"))
    try:
        is_fitting = widened(columns, table.schema, ("the table", name)) == columns
    except InputError:
        is_fitting = False
    if not is_fitting:
        detail = "kept columns of types that the table's do not hold"
        return TableFile(table.entry, problem=Reject(RejectReason.UNSUPPORTED, detail))
    return checked(table, columns)


@dataclass(frozen=True)
class _Folders:
    """Where the listing is, and where its new parts go."""

    run_folder: str
    options: Mapping[str, Any] | None
    scratch: str | None

    def writer(self, known: "_Known", first: int, on_progress: Callable[[int], None]) -> "_NewRows":
        if self.scratch is not None:
            return _NewRows(known, self.scratch, None, on_progress, first)
        return _NewRows(known, self.run_folder, self.options, on_progress, first)


_Grown = tuple[Sequence[Unit], Refreshed, Mapping[str, int]]


def _files(
    selection: Selection, config: InputConfig, frozen: Frozen, folders: _Folders, on_progress: Callable[[int], None]
) -> _Grown:
    """Add the images, or rows of a list, that the listing has not."""
    census = Census(config)
    known = _Known(open_store(folders.run_folder, folders.options), folders.run_folder, frozen)
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
    """The rows of the listing, each as a digest of its URI, without a signature, and its image_id."""

    def __init__(self, store: Store, run_folder: str, frozen: Frozen) -> None:
        self.refreshed = Refreshed("images")
        self._parts = [urls.join(urls.absolute(run_folder), unit.path) for unit in frozen.units]
        self._store = store
        digests, sizes = [np.empty(0, "S32")], [np.empty(0, np.int64)]
        for rows in map(self._rows, self._parts):
            digests.append(np.array([_digest(uri, name) for uri, name, _ in rows], "S32"))
            sizes.append(np.array([-1 if size is None else size for _, _, size in rows], np.int64))
        self._digests, first, self._left = np.unique(np.concatenate(digests), return_index=True, return_counts=True)
        self._sizes = np.concatenate(sizes)[first]

    def _rows(self, url: str) -> list[tuple[str | None, str, int | None]]:
        table = pq.read_table(io.BytesIO(self._store.read_bytes(url)), columns=_COLUMNS)
        return list(zip(*(table.column(name).to_pylist() for name in _COLUMNS), strict=True))

    def take(self, uri: str | None, image_id: str, size_bytes: int | None) -> bool:
        """Say whether the listing has a row like this that was not taken yet, and take it."""
        place = self._place(uri, image_id)
        if place is None or not self._left[place]:
            return False
        self._left[place] -= 1
        if size_bytes is not None and self._sizes[place] not in (-1, size_bytes):
            self.refreshed.note_changed(image_id)
        return True

    def _place(self, uri: str | None, image_id: str) -> int | None:
        digest = np.bytes_(_digest(uri, image_id))
        place = int(np.searchsorted(self._digests, digest))
        return place if place < len(self._digests) and self._digests[place] == digest else None

    def count_vanished(self) -> None:
        """Note how many rows nothing took, and the first of them by name."""
        self.refreshed.num_vanished = int(self._left.sum())
        if not self.refreshed.num_vanished:
            return
        for uri, image_id, _ in chain.from_iterable(map(self._rows, self._parts)):
            if len(self.refreshed.names) == _NUM_NAMED:
                return
            place = self._place(uri, image_id)
            if place is not None and self._left[place]:
                self.refreshed.names.append(image_id)


def _digest(uri: str | None, image_id: str) -> bytes:
    text = f"{urls.redact(uri or '')}\0{image_id}"
    if "***" in text:  # signed: how long that holds, and for what, is of the signature and not of the image
        text = _OF_SIGNATURE.sub(r"\1=***", text)
    return (
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest().encode()
    )  # in hex, for NumPy cuts zeros off bytes


class _NewRows(ListingWriter):
    """Writes those rows that the listing has not."""

    def __init__(self, known: _Known, *where: Any) -> None:
        super().__init__(*where)
        self._known = known

    def add(
        self, uri: str, size_bytes: int | None = None, image_id: str | None = None, kept: Sequence[Any] = ()
    ) -> None:
        """As ListingWriter.add."""
        if not self._known.take(uri or None, image_id or urls.shown(uri), size_bytes):
            super().add(uri, size_bytes, image_id, kept)


def _units(
    selection: Selection, config: InputConfig, frozen: Frozen, folders: _Folders, on_progress: Callable[[int], None]
) -> _Grown:
    """Add the tars, or Parquet files, that are no units yet."""
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
    return _made(selection, frozen, new), refreshed, census.skipped(frozen.kind)


def _made(selection: Selection, frozen: Frozen, new: Sequence[Entry]) -> list[Unit]:
    first = len(frozen.units)
    if frozen.kind == "webdataset":
        return [tar_unit(first + index, entry, selection) for index, entry in enumerate(new)]
    units = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for index, table in enumerate(threads.map(lambda entry: look_at(selection.store, entry), new)):
            name = selection.name(table.entry.url)
            if table.schema is not None:
                if widened(frozen.columns, table.schema, ("the table", name)) != frozen.columns:
                    raise InputError(
                        f"{name} has kept columns of types that the table's do not hold; caption it into a new OUTPUT"
                    )
                table = checked(table, frozen.columns)
            units.append(table_unit(first + index, table, name))
    return units
