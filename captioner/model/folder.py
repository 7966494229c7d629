"""A folder of model files on any fsspec store, and how a user's name for a model is resolved to one.

Knows paths and bytes, not what is in them. Folders of a store are read in place for a description and copied to the
local cache once for loading (`captioner.storage.folder_copy`); hub ids go through `captioner.model.hub`.
"""

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
from captioner.model import hub
from captioner.storage import redact, urls
from captioner.storage.folder_copy import copy_folder
from captioner.storage.http_store import guarded
from captioner.storage.json_text import parse_json

__all__ = ["Folder", "StorageOptions", "check_server", "open_folder", "options_for", "reference"]

StorageOptions = dict[str, object] | None

_COPY_BYTES = 8 << 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Folder:
    """One folder: its store, its path there, and the name that messages give it, which holds no credentials."""

    fs: AbstractFileSystem
    path: str
    name: str

    @classmethod
    def local(cls, path: Path, name: str | None = None) -> Self:
        """Return a local folder."""
        return cls(fsspec.filesystem("file"), str(path), name or str(path))

    @property
    def is_local(self) -> bool:
        """Whether `path` is a local path."""
        return isinstance(self.fs.protocol, tuple) and "file" in self.fs.protocol

    def child(self, name: str) -> "Folder":
        """Return the folder `name` inside this one, whether or not it exists."""
        return Folder(self.fs, f"{self.path.rstrip('/')}/{name}", f"{self.name.rstrip('/')}/{name}")

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name is inside."""
        return bool(self.fs.exists(f"{self.path}/{name}"))

    def is_empty(self) -> bool:
        """Whether it has no files, or does not exist."""
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
            value = parse_json(text)
        except ValueError as error:
            raise BundleError(f"{self.name}/{name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BundleError(f"{self.name}/{name} holds a {type(value).__name__}; expected a JSON object")
        return value

    def read_json_if_any(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file, or an empty one if there is no such file."""
        return self.read_json(name) if self.has(name) else {}

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""
        if not self.is_local:
            self.fs.pipe_file(f"{self.path}/{name}", content)  # one object, visible once it is complete
            return
        arriving = Path(self.path, f"{name}.arriving")
        arriving.write_bytes(content)
        arriving.replace(Path(self.path, name))

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self.has(name):
            self.fs.rm_file(f"{self.path}/{name}")

    def copy_to(self, target: "Folder", patterns: list[str]) -> None:
        """Copy the files directly inside whose name matches a pattern to another folder, on any store."""
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
        return Folder.local(copy_folder(self.fs, self.path, self.name, hub.MODEL_FILES), self.name)

    def _unreadable(self, name: str, error: OSError) -> BundleError:
        if isinstance(error, FileNotFoundError):
            return BundleError(f"{self.name} has no file {name}")
        return BundleError(f"cannot read {self.name}/{name}: {type(error).__name__}: {redact(str(error))}")


def open_folder(location: str, storage_options: StorageOptions = None, *, inside: Folder | None = None) -> Folder:
    """Return the folder that `location` names.

    A URL (`s3://bucket/bundle`), a path inside the folder `inside`, a local path, or a hub id `org/name[@revision]`, in
    this order. Raises BundleError if none of these is there.
    """
    if "://" in location:
        _check_no_login(location)
        home = inside.name if inside is not None and not inside.is_local else location
        return _open_url(location, storage_options, home)
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


def options_for(part: str, storage_options: StorageOptions, model: str) -> StorageOptions:
    """Return the storage options for a part of a bundle: the bundle's if both are on the same server.

    Options given with a local bundle, which needs none itself, are meant for its parts."""
    return storage_options if urls.server(model) in (urls.server(part), urls.server("/")) else None


def check_server(part: str, bundle: Folder) -> None:
    """Raise BundleError for a part at a URL on another server than the bundle, whose author has chosen it."""
    if "://" in part and urls.server(part) != urls.server(bundle.name):
        raise BundleError(
            f"{bundle.name}/bundle.json names {redact(part)}, which is on another server; expected a folder inside, a"
            " local path, a hub name or a URL on the same server. If you trust the bundle, pass --allow-remote-parts"
        )


def reference(location: str, bundle: Folder) -> str:
    """Return the reference to a part for bundle.json: as given, but a local path made absolute."""
    if redact(location) != location:
        raise BundleError(
            f"{redact(location)} holds credentials, which bundle.json would keep; expected a location without them, or"
            " --carry-models"
        )
    if "://" in location or bundle.has(location) or not Path(location).expanduser().is_dir():
        return location
    return str(Path(location).expanduser().resolve())


def _check_no_login(url: str) -> None:
    if urls.holds_login(url):
        raise BundleError(f"{redact(url)} holds credentials; pass them with --model-storage-options")


def _open_url(url: str, storage_options: StorageOptions, home: str) -> Folder:
    """Return the folder at a URL. home: a web server that may have an inner address."""
    shown = redact(url.rstrip("/"))
    try:
        fs, path = url_to_fs(url, **guarded(url, storage_options or {}, home))
    except (ImportError, ValueError) as error:
        raise BundleError(f"cannot open {shown}: {redact(str(error))}") from error
    try:
        found = fs.exists(path)
    except Exception as error:  # each store has its own exceptions: botocore's are not even OSErrors
        raise BundleError(f"cannot read {shown}: {type(error).__name__}: {redact(str(error))}") from error
    if not found:
        raise BundleError(f"no model at {shown}: there is nothing under this name")
    return Folder(fs, path.rstrip("/"), shown)
