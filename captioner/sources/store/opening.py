"""Which store a URL lies in."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import fsspec

from captioner.errors import InputError
from captioner.sources import urls
from captioner.sources.store.fsspec_store import Store
from captioner.sources.store.http import HttpStore
from captioner.sources.store.local import LocalStore
from captioner.sources.store.s3 import S3Store

__all__ = ["open_store"]

_PACKAGES = {"gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "s3": "s3fs", "hf": "huggingface_hub"}
_EXTRAS = {"gcsfs": "captioner[gcs]", "adlfs": "captioner[azure]"}


def open_store(url: str, storage_options: Mapping[str, Any] | None = None) -> "Store":
    """Return the store that `url` lies in. Connects to nothing yet; raises InputError when its package is missing."""
    scheme = urls.scheme(url)
    if urls.holds_login(url) and scheme not in ("http", "https", "file"):
        raise InputError(
            f"{urls.redact(url)} holds credentials; pass them with --storage-options, or by the environment"
        )
    _check_scheme(scheme)
    kinds = {"file": LocalStore, "s3": S3Store, "http": HttpStore, "https": HttpStore}
    return kinds.get(scheme, Store)(url, storage_options or {})


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
