"""What a user's INPUT stands for: the files it selects, page by page, and what kind of input they make together.

A folder or prefix is listed whole. Left out, and counted: hidden files (a component that starts with a dot, all below
`__MACOSX` and a caption table's `_run`, `_SUCCESS` and its like), folder markers, and files whose suffix is not an
image's. A folder is what most of its files are: images, tar shards or Parquet; files without a suffix count as images.
A file that the user names, or matches by a glob with a suffix, is always taken. A path that exists is taken literally
before braces and wildcards are.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from captioner.config import InputConfig
from captioner.errors import InputError
from captioner.sources import urls
from captioner.sources.store import Entry, Store, open_store
from captioner.sources.units import InputKind

__all__ = ["Census", "Found", "Selection", "describe", "select"]

Family = Literal["image", "plain", "tar", "parquet", "list", "other", "hidden", "folder marker"]

_THREADS = 32
_PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
_LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv"})
_FORCED: dict[str, Family] = {"files": "image", "webdataset": "tar", "parquet": "parquet", "list": "list"}
_KIND_OF: dict[Family, InputKind] = {"image": "files", "tar": "webdataset", "parquet": "parquet", "list": "list"}


class Found(NamedTuple):
    """One selected file; `is_named` when the user said which, rather than in which folder."""

    entry: Entry
    is_named: bool


@dataclass(frozen=True)
class Selection:
    """The files that INPUT selects. `root` is the folder below which they are named in an image_id."""

    store: Store
    shown: str
    root: str
    files: Iterator[Found]

    def name(self, url: str) -> str:
        """Return what people call a selected file."""
        return urls.shown(url).removeprefix(self._shown_root)

    @functools.cached_property
    def _shown_root(self) -> str:
        return urls.shown(self.root)


def select(input_path: str, config: InputConfig) -> Selection:
    """Return what `input_path` selects. Raises InputError when there is no such path, and StoreError."""
    url = urls.absolute(input_path)
    shown = urls.shown(url)
    if "***@" in shown and "***@" not in url:
        raise InputError(f"{shown} holds credentials; pass them with --storage-options, they would be written down")
    store = open_store(url, config.storage_options)
    if (entry := store.info(url)) is not None:
        root = entry.url if entry.url.endswith("/") else urls.parent(entry.url) + "/"
        return Selection(store, shown, root, _one(store, entry))
    if urls.has_braces(url):
        root = urls.parent(re.split(r"[{*?\[]", url)[0] + ".") + "/"
        return Selection(store, shown, root, _braces(store, url, shown))
    if urls.has_glob(url):
        return Selection(store, shown, urls.parent(urls.glob_prefix(url) + ".") + "/", _glob(store, url))
    raise InputError(f"{shown} does not exist; expected a file, a folder or prefix, a glob or braces as {{0000..0099}}")


def _one(store: Store, entry: Entry) -> Iterator[Found]:
    if not entry.is_folder:
        yield Found(entry, is_named=True)
        return
    for page in store.pages(entry.url):
        yield from (Found(found, is_named=False) for found in page)


def _glob(store: Store, pattern: str) -> Iterator[Found]:
    matches = urls.glob_pattern(pattern).match
    is_named = not pattern.endswith("*")
    for page in store.pages(urls.glob_prefix(pattern)):
        yield from (Found(entry, is_named) for entry in page if matches(urls.shown(entry.url)))


def _braces(store: Store, url: str, shown: str) -> Iterator[Found]:
    """Yield what each expanded name stands for; one that is not there is yielded too, and will be a reject."""
    expanded = urls.expand_braces(url)
    plain = [name for name in expanded if not urls.has_glob(name)]
    with ThreadPoolExecutor(_THREADS) as threads:
        known = dict(zip(plain, threads.map(store.info, plain), strict=True))
    if plain == expanded and not any(known.values()):
        raise InputError(f"{shown} does not exist: none of its {len(plain):,} names, from {urls.shown(plain[0])} on")
    for name in expanded:
        yield from _one(store, known[name] or Entry(name, None)) if name in known else _glob(store, name)


@dataclass
class Census:
    """What was found, by family and suffix; holds the few that are units themselves, never the images."""

    config: InputConfig
    counts: Counter[tuple[Family, str]] = field(default_factory=Counter)
    units: dict[Family, list[Entry]] = field(default_factory=dict)

    def images(self, selection: Selection) -> Iterator[Entry]:
        """Yield the files that may be images, having counted every file and kept those that are units."""
        for found in selection.files:
            family, suffix = self._sort(found, selection.name(found.entry.url))
            self.counts[family, suffix] += 1
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
        if not found.is_named and _is_hidden(name, suffix):
            return "hidden", suffix
        forced = _FORCED.get(self.config.input_format)
        if forced == "image" or (forced and found.is_named and _by_suffix(suffix) not in ("parquet", "list")):
            return forced, suffix
        family = _by_suffix(suffix)
        return ("image" if family == "other" and found.is_named else family), suffix

    @property
    def kind(self) -> InputKind | None:
        """What the input is, or None where it has nothing of its kind."""
        num = {family: self._num(family) for family in _KIND_OF}
        num["list"] = len(self.units.get("list", ()))
        forced = _FORCED.get(self.config.input_format)
        if forced == "list" and not num["list"]:
            forced = "parquet"
        if forced:
            return _KIND_OF[forced] if num[forced] else None
        best = max(num, key=lambda family: num[family])  # the first of equals: images, then tars, then tables
        return _KIND_OF[best] if num[best] else ("files" if self._num("plain") else None)

    def entries(self, kind: InputKind) -> list[Entry]:
        """Return the files that are the units of an input of this kind."""
        return next(self.units[family] for family, own in _KIND_OF.items() if own == kind)

    def _num(self, family: Family) -> int:
        return sum(count for (found, _), count in self.counts.items() if found == family)

    def skipped(self, kind: InputKind | None) -> dict[str, int]:
        """Return what an input of this kind leaves out, by suffix or by the reason, most frequent first."""
        taken = {"files": ("image", "plain"), "webdataset": ("tar",), "parquet": ("parquet",), "list": ("list",)}
        counts: Counter[str] = Counter()
        for (family, suffix), count in self.counts.items():
            if kind is None or family not in taken[kind]:
                label = family if family in ("hidden", "folder marker") else suffix or "without a suffix"
                counts[label] += count
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe(skipped: Iterable[tuple[str, int]]) -> str:
    """Return counts as people read them: `.json x12, hidden x2`."""
    return ", ".join(f"{label} x{count:,}" for label, count in skipped)


def _is_hidden(below: str, suffix: str) -> bool:
    parts = below.split("/")
    is_marker = parts[-1].startswith("_") and not suffix
    is_ours = "_run" in parts[:-1]  # of a caption table that was written into this folder
    return is_marker or is_ours or "__MACOSX" in parts or any(part.startswith(".") for part in parts)


def _by_suffix(suffix: str) -> Family:
    if suffix in urls.IMAGE_SUFFIXES:
        return "image"
    if suffix in urls.TAR_SUFFIXES:
        return "tar"
    if suffix in _PARQUET_SUFFIXES:
        return "parquet"
    return "list" if suffix in _LIST_SUFFIXES else ("other" if suffix else "plain")
