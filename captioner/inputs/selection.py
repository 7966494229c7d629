"""Which files a user's INPUT selects, page by page, and what kind of input they are together.

A folder or prefix is listed whole. Left out, and counted: hidden files (a component that starts with a dot, all below
a folder that starts with `_` and is no `_x=1`, `_SUCCESS` and the like), folder markers, and files that are no image
by the rule of `suffixes`. The kind of a folder is that of most of its files: images, tar shards or Parquet. A file that
is named, or matches a glob with a suffix, is always taken. A path that exists is literal, whatever braces and wildcards
it has.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from captioner.config import InputConfig
from captioner.errors import InputError, JobError
from captioner.inputs.access import open_input
from captioner.inputs.remedies import for_missing_path
from captioner.inputs.suffixes import IMAGE_SUFFIXES, TAR_SUFFIXES, is_text_name
from captioner.inputs.units import InputKind
from captioner.storage import Entry, Store, as_location, urls
from captioner.storage.faults import StoreError
from captioner.storage.patterns import expand_braces, glob_pattern, glob_prefix, has_braces, has_glob

__all__ = ["Census", "Found", "Selection", "describe", "input_errors", "is_hidden", "select"]

Family = Literal["image", "plain", "tar", "parquet", "list", "other", "hidden", "folder marker"]

_THREADS = 32
_PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
_METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})
_LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".jsonl", ".ndjson"})
_NAMED_LIST_SUFFIXES = frozenset({".json"})  # in a folder it is seldom a list
_REMEDIES = {
    **dict.fromkeys((".zip", ".7z", ".rar"), "unpack it and name its folder, or write it as a .tar"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".lz4", ".br"), "unpack it first; only tars are read as .tar.gz"),
    ".log": "write URIs of images as a .txt, one a line, or name the folder of the images",
    **dict.fromkeys((".arrow", ".feather", ".ipc", ".orc", ".avro", ".lance"), "write it as a .parquet"),
    **dict.fromkeys(
        (
            *(".sqlite", ".db", ".duckdb", ".mdb", ".lmdb", ".h5", ".hdf5", ".npy", ".npz", ".mat", ".pkl", ".pickle"),
            *(".pt", ".pth", ".safetensors", ".tfrecord", ".xlsx", ".xls", ".ods", ".xml", ".yaml", ".yml", ".md"),
        ),
        "write its images, or URIs of them, as a .parquet, or URIs as a .csv",
    ),
}
"""What to do with a named file that is neither an image nor holds some, by its suffix."""
_FORCED: dict[str, Family] = {"files": "image", "webdataset": "tar", "parquet": "parquet", "list": "list"}
_KIND_OF: dict[Family, InputKind] = {"image": "files", "tar": "webdataset", "parquet": "parquet", "list": "list"}


class Found(NamedTuple):
    """A selected file; `is_named` if the user named the file itself and not its folder."""

    entry: Entry
    is_named: bool


@dataclass(frozen=True)
class Selection:
    """The files that INPUT selects. An image_id is a path below the folder `root`."""

    store: Store
    shown: str
    root: str
    files: Iterator[Found]

    def name(self, url: str) -> str:
        """Return the name of a selected file in an image_id."""
        return urls.shown(url).removeprefix(self._shown_root)

    @functools.cached_property
    def _shown_root(self) -> str:
        return urls.shown(self.root)


@contextmanager
def input_errors(input_path: str) -> Iterator[None]:
    """Raise a StoreError as one that names the input: InputError, or JobError where another try may help."""
    try:
        yield
    except StoreError as error:
        kind = JobError if error.fault.is_transient else InputError
        raise kind(f"{as_location(input_path)} cannot be listed: {error.fault.detail}") from error


def select(input_path: str, config: InputConfig) -> Selection:
    """Return the files that `input_path` selects. Raises InputError if there is no such path; StoreError."""
    url = urls.absolute(input_path)
    shown = urls.shown(url)
    if "***@" in shown and "***@" not in url:
        raise InputError(f"{shown} holds credentials; pass them with --storage-options, they would be written down")
    store = open_input(config, url)
    if (entry := store.info(url)) is not None:
        root = entry.url if entry.url.endswith("/") else urls.parent(entry.url) + "/"
        return Selection(store, shown, root, _one(store, entry))
    if has_braces(url):
        root = urls.parent(re.split(r"[{*?\[]", url)[0] + ".") + "/"
        return Selection(store, shown, root, _braces(store, url, shown))
    if has_glob(url):
        return Selection(store, shown, urls.parent(glob_prefix(url) + ".") + "/", _glob(store, url))
    raise InputError(
        f"{shown} does not exist; expected a file, a folder or prefix, a glob or braces as {{0000..0099}}"
        f"{for_missing_path(shown)}"
    )


def _one(store: Store, entry: Entry) -> Iterator[Found]:
    if not entry.is_folder:
        yield Found(entry, is_named=True)
        return
    for page in store.pages(entry.url):
        yield from (Found(found, is_named=False) for found in page)


def _glob(store: Store, pattern: str) -> Iterator[Found]:
    matches = glob_pattern(pattern).match
    is_named = not pattern.endswith("*")
    for page in store.pages(glob_prefix(pattern)):
        yield from (Found(entry, is_named) for entry in page if matches(urls.shown(entry.url)))


def _braces(store: Store, url: str, shown: str) -> Iterator[Found]:
    """Yield the files of each expanded name. A name that does not exist is yielded too, and becomes a reject."""
    expanded = expand_braces(url)
    plain = [name for name in expanded if not has_glob(name)]
    with ThreadPoolExecutor(_THREADS) as threads:
        known = dict(zip(plain, threads.map(store.info, plain), strict=True))
    if plain == expanded and not any(known.values()):
        raise InputError(f"{shown} does not exist: none of its {len(plain):,} names, from {urls.shown(plain[0])} on")
    for name in expanded:
        yield from _one(store, known[name] or Entry(name, None)) if name in known else _glob(store, name)


@dataclass
class Census:
    """Counts of the files found, by family and suffix. Holds those that are units, never the images."""

    config: InputConfig
    counts: Counter[tuple[Family, str]] = field(default_factory=Counter)
    units: dict[Family, list[Entry]] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    """URLs of the lists that Hugging Face's image folders have, `metadata.csv`, which name their images."""

    def images(self, selection: Selection) -> Iterator[Entry]:
        """Yield the files that may be images; count every file and keep those that are units."""
        for found in selection.files:
            family, suffix = self._sort(found, selection.name(found.entry.url))
            self.counts[family, suffix] += 1
            if urls.name(found.entry.url) in _METADATA_NAMES:
                self.metadata.append(found.entry.url)
            if family in ("image", "plain"):
                yield found.entry
            elif family in ("tar", "parquet") or (family == "list" and self._takes_lists(found)):
                self.units.setdefault(family, []).append(found.entry)

    def _takes_lists(self, found: Found) -> bool:
        return found.is_named or self.config.input_format == "list"

    def _sort(self, found: Found, name: str) -> tuple[Family, str]:
        url = found.entry.url
        suffix = urls.suffix(url)
        if url.endswith("/"):
            return "folder marker", suffix
        if not found.is_named and is_hidden(name, suffix):
            return "hidden", suffix
        forced = _FORCED.get(self.config.input_format)
        if forced == "image" or (forced and found.is_named and _by_suffix(suffix) not in ("parquet", "list")):
            return forced, suffix
        family = _by_suffix(suffix)
        if family == "plain" and not found.is_named and is_text_name(name.rpartition("/")[2]):
            family = "other"
        return (_named_family(url, suffix) if family == "other" and found.is_named else family), suffix

    @property
    def kind(self) -> InputKind | None:
        """The kind of the input; None where it has no file of the kind that was asked for."""
        num = {family: self._num(family) for family in _KIND_OF}
        num["list"] = len(self.units.get("list", ()))
        forced = _FORCED.get(self.config.input_format)
        if forced == "list" and not num["list"]:
            forced = "parquet"
        if forced:
            return _KIND_OF[forced] if num[forced] else None
        best = max(num, key=lambda family: num[family])  # on a tie: images, then tars, then tables
        return _KIND_OF[best] if num[best] else ("files" if self._num("plain") else None)

    def entries(self, kind: InputKind) -> list[Entry]:
        """Return the files that are the units of an input of this kind."""
        return next(self.units[family] for family, own in _KIND_OF.items() if own == kind)

    def _num(self, family: Family) -> int:
        return sum(count for (found, _), count in self.counts.items() if found == family)

    def skipped(self, kind: InputKind | None) -> dict[str, int]:
        """Return how many files an input of this kind leaves out, by suffix or reason, most frequent first."""
        taken = {"files": ("image", "plain"), "webdataset": ("tar",), "parquet": ("parquet",), "list": ("list",)}
        counts: Counter[str] = Counter()
        for (family, suffix), count in self.counts.items():
            if kind is None or family not in taken[kind]:
                label = family if family in ("hidden", "folder marker") else suffix or "without a suffix"
                counts[label] += count
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe(skipped: Iterable[tuple[str, int]]) -> str:
    """Return counts as a text: `.json x12, hidden x2`."""
    return ", ".join(f"{label} x{count:,}" for label, count in skipped)


def is_hidden(below: str, suffix: str) -> bool:
    """Return whether a folder's file of this name below it is left out: hidden, a marker, or left behind."""
    parts = below.split("/")
    is_marker = parts[-1].startswith("_") and not suffix
    is_left_behind = any(part.startswith("_") and "=" not in part for part in parts[:-1])  # `_temporary`, `_delta_log`
    return is_marker or is_left_behind or any(part.startswith(".") for part in parts)


def _named_family(url: str, suffix: str) -> Family:
    """Return what a named file with another suffix is taken for. Raises InputError for what is known to be none."""
    if (remedy := _REMEDIES.get(suffix)) is not None:
        raise InputError(
            f"{urls.shown(url)} ends in {suffix}; expected an image, a .tar, a .parquet or a list of URIs (.txt, .csv,"
            f" .jsonl): {remedy}. To decode it all the same, pass --input-format files"
        )
    return "list" if suffix in _NAMED_LIST_SUFFIXES else "image"


def _by_suffix(suffix: str) -> Family:
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in TAR_SUFFIXES:
        return "tar"
    if suffix in _PARQUET_SUFFIXES:
        return "parquet"
    return "list" if suffix in _LIST_SUFFIXES else ("other" if suffix else "plain")
