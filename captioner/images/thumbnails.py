"""Small WebP files of whole images, for pages.

An image goes through `Decoder`, with its limits, its deadline and its child processes: it is resized to a square of the
wanted side, and from there back to its own shape. Knows no page and no store.
"""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from PIL import Image

from captioner.config import ImageConfig
from captioner.images.decoder import Decoder
from captioner.images.preprocessing import Preprocessing
from captioner.images.reader import Bytes, Decoded
from captioner.schema import Reject

__all__ = ["Thumbnail", "Thumbnailer"]

_QUALITIES = (95, 80, 65, 50, 35)  # of WebP; the first for small images only; at 35 noise still looks like noise
_SMALL = 256  # pixels a side: a page enlarges such an image, and its flaws
_METHOD = 2  # of WebP's 0 to 6: at 512 x 384, 2 takes 11 ms and 24 KB, 0 takes 5 ms and 28 KB, 6 takes 105 ms and 23 KB


@dataclass(frozen=True)
class Thumbnail:
    """A whole image, upright, as a small WebP file."""

    data: bytes = field(repr=False)

    width: int
    """Of the thumbnail, in pixels."""

    height: int
    """Of the thumbnail, in pixels."""


class Thumbnailer:
    """Turns image files into thumbnails of at most `side` pixels and `max_bytes` bytes, or into rejects.

    Safe to call from many threads; its child processes end with `close`, or at the end of a `with`.
    """

    def __init__(self, config: ImageConfig, *, side: int, max_bytes: int, num_processes: int = 1) -> None:
        squeezed = Preprocessing(size=side, shortest_edge=None)
        self._decoder = Decoder(squeezed, replace(config, fast_decode=True), num_processes=num_processes)
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(num_processes)

    def make(self, data: Bytes) -> Thumbnail | Reject:
        """Return a thumbnail or a reject; never raises for the bytes, and never enlarges the image."""
        decoded = self._decoder.decode(data)
        return decoded if isinstance(decoded, Reject) else self._encoded(decoded)

    def make_all(self, sources: list[bytes | Reject]) -> list[Thumbnail | Reject]:
        """Return `make` of each image, in their order, on all the child processes; rejects pass through."""
        return list(self._threads.map(lambda found: found if isinstance(found, Reject) else self.make(found), sources))

    def _encoded(self, decoded: Decoded) -> Thumbnail:
        square = Image.fromarray(decoded.pixels.transpose(1, 2, 0).copy())
        side = square.width
        while True:
            small = square.resize(_fitted(decoded, side), Image.Resampling.LANCZOS)
            for quality in _QUALITIES[small.width > _SMALL or small.height > _SMALL :]:
                data = _webp(small, quality)
                if len(data) <= self._max_bytes:
                    return Thumbnail(data, small.width, small.height)
            side = math.ceil(side * 0.7)

    def close(self) -> None:
        """End the child processes."""
        self._threads.shutdown()
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _fitted(decoded: Decoded, side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(decoded.width, decoded.height))
    return max(1, round(decoded.width * scale)), max(1, round(decoded.height * scale))


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=_METHOD)
    return buffer.getvalue()
