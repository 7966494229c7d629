"""One image, in this process: bytes -> pixels, or the reason why not.

    1. refuse by size: no bytes, too many bytes
    2. identify: only the formats of formats.py; the header alone says how many pixels would come
    3. decode the first frame; a JPEG at a reduced scale where that gives the same pixels
    4. cut out what the model will see, in the orientation that EXIF asks for
    5. bring it to 8 bits, L or RGB, and resize it

Knows no processes and no clocks: what hangs here is ended by `decoder.Decoder`.
"""

import io
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from captioner.config import ImageConfig
from captioner.images.colours import as_8_bit, in_colour
from captioner.images.formats import guess, readable_formats
from captioner.images.preprocessing import Box, Preprocessing
from captioner.images.resampling import axes, resample
from captioner.rows import Reject, RejectReason

__all__ = ["Decoded", "decode", "decode_image", "pixels_of", "refuse_by_size"]

Pixels = npt.NDArray[np.uint8]
Bytes = bytes | bytearray | memoryview

_CARE = 3  # a reduced JPEG keeps at least this many times the pixels a side that the model sees
_EXIF_ERRORS = (AttributeError, LookupError, OSError, OverflowError, SyntaxError, TypeError, ValueError, struct.error)
_LACKS = re.compile(
    r"un(supported|implemented)|not (supported|implemented|available|installed)|unknown (?!error)", re.IGNORECASE
)
_PILLOW = threading.Lock()


class Turn(NamedTuple):
    """What brings an image as stored upright: the swap first, then the mirrors."""

    swaps_axes: bool = False
    mirrors_x: bool = False
    mirrors_y: bool = False


_UPRIGHT = Turn()
_TURNS = {  # by EXIF orientation
    2: Turn(mirrors_x=True),
    3: Turn(mirrors_x=True, mirrors_y=True),
    4: Turn(mirrors_y=True),
    5: Turn(swaps_axes=True),
    6: Turn(swaps_axes=True, mirrors_x=True),
    7: Turn(swaps_axes=True, mirrors_x=True, mirrors_y=True),
    8: Turn(swaps_axes=True, mirrors_y=True),
}


@dataclass(frozen=True)
class Decoded:
    """An image that can be captioned."""

    pixels: Pixels = field(repr=False)
    """uint8[3, S, S], RGB, contiguous and writable; not normalised."""

    width: int
    """Width of the whole image in pixels, upright: after the EXIF turn."""

    height: int
    """Height of the whole image in pixels, upright."""


