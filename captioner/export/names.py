"""Names of files below OUT, from the names of images.

Of the images of a folder the name is that below the folder: of `/photos` `/photos/a/b.jpg` is `a/b`. Elsewhere
`s3://bucket/a/b.jpg` is `bucket/a/b`, and `/a/b.jpg` is `a/b`. Knows texts only.
"""

import re

from captioner.export.record import RESERVED
from captioner.export.request import Refusal
from captioner.inputs.suffixes import IMAGE_SUFFIXES
from captioner.storage import urls

__all__ = ["file_name", "stem"]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # a line break ends a name in any list, ESC commands a terminal
_MAX_NAME_BYTES = 255  # of one component, on usual disks
_MAX_PATH_BYTES = 1000  # of a key on usual stores


def stem(image_id: str, *, keep_scheme: bool = False) -> str:
    """Return an image's name without its scheme and its image suffix: dots elsewhere belong to the name."""
    plain = image_id if keep_scheme else _SCHEME.sub("", image_id)
    suffix = urls.suffix(plain)
    return plain[: -len(suffix)] if suffix in IMAGE_SUFFIXES and len(urls.name(plain)) > len(suffix) else plain


def file_name(image_id: str, suffix: str, folder: str = "") -> tuple[str, str]:
    """Return the name of an image's file below OUT, and "" or why it can have none. folder: that of the images."""
    is_below = folder != "" and image_id.startswith(folder.rstrip("/") + "/")
    own = image_id[len(folder.rstrip("/")) :] if is_below else image_id
    found = stem(own).lstrip("/") + suffix
    if not urls.is_inside(found) or "\\" in found:
        return found, Refusal.ESCAPES
    if found.split("/")[0] in RESERVED:
        return found, Refusal.TAKEN
    parts = [len(part.encode("utf-8", "surrogateescape")) for part in found.split("/")]
    is_short = max(parts) <= _MAX_NAME_BYTES and sum(parts) + len(parts) <= _MAX_PATH_BYTES
    is_usable = is_short and not _CONTROL.search(found)
    return found, "" if is_usable else Refusal.UNUSABLE
