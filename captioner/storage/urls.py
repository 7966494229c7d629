"""URLs as strings: how a user writes them, how they are recorded, how they are shown without credentials.

A URL here is `scheme://...`, or an absolute path for local files. All but http(s) URLs are literal: `%`, `#`, `?` and
spaces in an object's name mean themselves. Knows no store and reads nothing.
"""

import os
import posixpath
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

from captioner.storage.redaction import holds_login, redact

__all__ = [
    "absolute",
    "holds_login",
    "host",
    "is_chained",
    "is_inside",
    "is_wrapped",
    "join",
    "local_path",
    "local_url",
    "name",
    "parent",
    "printable",
    "redact",
    "resolve",
    "scheme",
    "server",
    "shared_options",
    "shown",
    "suffix",
]

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_WRAPPED = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)::[a-zA-Z][a-zA-Z0-9+.:-]*://")
_CHAINED = re.compile(r"::[a-zA-Z][a-zA-Z0-9+.-]*://")
_ALIASES = {"s3a": "s3", "gcs": "gs", "local": "file"}
_BUCKET_SCHEMES = frozenset({"file", "memory", "s3", "gs", "hf", "oss", "oci"})
_AZURE = frozenset({"az", "abfs", "abfss"})
_WEB_PORTS = {"http": 80, "https": 443}
_BYTES_SCHEME = "file+percent://"  # for a local name that is not UTF-8: a table cannot store it
_SUFFIX = re.compile(r"\.(?=[a-z0-9]*[a-z])[a-z0-9]{1,8}\Z")
_HALF_PAIR = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the other surrogates stand for bytes


def scheme(url: str) -> str:
    """Return the scheme in lower case, aliases resolved (`s3a` is `s3`); `file` for a plain path.

    Of a store around a store, `simplecache::http://host/a`, that of the outer one."""
    match = _SCHEME.match(url) or _WRAPPED.match(url)
    found = match.group(1).lower() if match else "file"
    return _ALIASES.get(found, found.removesuffix("+percent") if found.startswith("file") else found)


def is_chained(url: str) -> bool:
    """Return whether a URL names a store in a store, `zip://::http://host/a.zip`; `a::b.jpg` is a name as any other."""
    return _CHAINED.search(url) is not None


def is_wrapped(url: str) -> bool:
    """Return whether a URL names a store around a store without a path of its own, `simplecache::http://host/a`."""
    return _WRAPPED.match(url) is not None


def server(url: str) -> tuple[str, str]:
    """Return whom credentials for a URL are for: the kind of store, and its host where the URL names one.

    An S3 URL names a bucket, and its endpoint is an option: all of S3 is one server."""
    kind, rest = scheme(url), url.partition("://")[2]
    if is_chained(url):
        return kind, url
    if kind in _BUCKET_SCHEMES:
        return kind, ""
    authority = rest.partition("/")[0]
    if kind in _AZURE:
        return "az", authority.rpartition("@")[2].lower() if "@" in authority else ""
    return kind, _host_and_port(url, kind) if kind in _WEB_PORTS else authority.rpartition("@")[2].lower()


def _host_and_port(url: str, kind: str) -> str:
    try:
        return f"{host(url)}:{urlsplit(url).port or _WEB_PORTS[kind]}"
    except ValueError:
        return url


def shared_options(url: str, other: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `other`'s store where `url` is on the same server, and so shares them; else none."""
    return dict(options) if server(url) == server(other) else {}


def absolute(path: str) -> str:
    """Return `path` as a URL that means the same in every process: local paths are absolute, aliases resolved."""
    if scheme(path) == "file":
        return path if path.startswith(_BYTES_SCHEME) else _absolute_local(path)
    return path if is_wrapped(path) else scheme(path) + "://" + path.partition("://")[2]


def _absolute_local(path: str) -> str:
    match = _SCHEME.match(path)
    plain = path[match.end() :] if match else _expanded(path)
    folder_mark = "/" if plain.endswith("/") else ""
    return os.path.abspath(plain).rstrip("/") + folder_mark or "/"  # noqa: PTH100


def _expanded(path: str) -> str:
    if "\0" in path:  # expanduser raises for it
        return path
    return os.path.expanduser(path)  # noqa: PTH111 - paths stay strings here


def local_url(path: str) -> str:
    """Return the URL of a local path: the path itself, or its bytes percent-encoded where they are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return _BYTES_SCHEME + quote(os.fsencode(path))
    return path


def local_path(url: str) -> str:
    """Return the path of a local URL; the inverse of `local_url`. Takes `file://` URLs too."""
    if url.startswith(_BYTES_SCHEME):
        return os.fsdecode(unquote_to_bytes(url.removeprefix(_BYTES_SCHEME)))
    return _absolute_local(url)


def join(folder: str, *names: str) -> str:
    """Return the URL of `names` below a folder."""
    return "/".join([folder.rstrip("/"), *names])


def is_inside(name: str) -> bool:
    """Return whether a name that a store gave stays in its folder, as a path too: relative, no empty part, no dots."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def parent(url: str) -> str:
    """Return the URL of the folder that holds `url`, without a trailing slash."""
    return url.rstrip("/").rpartition("/")[0]


def name(url: str) -> str:
    """Return the last component of a URL."""
    return url.rstrip("/").rpartition("/")[2]


def suffix(url: str) -> str:
    """Return the suffix of a file in lower case; empty where it has none.

    `.tar.gz` is one suffix. An ending that is no file extension (`.2020`, `.jpg?size=large`) does not count.
    """
    base = name(url).lower()
    if base.endswith(".tar.gz"):
        return ".tar.gz"
    match = _SUFFIX.search(base.lstrip("."))
    return match.group() if match else ""


def resolve(uri: str, folder: str) -> str:
    """Return the URL that `uri` means in a list that lies in `folder`."""
    if _SCHEME.match(uri) or is_wrapped(uri) or uri.startswith(("/", "~")):
        return absolute(uri)
    if scheme(folder) == "file":
        return os.path.normpath(os.path.join(local_path(folder), uri))  # noqa: PTH118
    head, mark, tail = folder.partition("://")
    root, _, below = tail.partition("/")
    return f"{head}{mark}{root}/" + posixpath.normpath(f"/{below}/{uri}").lstrip("/")


def printable(text: str) -> str:
    r"""Return `text` with the bytes that are not UTF-8 written as `\xNN`, half a surrogate pair as `\uNNNN`."""
    text = _HALF_PAIR.sub(lambda half: f"\\u{ord(half.group()):04x}", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def shown(url: str) -> str:
    r"""Return a URL as it is shown to people: without credentials, a local path with `\xNN` for bytes not in UTF-8."""
    return printable(local_path(url)) if url.startswith(_BYTES_SCHEME) else redact(url)


def host(url: str) -> str:
    """Return the host of an http(s) URL in lower case, without brackets; empty where there is none."""
    try:
        return (urlsplit(url).hostname or "").lower().rstrip(".")
    except ValueError:
        return ""
