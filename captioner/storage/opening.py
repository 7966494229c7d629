"""Which store a place lies in."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import fsspec

from captioner.errors import InputError
from captioner.storage import urls
from captioner.storage.fsspec_store import Store
from captioner.storage.http_store import HttpStore
from captioner.storage.local_store import LocalStore
from captioner.storage.location import Location, Place, full_url
from captioner.storage.s3_store import S3Store

__all__ = ["open_store"]

_PACKAGES = {"gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "s3": "s3fs", "hf": "huggingface_hub"}
_EXTRAS = {"gcsfs": ".[gcs]", "adlfs": ".[azure]"}


def open_store(place: Place, storage_options: Mapping[str, Any] | None = None) -> Store:
    """Return the store in which a place lies. Connects to nothing yet; raises InputError when its package is missing.

    storage_options: of a place that is a URL; a Location brings its own.
    """
    location = place if isinstance(place, Location) else Location(place, storage_options)
    scheme = location.scheme
    if urls.is_wrapped(full_url(location)):
        raise InputError(
            f"{location} is a store around a store; expected the URL of the inner one, which needs no cache"
        )
    if urls.holds_login(full_url(location)) and scheme not in ("http", "https", "file"):
        raise InputError(f"{location} holds credentials; pass them with --storage-options, or by the environment")
    _check_scheme(scheme)
    kinds = {"file": LocalStore, "s3": S3Store, "http": HttpStore, "https": HttpStore}
    return kinds.get(scheme, Store)(location)


def _check_scheme(scheme: str) -> None:
    package = _PACKAGES.get(scheme)
    remedy = f"pip install '{_EXTRAS.get(package or '', package)}'"
    if package and importlib.util.find_spec(package) is None:
        raise InputError(f"{scheme}:// needs the package {package}: {remedy}")
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{scheme}:// cannot be opened: {error}; expected a local path or one of s3, gs, az, http, https"
        ) from error
