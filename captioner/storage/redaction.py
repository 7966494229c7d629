"""Text without the credentials of the URLs in it: for logs, errors, pages and records.

Knows how URLs carry secrets: user info, and parameters that sign or log in, encoded or in another URL. Takes time
linear in the length of the text.
"""

import re
from collections.abc import Callable
from urllib.parse import unquote

__all__ = ["holds_login", "redact"]

_ESCAPED = r"%(?:25){0,3}"  # a URL in a parameter of another is encoded once more for each
_PARAMETER = re.compile(
    rf"(?:[?&;#]|\\u0026|{_ESCAPED}(?:3F|26|3B|23))"
    rf"((?:(?!{_ESCAPED}(?:3D|3F|26|3B|23))[^=&;#?\s'\"\\])+)"
    rf"(?:=|\\u003d|{_ESCAPED}3D)",
    re.IGNORECASE,
)
_VALUE = re.compile(r"[^&\s'\"#\\]*")
_SECRET_NAME = re.compile(
    r"x-(?:amz|goog|ms)-.*|.*(?:token|secret|sign|auth|jwt|hmac|session|subscription-?key|credential).*"
    r"|sig.*|pass(?:w.*|phrase|code)?|pwd|policy|code|sas|(?:api|access)?[-_]?key(?:-pair-id|id)?"
    r"|awsaccesskeyid|googleaccessid",
    re.IGNORECASE,
)
_MARK = "://"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{0,15}\Z")
_TOKEN = re.compile(r"[^\s'\"<>?#]*")
_NO_LOGIN = re.compile(r"[\s'\"<>?#@]|::")
_MAX_PASSWORD = 4096
_WEB = frozenset({"http", "https", "ftp", "ftps", "sftp", "ssh", "webdav", "webdavs"})
_AT_IN_NAME = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "wasb", "wasbs", "oci", "oss", "hf", "file"})
_BUCKET = re.compile(r"(Invalid bucket name \")[^\s\":]*:[^\s\"]*@")


def redact(text: str) -> str:
    """Return `text` with `***` for user info in its URLs and for the values of parameters that sign or log in."""
    if "@" in text:
        text = _without_logins(_BUCKET.sub(r"\1***@", text))
    return _without_parameters(text) if "=" in text or "%" in text or "\\" in text else text


def holds_login(url: str) -> bool:
    """Return whether a URL holds a password, or user info of a web server: all other stores read it as a bucket."""
    return "@" in url and _without_logins(url, lambda scheme: scheme in _WEB) != url


def _without_logins(text: str, has_user: Callable[[str], bool] = lambda scheme: scheme not in _AT_IN_NAME) -> str:
    pieces: list[str] = []
    end = 0
    start = text.find(_MARK)
    while start >= 0:
        after = start + len(_MARK)
        following = text.find(_MARK, after)  # of another URL, in which the first one ends
        if following >= 0 and _ends_in_password(text[after:following]):
            at = text.find("@", following, following + _MAX_PASSWORD)
            following = text.find(_MARK, at if at >= 0 else following)
        token = _TOKEN.match(text, after, following if following >= 0 else len(text))
        scheme = _SCHEME.search(text[max(0, start - 16) : start])
        is_user = has_user(scheme.group().lower() if scheme else "")
        if token and (length := _login_length(token.group(), is_user=is_user)):
            pieces += [text[end:after], "***"]
            end = after + length
        start = following
    return "".join([*pieces, text[end:]])


def _ends_in_password(rest: str) -> bool:
    """Return whether what stands between two `://` is `user:pass`, so that the second one is in a password."""
    user, colon, after = rest.partition("/")[0].partition(":")
    is_alone = not _NO_LOGIN.search(rest)
    return bool(is_alone and user and colon and not _is_port(after))


def _is_port(text: str) -> bool:
    return text.isdecimal() and len(text) <= 5 and int(text) < 1 << 16


def _login_length(rest: str, *, is_user: bool) -> int:
    """Return the length of the user info that `rest`, what follows `scheme://`, begins with; 0 if it has none.

    A password may hold `/` and `@`; a colon before a number that a port can be is a port. is_user: what stands before
    the `@` is a user or a token; Azure has its container there."""
    authority = rest.partition("/")[0]
    user, colon, after = authority.partition(":")
    if authority.startswith("["):  # an IPv6 address
        return 0
    if colon and "@" not in user and not _is_port(after):
        return max(0, rest.rfind("@"))
    return max(0, authority.rfind("@")) if is_user else 0


def _without_parameters(text: str) -> str:
    pieces: list[str] = []
    end = 0
    for found in _PARAMETER.finditer(text):
        if found.start() >= end and _SECRET_NAME.fullmatch(_decoded(found.group(1))):
            pieces += [text[end : found.end()], "***"]
            end = _VALUE.match(text, found.end()).end()  # type: ignore[union-attr]  # it also matches an empty string
    return "".join([*pieces, text[end:]])


def _decoded(name: str) -> str:
    for _ in range(4):
        name = unquote(name)
    return name
