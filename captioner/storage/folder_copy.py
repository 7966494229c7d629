"""A local copy of a folder that lies on a store, made once a machine.

The copy is keyed by the URL and by what the store says of each file (size, etag, time): a folder that changed gets
another copy. A copy that was interrupted continues at the byte where it stopped.
"""

import hashlib
import logging
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from captioner.errors import BundleError
from captioner.storage import urls
from captioner.storage.local_cache import MONTH_S, make_once

__all__ = ["copy_folder"]

_RANGE_BYTES = 32 << 20
_NUM_RANGES = 8  # fetched at the same time, and held: 256 MiB
_KEEP_S = 3 * MONTH_S
_LOG = logging.getLogger(__name__)
_VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "crc32c",
    "content_md5",
    "mtime",
    "LastModified",
    "last_modified",
    "created",
)

Info = dict[str, Any]
"""What fsspec says of a file."""


def copy_folder(
    fs: AbstractFileSystem,
    path: str,
    name: str,
    patterns: Sequence[str],
    *,
    range_bytes: int = _RANGE_BYTES,
    num_ranges: int = _NUM_RANGES,
) -> Path:
    """Return a local folder with the files of `path` that match a pattern, copied unless an equal copy is there.

    name: what messages call the folder. Raises BundleError if no file matches, the store does not deliver one, or one's
    name leads out of the folder.
    """
    files = _matching_files(fs, path, patterns)
    if leaving := [file for file in files if not urls.is_inside(file)]:
        raise BundleError(
            f"{name} lists the file {leaving[0]!r}, which as a path leaves the folder; expected files inside it:"
            " remove it from the store, or use a model that you trust"
        )
    if not files:
        raise BundleError(f"{name} holds no model files ({', '.join(patterns)})")

    def copy(partial: Path) -> None:
        num_bytes = sum(info.get("size") or 0 for info in files.values())
        _LOG.info("event=model_copy from=%s to=%s files=%d bytes=%d", name, partial, len(files), num_bytes)
        for file, info in files.items():
            _copy(fs, f"{path}/{file}", info.get("size"), partial / file, f"{name}/{file}", range_bytes, num_ranges)

    return make_once("models", _key(name, files), copy, keep_s=_KEEP_S)


def _matching_files(fs: AbstractFileSystem, path: str, patterns: Sequence[str]) -> dict[str, Info]:
    """Return what the store says of each matching file, by its name in the folder as the store has it."""
    found = fs.find(path, detail=True)
    root = fs._strip_protocol(path).rstrip("/") + "/"
    relative = {file.removeprefix(root): info for file, info in found.items() if file.startswith(root)}
    return {
        file: info for file, info in sorted(relative.items()) if any(fnmatch(file, pattern) for pattern in patterns)
    }


def _key(name: str, files: dict[str, Info]) -> str:
    listing = [
        (file, info.get("size"), *(str(info[key]) for key in _VERSION_KEYS if key in info))
        for file, info in files.items()
    ]
    digest = hashlib.sha256(repr((name, listing)).encode()).hexdigest()
    return f"{name.rstrip('/').rpartition('/')[2]}-{digest[:16]}"


def _copy(
    fs: AbstractFileSystem, path: str, size: int | None, target: Path, name: str, range_bytes: int, num_ranges: int
) -> None:
    """Make `target` the file at `path`, unless an earlier attempt did."""
    if target.exists() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    arriving = target.with_name(target.name + ".arriving")
    try:
        _fetch(fs, path, size, arriving, range_bytes, num_ranges)
    except OSError as error:
        raise BundleError(f"cannot copy {name} to {target}: {error}") from error
    arrived = arriving.stat().st_size
    if size not in (None, arrived):
        arriving.unlink()
        raise BundleError(f"{name} arrived with {arrived} bytes; expected {size}")
    arriving.rename(target)


def _fetch(
    fs: AbstractFileSystem, path: str, size: int | None, arriving: Path, range_bytes: int, num_ranges: int
) -> None:
    """Complete a file from where an earlier attempt stopped; several ranges at once, as one stream is slow on S3."""
    if size is None:
        fs.get_file(path, str(arriving))
        return
    with arriving.open("ab") as file:
        while (start := file.tell()) < size:
            starts = list(range(start, size, range_bytes))[:num_ranges]
            ends = [min(start + range_bytes, size) for start in starts]
            blocks = fs.cat_ranges([path] * len(starts), starts, ends, on_error="raise")
            file.writelines(blocks)
            if file.tell() != ends[-1]:  # a short answer: what comes after it would stand in the wrong place
                return
