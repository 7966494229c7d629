"""Names of things in stores: how a user writes them, how we write them down, how we show them.

A URL here is `scheme://...`, or an absolute path for local files. Everything but http(s) is literal: `%`, `#`, `?`
and spaces in an object's name mean themselves. Knows no store and reads nothing.
"""

import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

from fsspec.utils import glob_translate

__all__ = [
    "IMAGE_SUFFIXES",
    "TAR_SUFFIXES",
    "absolute",
    "expand_braces",
    "glob_pattern",
    "glob_prefix",
    "has_braces",
    "has_glob",
    "holds_login",
    "host",
    "join",
    "local_path",
    "local_url",
    "name",
    "parent",
    "printable",
    "redact",
    "resolve",
    "scheme",
    "shared_options",
    "shown",
    "suffix",
]

_IMAGE_ENDINGS = (
    "jpg jpeg jpe jfif mpo png apng webp gif tif tiff bmp dib avif avifs heic heif jxl jp2 j2k j2c jpc jpf jpx ico cur"
    " icns ppm pgm pbm pnm pfm tga pcx sgi rgb rgba bw dds psd qoi xbm xpm"
)
IMAGE_SUFFIXES = frozenset("." + ending for ending in _IMAGE_ENDINGS.split())
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_ALIASES = {"s3a": "s3", "gcs": "gs", "local": "file"}
_BYTES_SCHEME = "file+percent://"  # a local name that is not UTF-8 and so cannot stand in a table as it is
_SUFFIX = re.compile(r"\.(?=[a-z0-9]*[a-z])[a-z0-9]{1,8}\Z")
_HALF_PAIR = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the others stand for bytes
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)\Z")
_PARAMETER = re.compile(r"(?<=[?&;#])([^=&;#?\s'\"]+)=")
_VALUE = re.compile(r"[^&\s'\"#]*")
_SECRET_NAME = re.compile(
    r"x-(?:amz|goog|ms)-.*|.*(?:token|secret).*|(?:auth|passw).*|sig|signature|pwd|policy|credential.*"
    r"|(?:api|access)?[-_]?key(?:-pair-id|id)?|awsaccesskeyid|googleaccessid",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"\b((?:https?|s?ftp|ssh|webdavs?)://)[^/@\s]+@", re.IGNORECASE)
_LOGIN = re.compile(r"(://|Invalid bucket name \")[^/@\s\":]*:[^/@\s\"]*@")  # also where no store takes one


def scheme(url: str) -> str:
    """Return the kind of store, in lower case and by its usual name; `file` for a plain path."""
    match = _SCHEME.match(url)
    found = match.group(1).lower() if match else "file"
    return _ALIASES.get(found, found.removesuffix("+percent") if found.startswith("file") else found)


