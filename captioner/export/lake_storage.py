"""Places and storage options as the libraries of a lake call them. Knows names alone, and opens nothing."""

from collections.abc import Mapping
from typing import Any

from captioner.storage import Location

__all__ = ["s3_options", "uri_of"]


def uri_of(place: Location) -> str:
    """Return the plain path of a local place, and the URL of another one."""
    return place.local_path if place.is_local else place.url_with_secrets.rstrip("/")


def s3_options(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return those of fsspec's options of S3 that are given, under other names.

    names: `key`, `secret`, `token`, `endpoint_url` and `region_name` -> the library's name. What the environment says
    the library reads itself."""
    client = options.get("client_kwargs") or {}
    given = {
        **{name: options.get(name) for name in ("key", "secret", "token")},
        "endpoint_url": options.get("endpoint_url") or client.get("endpoint_url"),
        "region_name": client.get("region_name"),
    }
    return {names[name]: str(value) for name, value in given.items() if value is not None}
