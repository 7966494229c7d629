"""A folder of model files on any fsspec store, and how a name that a user wrote becomes one.

Knows paths and bytes, not what is in them. Folders of a store are read in place for a description and copied to the
local cache once for loading (`captioner.model.mirror`); hub ids go through `captioner.model.hub`.
"""

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfileobj
from typing import Any, Self

import fsspec
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from captioner.errors import BundleError
from captioner.model import hub, mirror

__all__ = ["Folder", "StorageOptions", "open_folder"]

StorageOptions = dict[str, object] | None

_COPY_BYTES = 8 << 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Folder:
    """One folder: the store it is on, its path there, and the name that people know it by."""

    fs: AbstractFileSystem
    path: str
    name: str

    @classmethod
    def local(cls, path: Path, name: str | None = None) -> Self:
        """Return a folder of this machine."""
        return cls(fsspec.filesystem("file"), str(path), name or str(path))

    @property
    def is_local(self) -> bool:
        """Whether `path` is a path of this machine."""
        return isinstance(self.fs.protocol, tuple) and "file" in self.fs.protocol

    def child(self, name: str) -> "Folder":
        """Return the folder `name` inside this one, whether or not it exists."""
        return Folder(self.fs, f"{self.path.rstrip('/')}/{name}", f"{self.name.rstrip('/')}/{name}")

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name is inside."""
        return bool(self.fs.exists(f"{self.path}/{name}"))

    def is_empty(self) -> bool:
        """Whether nothing at all is inside, or there is no such folder."""
        return not self.fs.exists(self.path) or not self.fs.find(self.path, maxdepth=2)

    def size_bytes(self, name: str) -> int:
        """Return the size of a file. Raises BundleError if there is none."""
        try:
            return int(self.fs.size(f"{self.path}/{name}"))
        except OSError as error:
            raise self._unreadable(name, error) from error

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return a file's bytes from `start` up to `end`. Raises BundleError if there is no such file."""
        try:
            return bytes(self.fs.cat_file(f"{self.path}/{name}", start=start, end=end))
        except OSError as error:
            raise self._unreadable(name, error) from error

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file. Raises BundleError if it is missing or is not a JSON object."""
        text = self.read(name)
        try:
            value = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{self.name}/{name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BundleError(f"{self.name}/{name} holds a {type(value).__name__}; expected a JSON object")
        return value

    def read_json_if_any(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file, or an empty one if there is no such file."""
        return self.read_json(name) if self.has(name) else {}

    def write(self, name: str, content: bytes) -> None:
        """Put a file here, whole or not at all."""
        if not self.is_local:
            self.fs.pipe_file(f"{self.path}/{name}", content)  # one object, visible once it is complete
            return
        arriving = Path(self.path, f"{name}.arriving")
        arriving.write_bytes(content)
        arriving.replace(Path(self.path, name))

    def remove(self, name: str) -> None:
        """Leave no file of this name."""
        if self.has(name):
            self.fs.rm_file(f"{self.path}/{name}")

    def copy_to(self, target: "Folder", patterns: list[str]) -> None:
        """Copy the files directly inside whose name fits a pattern to another folder, on any store."""
        target.fs.makedirs(target.path, exist_ok=True)
        for path in self.fs.ls(self.path, detail=False):
            name = path.rpartition("/")[2]
            if any(fnmatch(name, pattern) for pattern in patterns):
                with self.fs.open(path, "rb") as source, target.fs.open(f"{target.path}/{name}", "wb") as copy:
                    copyfileobj(source, copy, _COPY_BYTES)

    def on_disk(self) -> "Folder":
        """Return this folder as a local one, downloaded to the cache if it is on a store."""
        if self.is_local:
            return self
        if hub.is_hub(self.fs):
            return Folder.local(hub.download(self.path, self.name), self.name)
        return Folder.local(mirror.mirror(self.fs, self.path, self.name), self.name)

    def _unreadable(self, name: str, error: OSError) -> BundleError:
        if isinstance(error, FileNotFoundError):
            return BundleError(f"{self.name} has no file {name}")
        return BundleError(f"cannot read {self.name}/{name}: {type(error).__name__}: {error}")


def open_folder(location: str, storage_options: StorageOptions = None, *, inside: Folder | None = None) -> Folder:
    """Return the folder that `location` names.

    A URL (`s3://bucket/bundle`), a path inside the folder `inside`, a local path, or a hub id `org/name[@revision]`, in
    this order. Raises BundleError if none of these is there.
    """
    if "://" in location:
        _check_no_login(location)
        return _open_url(location, storage_options)
    if inside is not None and not Path(location).is_absolute() and inside.has(location):
        return inside.child(location)
    path = Path(location).expanduser()
    if path.is_dir():
        return Folder.local(path.resolve(), location)
    if path.exists():
        raise BundleError(f"{location} is a file; expected the folder that holds the model")
    if _HUB_ID.fullmatch(location) and not location.startswith("."):
        fs, snapshot = hub.find(location)
        return Folder(fs, snapshot, location)
    looked_in = f"{inside.name}, " if inside is not None else ""
    raise BundleError(
        f"no model at {location!r} (looked in: {looked_in}{path.absolute()}); expected `demo`, a folder, a URL as "
        "s3://bucket/folder, or a hub id as org/name"
    )


def _check_no_login(url: str) -> None:
    if login := re.search(r"://([^/@\s]*:[^/@\s]*)@", url):
        raise BundleError(f"{url.replace(login.group(1), '***')} holds credentials; pass them with --storage-options")


def _open_url(url: str, storage_options: StorageOptions) -> Folder:
    try:
        fs, path = url_to_fs(url, **(storage_options or {}))
    except (ImportError, ValueError) as error:
        raise BundleError(f"cannot open {url}: {error}") from error
    try:
        found = fs.exists(path)
    except Exception as error:  # each store has its own exceptions: botocore's are not even OSErrors
        raise BundleError(f"cannot read {url}: {type(error).__name__}: {error}") from error
    if not found:
        raise BundleError(f"no model at {url}: there is nothing under this name")
    return Folder(fs, path.rstrip("/"), url.rstrip("/"))