def shared_options(url: str, other: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what opens `other`'s store as far as it opens `url`'s too: stores of one kind share their options."""
    return dict(options) if scheme(url) == scheme(other) else {}


def absolute(path: str) -> str:
    """Return `path` as a URL that means the same in every process: local paths absolute, one name a scheme."""
    if scheme(path) == "file":
        return path if path.startswith(_BYTES_SCHEME) else _absolute_local(path)
    return scheme(path) + "://" + path.partition("://")[2]


def _absolute_local(path: str) -> str:
    match = _SCHEME.match(path)
    plain = path[match.end() :] if match else _expanded(path)
    folder_mark = "/" if plain.endswith("/") else ""
    return os.path.abspath(plain).rstrip("/") + folder_mark or "/"  # noqa: PTH100


def _expanded(path: str) -> str:
    if "\0" in path:  # a user's name cannot be asked for with it
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
    """Return the path that `local_url` was given; also of `file://` URLs."""
    if url.startswith(_BYTES_SCHEME):
        return os.fsdecode(unquote_to_bytes(url.removeprefix(_BYTES_SCHEME)))
    return _absolute_local(url)


def join(folder: str, *names: str) -> str:
    """Return the URL of something below a folder."""
    return "/".join([folder.rstrip("/"), *names])


def parent(url: str) -> str:
    """Return the URL of the folder that holds `url`, without a slash at its end."""
    return url.rstrip("/").rpartition("/")[0]


def name(url: str) -> str:
    """Return the last component of a URL."""
    return url.rstrip("/").rpartition("/")[2]


def suffix(url: str) -> str:
    """Return the ending that says what a file is, in lower case; empty where it has none.

    `.tar.gz` is one suffix. A tail that is no extension (`.2020`, `.jpg?size=large`) counts as none.
    """
    base = name(url).lower()
    if base.endswith(".tar.gz"):
        return ".tar.gz"
    match = _SUFFIX.search(base.lstrip("."))
    return match.group() if match else ""


def resolve(uri: str, folder: str) -> str:
    """Return what `uri`, written in a list that lies in `folder`, points to."""
    if _SCHEME.match(uri) or uri.startswith(("/", "~")):
        return absolute(uri)
    if scheme(folder) == "file":
        return os.path.normpath(os.path.join(local_path(folder), uri))  # noqa: PTH118
    head, mark, tail = folder.partition("://")
    root, _, below = tail.partition("/")
    return f"{head}{mark}{root}/" + posixpath.normpath(f"/{below}/{uri}").lstrip("/")


def has_braces(path: str) -> bool:
    """Say whether `path` has a brace group that `expand_braces` would expand."""
    return next(_groups(path), None) is not None


def expand_braces(path: str) -> list[str]:
    """Return every name that `{0000..0099}` and `{a,b}` in `path` stand for, the last group running fastest.

    Braces that hold neither a range nor a comma mean themselves; groups do not nest.
    """
    pieces: list[list[str]] = []
    end = 0
    for start, stop, choices in _groups(path):
        pieces += [[path[end:start]], choices]
        end = stop
    return ["".join(chosen) for chosen in product(*pieces, [path[end:]])]


def _groups(path: str) -> Iterator[tuple[int, int, list[str]]]:
    for match in re.finditer(r"\{([^{}]*)\}", path):
        choices = _choices(match.group(1))
        if choices is not None:
            yield match.start(), match.end(), choices


def _choices(inside: str) -> list[str] | None:
    if numbers := _NUMBERS.match(inside):
        first, last = numbers.groups()
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        return [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
    return inside.split(",") if "," in inside else None


def has_glob(path: str) -> bool:
    """Say whether `path` has wildcards. In http(s) URLs `?` starts the query, so only `*` counts there."""
    return bool(re.search(r"\*" if scheme(path).startswith("http") else r"[*?]|\[[^\]]+\]", path))


def glob_prefix(pattern: str) -> str:
    """Return the part of a glob before its first wildcard: what a store can list by."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0]


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """Return what a whole URL must match; `**` crosses folders, `*` and `?` do not."""
    return re.compile(glob_translate(pattern))


def printable(text: str) -> str:
    r"""Return `text` with whatever is not UTF-8 in it written as `\xNN`, half a surrogate pair as `\uNNNN`."""
    text = _HALF_PAIR.sub(lambda half: f"\\u{ord(half.group()):04x}", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def redact(text: str) -> str:
    """Return `text` without the credentials of the URLs in it: user info, and the values of signing parameters."""
    if "@" in text:
        text = _LOGIN.sub(r"\1***@", _USERINFO.sub(r"\1***@", text))
    return _without_secrets(text) if "=" in text else text


def _without_secrets(text: str) -> str:
    """Return `text` with `***` for the values of signing parameters; in a time that grows with its length alone."""
    pieces: list[str] = []
    end = 0
    for found in _PARAMETER.finditer(text):
        if found.start() >= end and _SECRET_NAME.fullmatch(found.group(1)):
            pieces += [text[end : found.end()], "***"]
            end = _VALUE.match(text, found.end()).end()  # type: ignore[union-attr]  # it matches nothing, too
    return "".join([*pieces, text[end:]])


def holds_login(url: str) -> bool:
    """Say whether a URL has a user's name and password in it, which every store but a web server takes for a name."""
    return _LOGIN.search(url) is not None


def shown(url: str) -> str:
    """Return what people read in place of a URL: without credentials, and without bytes that are not UTF-8."""
    return printable(local_path(url)) if url.startswith(_BYTES_SCHEME) else redact(url)


def host(url: str) -> str:
    """Return the host of an http(s) URL in lower case, without brackets; empty where there is none."""
    try:
        return (urlsplit(url).hostname or "").lower().rstrip(".")
    except ValueError:
        return ""
