"""One image, in this process: bytes -> pixels, or the reason why not.

    1. refuse by size: no bytes, too many bytes
    2. identify: only the formats of formats.py; the header alone says how many pixels would come
    3. decode the first frame; with `fast_decode` a JPEG at a fraction of its size, as its header allows
    4. convert to 8 bits, L or RGB
    5. resize and crop in one step, in the orientation that EXIF asks for; of tiles, once more for their grid

Knows no processes and no clocks: `decoder.Decoder` ends a call that hangs.
"""

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from captioner.config import ImageConfig
from captioner.images.colours import as_8_bit, in_full_range, lower_bytes_mode
from captioner.images.formats import avif_pixels, guess, in_native_order, readable_formats
from captioner.images.jpegs import read_jpeg
from captioner.images.orientation import turn_of, upright
from captioner.images.preprocessing import Preprocessing
from captioner.images.second_tries import completed_jpegs, without_metadata
from captioner.images.square import squares
from captioner.schema import Reject, RejectReason

__all__ = ["Decoded", "decode", "decode_image", "jpeg_scale", "pixels_of", "refuse_by_size"]

Pixels = npt.NDArray[np.uint8]
Bytes = bytes | bytearray | memoryview

_MIN_FAST_OVERSAMPLING = 1.5  # a JPEG that is scaled down keeps at least so many times the pixels a side of the square
_LACKS = re.compile(
    r"un(supported|implemented)|not (supported|implemented|available|installed)|unknown (?!error)|cannot handle"
    r"|^\(?[\d, ]+\)?$",  # a KeyError: the number of a variant that the decoder's table lacks
    re.IGNORECASE,
)
_PILLOWS_LIMIT = re.compile(r" of \d+ pixels|, could")  # twice ours
_HEAD_BYTES = 64 << 10
_PILLOW = threading.Lock()


@dataclass(frozen=True)
class Decoded:
    """The pixels of an image, as the model reads them."""

    pixels: Pixels = field(repr=False)
    """uint8[3, S, S], or uint8[T, 3, S, S] of a model that reads tiles; RGB, contiguous, writable, not normalised."""

    width: int
    """Width of the whole image in pixels, upright: after the EXIF turn."""

    height: int
    """Height of the whole image in pixels, upright."""

    decode_s: float = field(default=0.0, compare=False)
    """Time that a child process took for it, in seconds of wall clock; 0 where none was asked."""


