"""A place in a store, safe to show: its text form holds no credentials, and the full URL needs a word to get at.

    output = Location("s3://bucket/table", storage_options)
    run_file = output / "_run" / "run.json"
    open_store(output).read_bytes(run_file)
    raise OutputError(f"{run_file} is damaged")

Opens nothing. The URIs of images stay strings, for there are millions of them: `urls` works on those.
"""

from collections.abc import Mapping
from typing import Any, final

from captioner.storage import urls

__all__ = ["Location", "Place", "as_location", "full_url"]


@final
class Location:
    """Where something lies, and the storage options that open its store.

    Immutable. Two are equal when their URLs are, however each is opened. Not a dataclass: `asdict` would print it.
    """

    __slots__ = ("_storage_options", "_url")

    _url: str
    _storage_options: dict[str, Any]

    def __init__(self, path: str, storage_options: Mapping[str, Any] | None = None) -> None:
        """Take a path or URL as a user writes it. Relative and `~` paths are made absolute here, once."""
        _fill(self, urls.absolute(path), storage_options or {})

    @property
    def url_with_secrets(self) -> str:
        """The full URL. For stores and for what a format stores; never for a log, an error or a page."""
        return self._url

    @property
    def storage_options(self) -> dict[str, Any]:
        """A copy of what opens its store. May hold credentials."""
        return dict(self._storage_options)

    @property
    def scheme(self) -> str:
        """The kind of store, in lower case and by its usual name; `file` for a local path."""
        return urls.scheme(self._url)

    @property
    def is_local(self) -> bool:
        """Whether it is a path on this machine."""
        return self.scheme == "file"

    @property
    def local_path(self) -> str:
        """The path of a local location."""
        assert self.is_local, f"{self} has no local path"
        return urls.local_path(self._url)

    @property
    def name(self) -> str:
        """The last component, safe to show."""
        return urls.name(str(self))

    @property
    def suffix(self) -> str:
        """The ending that says what a file is, in lower case; empty where it has none."""
        return urls.suffix(self._url)

    @property
    def parent(self) -> "Location":
        """The folder that holds it. The root of a store is its own parent."""
        above = urls.parent(self._url)
        return self if above.endswith((":/", "://")) else _location(above or "/", self._storage_options)

    @property
    def folder(self) -> "Location":
        """The same place without a slash at its end."""
        return _location(self._url.rstrip("/") or "/", self._storage_options)

    def __truediv__(self, name: str) -> "Location":
        """Return the location of `name`, which is taken literally, in this folder."""
        return _location(urls.join(self._url, name), self._storage_options)

    def beside(self, path: str) -> "Location":
        """Return another location that the user named; it gets these storage options on the same server alone."""
        return Location(path, urls.shared_options(path, self._url, self._storage_options))

    def opened_with(self, storage_options: Mapping[str, Any]) -> "Location":
        """Return the same place with other storage options."""
        return _location(self._url, storage_options)

    def __str__(self) -> str:
        return urls.printable(urls.shown(self._url))

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __reduce__(self) -> tuple[Any, ...]:
        return _location, (self._url, self._storage_options)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Location cannot be changed: {name}")


Place = str | Location
"""A location, or a path or URL without storage options of its own: one of millions of images, or a local folder."""


def as_location(place: Place) -> Location:
    """Return the location of a place."""
    return place if isinstance(place, Location) else Location(place)


def full_url(place: Place) -> str:
    """Return the URL of a place, with whatever secrets it has."""
    return place.url_with_secrets if isinstance(place, Location) else place


def _location(url: str, storage_options: Mapping[str, Any]) -> Location:
    """Return the location of an absolute URL, taken literally."""
    made = object.__new__(Location)
    _fill(made, url, storage_options)
    return made


def _fill(location: Location, url: str, storage_options: Mapping[str, Any]) -> None:
    object.__setattr__(location, "_url", url)
    object.__setattr__(location, "_storage_options", dict(storage_options))
