"""The pictures behind the rows of a table, small enough for a page.

pictures = thumbnails(TableImages.of(table, storage_options), keys)     # key -> Thumbnail | Reject
"""

import logging
import os
from collections.abc import Collection

from captioner.config import ImageConfig
from captioner.images.thumbnails import Thumbnail, Thumbnailer
from captioner.rows import Reject
from captioner.table_images import TableImages

__all__ = ["Picture", "thumbnails"]

Picture = Thumbnail | Reject

log = logging.getLogger(__name__)

_IMAGE = ImageConfig(fetch_timeout_s=20, fetch_retries=2)  # a page can do without a picture
_PAGE_BYTES = 14_500_000  # of a page of up to _FULL_PAGE, with its pictures in base64: 15 MB is promised
_FULL_PAGE = 500
_FEWEST_BYTES, _MOST_BYTES = 12 << 10, 64 << 10  # of one picture
_LEAST_BYTES = 4 << 10  # of one picture on a full page whose texts are long


def thumbnails(images: TableImages, keys: Collection[int], page_bytes: int = 0) -> dict[int, Picture]:
    """Return the thumbnail of each key's image, or why there is none. Never raises for an image.

    page_bytes: what the page they are for holds beside them."""
    log.info("pictures=%d", len(keys))
    side, max_bytes = _room(len(keys), page_bytes)
    num_cpus = min(8, os.cpu_count() or 1)
    found: dict[int, Picture] = {}
    with Thumbnailer(_IMAGE, side=side, max_bytes=max_bytes, num_processes=num_cpus) as thumbnailer:
        for pictures in images.see(keys, lambda _, data: thumbnailer.make_all(data), _IMAGE):
            found |= pictures
    return found


def _room(num_pictures: int, page_bytes: int) -> tuple[int, int]:
    """Return how many pixels a side and how many bytes a picture may have on a page of so many.

    page_bytes: what is on the page beside them."""
    fewest = _LEAST_BYTES if num_pictures <= _FULL_PAGE else _FEWEST_BYTES
    share = (_PAGE_BYTES - page_bytes) * 3 // 4 // max(1, num_pictures)
    side = 720 if num_pictures <= 150 else 512 if num_pictures <= 600 else 384
    return side, min(_MOST_BYTES, max(fewest, share))