def decode(data: Bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """Return the pixels of an image file as the model reads them, or a reject; never raises, whatever the bytes.

    How far pixels are from CLIPImageProcessor's, in levels of 255: below eight times the square's side, whatever the
    image, 1 (2 below 320 pixels a side); of 71 larger camera JPEGs the median was 1 to 2 at most and the worst 3, on
    average at most 0.34. With `fast_decode` the greatest difference of a camera JPEG had a median of 11, a 95th
    percentile of 28 and a worst of 44 (200 JPEGs), on average 0.5, worst 2.6: never for pixels that must be CLIP's.

    One call at a time in a process, others wait: Pillow's limits are global. `Decoder` uses more cores.
    """
    refusal = refuse_by_size(data, config)
    if refusal:
        return refusal
    data = bytes(data)
    outcome = _try(data, preprocessing, config)
    if isinstance(outcome, Reject) and outcome.reason is RejectReason.CORRUPT:
        return _second_try(data, outcome, preprocessing, config)
    return outcome


def decode_image(image: Image.Image, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """Return the pixels of an image that is already open, or a reject; the image does not change."""

    def read() -> Decoded:
        if image.width * image.height > config.max_image_pixels:
            raise Image.DecompressionBombError(f"Image size ({image.width * image.height} pixels) exceeds limit")
        return _whole(image, preprocessing)

    return _attempt(read, config)


def pixels_of(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Return the pixels of an image that is already open. Raises as Pillow does when it cannot be loaded."""
    image.load()
    return squares(as_8_bit(image), image.size, turn_of(image), preprocessing)


def refuse_by_size(data: Bytes, config: ImageConfig) -> Reject | None:
    """Return the reject of an image that has no bytes or too many, else None."""
    if not len(data):
        return Reject(RejectReason.EMPTY, "0 bytes")
    if len(data) > config.max_image_bytes:
        detail = f"{len(data)} bytes; --max-image-bytes is {config.max_image_bytes}"
        return Reject(RejectReason.TOO_LARGE, detail)
    return None


def _try(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    return _attempt(lambda: _decode(data, preprocessing, config), config, head=data[:_HEAD_BYTES], num_bytes=len(data))


def _second_try(data: bytes, refusal: Reject, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """Return the pixels of a valid image that Pillow refuses, else its reject."""
    if (plain := without_metadata(data)) is not None and plain != data:
        return _try(plain, preprocessing, config)
    if "truncated" in refusal.detail and (copies := completed_jpegs(data)):
        found = _attempt(lambda: _completed(copies, preprocessing, config), config)
        return found if isinstance(found, Decoded) else refusal
    return refusal


def _completed(copies: tuple[bytes, bytes], preprocessing: Preprocessing, config: ImageConfig) -> Decoded:
    """Return the pixels of a JPEG that lacks just its end. Raises OSError if it lacks pixels."""
    pixels = []
    for copy in copies:
        with Image.open(io.BytesIO(copy), formats=["JPEG"]) as image:
            pixels.append(image.tobytes())
    if pixels[0] != pixels[1]:
        raise OSError("image file is truncated")
    return _decode(copies[0], preprocessing, config)


def _attempt(
    read: Callable[[], Decoded], config: ImageConfig, *, head: bytes = b"", num_bytes: int = 0
) -> Decoded | Reject:
    with _pillow_switches(config.max_image_pixels) as warned:
        try:
            return read()
        except UnidentifiedImageError:
            if guess(head).name == "AVIF" and (num_pixels := avif_pixels(head)) > config.max_image_pixels:
                return _too_many_pixels(f"Image size ({num_pixels} pixels) exceeds limit", config)
            return _unidentified(head, num_bytes, [str(warning.message) for warning in warned])
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            cause = _PILLOWS_LIMIT.split(str(error))[0]
            return _too_many_pixels(cause, config)
        except MemoryError:
            limit = f"--max-image-pixels {config.max_image_pixels} allows for"
            return _reject(RejectReason.OUT_OF_MEMORY, f"decoding takes more memory than {limit}")
        # Thirty decoders raise anything for any bytes. The one broad except of this package: the row names the error,
        # and the job goes on.
        except Exception as error:
            return _broken(guess(head).name, f"{type(error).__name__}: {error}")


def _decode(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded:
    with _opened(data) as image:
        is_scaled = config.fast_decode and isinstance(image, JpegImageFile)
        scale = jpeg_scale(upright(image.size, turn_of(image)), preprocessing) if is_scaled else 1
        if (found := read_jpeg(data, image, scale)) is not None:
            return _decoded(found, image, preprocessing, scale)
        if scale == 1:
            return _whole(image, preprocessing, data)
        with suppress(OSError):  # libjpeg does not scale a lossless JPEG
            return _scaled_down(image, scale, preprocessing)
    with _opened(data) as image:
        return _whole(image, preprocessing)


def _opened(data: bytes) -> ImageFile.ImageFile:
    return in_native_order(Image.open(io.BytesIO(data), formats=readable_formats()))


def _whole(image: Image.Image, preprocessing: Preprocessing, data: bytes = b"") -> Decoded:
    """Return the pixels of a whole image. data: its file, where that can be read once more."""
    mode = lower_bytes_mode(image) if data else None
    image.load()
    found = in_full_range(image, lambda: _in_raw_mode(data, mode)) if mode else as_8_bit(image)
    return _decoded(found, image, preprocessing)  # loaded: only then are size and EXIF certain


def _decoded(found: Image.Image, image: Image.Image, preprocessing: Preprocessing, scale: int = 1) -> Decoded:
    """Return the pixels of an image as it was decoded, at 1 / `scale`. image: what says its size and its turn."""
    turn = turn_of(image)
    return Decoded(squares(found, image.size, turn, preprocessing, scale=scale), *upright(image.size, turn))


def _in_raw_mode(data: bytes, mode: str) -> Image.Image:
    """Return an image as Pillow reads it when its samples are said to be stored so."""
    with _opened(data) as image:
        image.tile = [
            tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode) for tile in image.tile
        ]
        image.load()
        return image.copy()


def jpeg_scale(size: tuple[int, int], preprocessing: Preprocessing) -> int:
    """Return by how much `fast_decode` scales a JPEG of this upright size down while it is decoded: 8, 4, 2 or 1."""
    views = preprocessing.views(*size)
    samples = [min((box[2] - box[0]) / width, (box[3] - box[1]) / height) for box, width, height, *_ in views]
    spare = min(samples) / _MIN_FAST_OVERSAMPLING
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(spare, 1))


def _scaled_down(image: ImageFile.ImageFile, scale: int, preprocessing: Preprocessing) -> Decoded:
    size, turn = image.size, turn_of(image)
    image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    return Decoded(squares(image, size, turn, preprocessing, scale=scale), *upright(size, turn))


def _too_many_pixels(cause: str, config: ImageConfig) -> Reject:
    return _reject(RejectReason.TOO_MANY_PIXELS, f"{cause}; --max-image-pixels is {config.max_image_pixels}")


def _unidentified(head: bytes, num_bytes: int, messages: list[str]) -> Reject:
    seems = guess(head)
    if seems.reason is RejectReason.CORRUPT:
        start = f"{seems.name} opening failed. "
        causes = [message.removeprefix(start) for message in messages if message.startswith(start)]
        missing = [message for message in messages if message.startswith(seems.name) and "not installed" in message]
        return _broken(seems.name, (causes + missing + [f"no image in its header, of {num_bytes} bytes"])[0])
    known = f": {seems.name}" if seems.name else ""
    return _reject(seems.reason, f"starts with {_preview(head)}{known}; {num_bytes} bytes")


def _broken(name: str, cause: str) -> Reject:
    reason = RejectReason.UNSUPPORTED if _LACKS.search(cause) else RejectReason.CORRUPT
    return _reject(reason, f"{name}: {cause}" if name else cause)


def _preview(head: bytes) -> str:
    text = head[:24].decode("ascii", "replace")
    return repr(text) if text.isprintable() and text.isascii() else "bytes " + head[:12].hex(" ")


def _reject(reason: RejectReason, detail: str) -> Reject:
    line = " ".join(detail.split())[:300]
    return Reject(reason, line.encode("utf-8", "replace").decode())


@contextmanager
def _pillow_switches(max_pixels: int) -> Iterator[list[warnings.WarningMessage]]:
    """Set Pillow's global switches for decoding, and restore them; yield the warnings that it gives meanwhile.

    Pillow warns of a header, frame or tile above MAX_IMAGE_PIXELS; raised as an error, that is our limit.
    """
    with _PILLOW, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS, Image.WARN_POSSIBLE_FORMATS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, Image.WARN_POSSIBLE_FORMATS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, True, False
        try:
            yield warned
        finally:
            Image.MAX_IMAGE_PIXELS, Image.WARN_POSSIBLE_FORMATS, ImageFile.LOAD_TRUNCATED_IMAGES = before
