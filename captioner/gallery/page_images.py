"""The images behind the rows of a table, small enough for a page.

found = thumbnails(TableImages.of(table, storage_options), keys)     # key -> Thumbnail | Reject
"""

import logging
import math
import os
from collections.abc import Collection

from captioner.config import ImageConfig
from captioner.images.thumbnails import Thumbnail, Thumbnailer
from captioner.schema import Reject
from captioner.tables.table_images import TableImages

__all__ = ["PageImage", "room_for", "thumbnails"]

PageImage = Thumbnail | Reject

log = logging.getLogger(__name__)

_IMAGE = ImageConfig(fetch_timeout_s=20, fetch_retries=2)  # a page can do without an image
_PAGE_BYTES = 14_500_000  # of a page of up to _FULL_PAGE, with its images in base64: 15 MB is promised
_FULL_PAGE = 500
_IMAGES_A_PROCESS = 16  # to start one takes about as long as sixteen thumbnails
_MIN_BYTES, _MAX_BYTES = 12 << 10, 64 << 10  # of one image
_MIN_BYTES_BESIDE_LONG_TEXTS = 4 << 10  # of one image on a full page whose texts are long


def thumbnails(images: TableImages, keys: Collection[int], page_bytes: int = 0) -> dict[int, PageImage]:
    """Return the thumbnail of each key's image, or why there is none. Never raises for an image.

    page_bytes: size of the rest of the page."""
    log.info("images=%d", len(keys))
    side, max_bytes = room_for(len(keys), page_bytes)
    num_processes = max(1, min(8, os.cpu_count() or 1, math.ceil(len(keys) / _IMAGES_A_PROCESS)))
    found: dict[int, PageImage] = {}
    with Thumbnailer(_IMAGE, side=side, max_bytes=max_bytes, num_processes=num_processes) as thumbnailer:
        for made in images.map_images(keys, lambda _, data: thumbnailer.make_all(data), _IMAGE):
            found |= made
    return found


def room_for(num_images: int, page_bytes: int) -> tuple[int, int]:
    """Return (pixels a side, bytes) that each of so many images may have on one page.

    page_bytes: size of the rest of the page."""
    fewest = _MIN_BYTES_BESIDE_LONG_TEXTS if num_images <= _FULL_PAGE else _MIN_BYTES
    share = (_PAGE_BYTES - page_bytes) * 3 // 4 // max(1, num_images)
    side = 720 if num_images <= 150 else 512 if num_images <= 600 else 384
    return side, min(_MAX_BYTES, max(fewest, share))
