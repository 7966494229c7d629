"""Local copies of model folders that lie on a store: made once a machine, whole or not at all.

The copy is keyed by the URL and by what the store says of each file (size, etag, time), so a changed folder is a new
copy. One process copies while others wait on a lock; a copy that was cut goes on where it stopped.
"""

import hashlib
import logging
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock
from fsspec import AbstractFileSystem

from captioner.errors import BundleError
from captioner.model.hub import MODEL_FILES

__all__ = ["cache_folder", "mirror"]

_RANGE_BYTES = 32 << 20
_RANGES = 8  # fetched at the same time, and held: 256 MiB
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


def cache_folder() -> Path:
    """Return where copies are kept: `CAPTIONER_CACHE`, or `captioner` in the user's cache folder."""
    configured = os.environ.get("CAPTIONER_CACHE")
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(configured) if configured else Path(user_cache) / "captioner"


def mirror(fs: AbstractFileSystem, path: str, name: str) -> Path:
    """Return a local folder with the model files of `path`, copied unless an equal copy is there.

    Raises BundleError if the folder has no files or the store does not deliver one.
    """
    files = _model_files(fs, path)
    if not files:
        raise BundleError(f"{name} holds no model files ({', '.join(MODEL_FILES)})")
    target = cache_folder() / "models" / _key(name, files)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                _copy(fs, path, files, Path(f"{target}.partial"), name)
                Path(f"{target}.partial").rename(target)
    return target


def _model_files(fs: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """Return what the store says of each model file, by its path relative to the folder."""
    found = fs.find(path, detail=True)
    root = fs._strip_protocol(path).rstrip("/") + "/"
    relative = {file.removeprefix(root): info for file, info in found.items()}
    return {
        file: info
        for file, info in sorted(relative.items())
        if any(fnmatch(file, pattern) for pattern in MODEL_FILES) and ".." not in Path(file).parts
    }


def _key(name: str, files: dict[str, dict[str, Any]]) -> str:
    listing = [
        (file, info.get("size"), *(str(info[key]) for key in _VERSION_KEYS if key in info))
        for file, info in files.items()
    ]
    digest = hashlib.sha256(repr((name, listing)).encode()).hexdigest()
    return f"{name.rstrip('/').rpartition('/')[2]}-{digest[:16]}"


def _copy(fs: AbstractFileSystem, path: str, files: dict[str, dict[str, Any]], partial: Path, name: str) -> None:
    size_bytes = sum(info.get("size") or 0 for info in files.values())
    _LOG.info("event=model_copy from=%s to=%s files=%d bytes=%d", name, partial, len(files), size_bytes)
    for file, info in files.items():
        target = partial / file
        if target.exists() and target.stat().st_size == info.get("size"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        arriving = target.with_name(target.name + ".arriving")
        try:
            _fetch(fs, f"{path}/{file}", info.get("size"), arriving)
        except OSError as error:
            raise BundleError(f"cannot copy {name}/{file} to {partial}: {error}") from error
        arrived = arriving.stat().st_size
        if info.get("size") not in (None, arrived):
            arriving.unlink()
            raise BundleError(f"{name}/{file} arrived with {arrived} bytes; expected {info['size']}")
        arriving.rename(target)


def _fetch(fs: AbstractFileSystem, path: str, size: int | None, arriving: Path) -> None:
    """Complete a file, from where an earlier attempt stopped; several ranges at once, as one stream is slow on S3."""
    if size is None:
        fs.get_file(path, str(arriving))
        return
    with arriving.open("ab") as file:
        while (start := file.tell()) < size:
            starts = list(range(start, size, _RANGE_BYTES))[:_RANGES]
            ends = [min(start + _RANGE_BYTES, size) for start in starts]
            blocks = fs.cat_ranges([path] * len(starts), starts, ends, on_error="raise")
            file.writelines(blocks)
            if file.tell() != ends[-1]:  # a short answer: what comes after it would stand in the wrong place
                return