def decode(data: Bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """Return what the model will see of an image file, or why it cannot see it; never raises, whatever the bytes.

    The pixels are CLIPImageProcessor's within 3/255 (with `fast_decode`: within about 25/255, about 1/255 on average).
    One call at a time in a process, others wait: Pillow's limits are global. `Decoder` is the way to more cores.
    """
    refusal = refuse_by_size(data, config)
    if refusal:
        return refusal
    head = bytes(data[:512])
    return _attempt(lambda: _decode(bytes(data), preprocessing, config), config, head=head, num_bytes=len(data))


def decode_image(image: Image.Image, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """Return what the model will see of a picture that is already open, or why it cannot; it is not changed."""

    def see() -> Decoded:
        if image.width * image.height > config.max_image_pixels:
            raise Image.DecompressionBombError(f"Image size ({image.width * image.height} pixels) exceeds limit")
        return _whole(image, preprocessing)

    return _attempt(see, config)


def pixels_of(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Return uint8[3, S, S] of a picture that is already open. Raises what Pillow raises when it cannot be loaded."""
    image.load()
    turn = _turn(image)
    return _seen(as_8_bit(image), _stored_box(image.size, turn, preprocessing), turn, preprocessing)


def refuse_by_size(data: Bytes, config: ImageConfig) -> Reject | None:
    """Return the reject of an image that has no bytes or too many, else None."""
    if not len(data):
        return Reject(RejectReason.EMPTY, "0 bytes")
    if len(data) > config.max_image_bytes:
        detail = f"{len(data)} bytes; --max-image-bytes is {config.max_image_bytes}"
        return Reject(RejectReason.TOO_LARGE, detail)
    return None


def _attempt(
    see: Callable[[], Decoded], config: ImageConfig, *, head: bytes = b"", num_bytes: int = 0
) -> Decoded | Reject:
    with _pillow_set_up(config.max_image_pixels) as warned:
        try:
            return see()
        except UnidentifiedImageError:
            return _unidentified(head, num_bytes, [str(warning.message) for warning in warned])
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            limit = f"--max-image-pixels is {config.max_image_pixels}"
            return _reject(RejectReason.TOO_MANY_PIXELS, f"{str(error).split(', could')[0]}; {limit}")
        except MemoryError:
            limit = f"--max-image-pixels {config.max_image_pixels} allows for"
            return _reject(RejectReason.OUT_OF_MEMORY, f"decoding takes more memory than {limit}")
        # Thirty decoders, fed with any bytes, raise anything. The one broad except of this package: the row names the
        # error, and the job goes on.
        except Exception as error:
            return _broken(guess(head).name, f"{type(error).__name__}: {error}")


def _decode(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded:
    with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
        scale = _scale(image, preprocessing, is_fast=config.fast_decode) if isinstance(image, JpegImageFile) else 1
        if scale == 1:
            return _whole(image, preprocessing)
        reduced = _reduced(image, scale, preprocessing, is_fast=config.fast_decode)
    if reduced is not None:
        return reduced
    with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
        return _whole(image, preprocessing)


def _whole(image: Image.Image, preprocessing: Preprocessing) -> Decoded:
    pixels = pixels_of(image, preprocessing)
    return Decoded(pixels, *_upright(image.size, _turn(image)))  # loaded by now: only then are size and EXIF certain


def _scale(image: Image.Image, preprocessing: Preprocessing, *, is_fast: bool) -> int:
    """Return by how much a JPEG may be reduced while it is decoded: 8, 4, 2 or 1."""
    box = _stored_box(image.size, _turn(image), preprocessing)
    spare = min(box[2] - box[0], box[3] - box[1]) / preprocessing.size / (1 if is_fast else _CARE)
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(spare, 1))


def _reduced(image: ImageFile.ImageFile, scale: int, preprocessing: Preprocessing, *, is_fast: bool) -> Decoded | None:
    """Return a JPEG decoded at a fraction of its size; None where only the whole one will do."""
    size, turn = image.size, _turn(image)
    box = _stored_box(size, turn, preprocessing)
    image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    pixels = _seen(image, _divided(box, scale), turn, preprocessing)
    if not is_fast and not _is_smooth(image, _divided(box, scale), pixels, turn, preprocessing):
        return None
    return Decoded(pixels, *_upright(size, turn))


def _is_smooth(image: Image.Image, box: Box, pixels: Pixels, turn: Turn, preprocessing: Preprocessing) -> bool:
    """Return whether reduced decoding gives the pixels of full decoding: within 3/255, and 0.3/255 on average.

    Reducing drops fine detail and clips to 0..255 only after it has averaged. What a second, cruder reduction (the mean
    of 2 x 2) changes tells how much detail there is, and whether it lies near black or white. The bounds were set on
    photographs drawn in code, noise, print, saturated shapes and lines, at quality 88 to 95 and both chroma samplings.
    """
    cruder = _seen(image.reduce(2), _divided(box, 2), turn, preprocessing)
    change = np.maximum(pixels, cruder) - np.minimum(pixels, cruder)
    near_limit = change[(pixels < 16) | (pixels > 239)]
    is_clipped = near_limit.size and (near_limit.max() > 3 or np.count_nonzero(near_limit) > 0.03 * change.size)
    return bool(change.max() <= 12 and change.mean() <= 0.32 and not is_clipped)


def _seen(image: Image.Image, box: Box, turn: Turn, preprocessing: Preprocessing) -> Pixels:
    """Return uint8[3, S, S], upright, of the part of an 8-bit image as stored."""
    columns, rows = axes(image.size, box, preprocessing.size, preprocessing.resample)
    part = in_colour(image.crop((columns.start, rows.start, columns.stop, rows.stop)))
    if turn.swaps_axes:  # before the resize: it rounds between its two directions, and CLIP's begins with the upright x
        part, columns, rows = part.transpose(Image.Transpose.TRANSPOSE), rows, columns
    pixels = resample(part, columns, rows)
    if turn.mirrors_x:
        pixels = pixels[:, :, ::-1]
    if turn.mirrors_y:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels if len(pixels) == 3 else pixels.repeat(3, axis=0))


def _stored_box(size: tuple[int, int], turn: Turn, preprocessing: Preprocessing) -> Box:
    """Return where in the image as stored lies what the model will see of the upright one."""
    width, height = _upright(size, turn)
    left, top, right, bottom = preprocessing.crop_box(width, height)
    if turn.mirrors_x:
        left, right = width - right, width - left
    if turn.mirrors_y:
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if turn.swaps_axes else (left, top, right, bottom)


def _upright(size: tuple[int, int], turn: Turn) -> tuple[int, int]:
    return size[::-1] if turn.swaps_axes else size


def _divided(box: Box, scale: int) -> Box:
    left, top, right, bottom = box
    return left / scale, top / scale, right / scale, bottom / scale


def _turn(image: Image.Image) -> Turn:
    """Return the turn that EXIF asks for; none where EXIF is missing or broken, which says nothing of the picture."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _EXIF_ERRORS:
        return _UPRIGHT
    return _TURNS.get(orientation, _UPRIGHT) if isinstance(orientation, int) else _UPRIGHT


def _unidentified(head: bytes, num_bytes: int, messages: list[str]) -> Reject:
    seems = guess(head)
    if seems.reason is RejectReason.CORRUPT:
        start = f"{seems.name} opening failed. "
        causes = [message.removeprefix(start) for message in messages if message.startswith(start)]
        missing = [message for message in messages if message.startswith(seems.name) and "not installed" in message]
        return _broken(seems.name, (causes + missing + [f"no picture in its header, of {num_bytes} bytes"])[0])
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
def _pillow_set_up(max_pixels: int) -> Iterator[list[warnings.WarningMessage]]:
    """Put Pillow's global switches where every decoder needs them, and back; yield what it warns of meanwhile.

    Pillow warns above MAX_IMAGE_PIXELS, of the header and of frames and tiles inside; as an error, that is our limit.
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
