"""Images as text where their URI should stand: `data:` URIs and base64.

A table holds them in memory anyway: there they are decoded. A list is kept as its URIs: there they are refused.
"""

import base64
import re
from urllib.parse import unquote_to_bytes

from captioner.errors import InputError

__all__ = ["check_uri", "decode_payload", "is_payload"]

_URL_SAFE = str.maketrans("-_", "+/")
_DATA = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk0|Qk1|SUkq|TU0A|AAAA)[A-Za-z0-9+/_-]{100}")
"""How JPEG, PNG, GIF, WebP, BMP, TIFF and AVIF begin in base64, and that no path goes on so."""


def is_payload(text: str) -> bool:
    """Return whether a text is an image and no URI of one."""
    return bool(_DATA.match(text) or _BASE64.match(text))


def decode_payload(text: str) -> bytes:
    """Return the bytes of such a text; of one that is cut or wrong the text itself, which is no image."""
    start = _DATA.match(text)
    body = text[start.end() :] if start else text
    if start and ";base64" not in start.group().lower():
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body.translate(_URL_SAFE))
    except ValueError:
        return text.encode("utf-8", "replace")


def check_uri(text: str, where: str) -> None:
    """Raise InputError for an image as text. Quotes its first characters only."""
    if is_payload(text):
        raise InputError(
            f"{where} holds an image itself, as {text[:24]}...; expected its URI: store the bytes in a .parquet, in a"
            " column of binary, as base64.b64decode gives them"
        )
